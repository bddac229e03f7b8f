"""`evosample-server`."""

from __future__ import annotations

import sys

from evosample.errors import EvosampleError


def main() -> int:
    """Run a server; returns the exit code: 0 stopped as asked, 1 could not run, 2 bad options."""
    try:
        from pydantic import ValidationError
        from pydantic_settings import CliApp, SettingsError

        from evosample_server.app import run
        from evosample_server.settings import Settings
    except ModuleNotFoundError as error:
        print(f"evosample-server needs {error.name}: pip install 'evosample[server]'", file=sys.stderr)  # noqa: T201
        return 1
    try:
        settings = CliApp.run(Settings, cli_args=sys.argv[1:])
    except (ValidationError, SettingsError) as error:
        print(f"evosample-server: {_explained(error)}", file=sys.stderr)  # noqa: T201
        return 2
    try:
        run(settings)
    except EvosampleError as error:
        print(f"evosample-server: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def _explained(error: Exception) -> str:
    problems = getattr(error, "errors", None)
    if problems is None:
        return str(error)
    explained = []
    for problem in problems():
        option = f"--{str(problem['loc'][0]).replace('_', '-')}={problem['input']!r}: " if problem["loc"] else ""
        explained.append(option + problem["msg"].removeprefix("Value error, "))
    return "; ".join(explained)


if __name__ == "__main__":
    sys.exit(main())
