"""`evosample-server`."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def main() -> int:
    """Run a server; returns the exit code: 0 stopped as asked, 1 could not run, 2 bad options."""
    with suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        if is_zen_4(lines):  # numpy looks at this when it is imported; whose sorting takes five times as long there
            os.environ.setdefault("NPY_DISABLE_CPU_FEATURES", "X86_V4 AVX512_SKX AVX512_ICL AVX512_SPR")
    try:
        from pydantic import ValidationError
        from pydantic_settings import CliApp, SettingsError

        from evosample.errors import EvosampleError
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


def is_zen_4(cpuinfo: Iterable[str]) -> bool:
    """Whether a processor has AVX-512 with AMD's slow VPCOMPRESS, by the lines of /proc/cpuinfo.

    Source: https://github.com/numpy/x86-simd-sort/issues/6.
    """
    of_first_core = itertools.takewhile(str.strip, cpuinfo)
    fields = {name.strip(): value.split() for name, _, value in (line.partition(":") for line in of_first_core)}
    is_amd = fields.get("vendor_id") == ["AuthenticAMD"]
    return is_amd and fields.get("cpu family") == ["25"] and "avx512f" in fields.get("flags", [])


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
