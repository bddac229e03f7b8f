"""The `evosample` command.

Exit codes: 0 done; 1 failed, for a reason that none of the others says; 2 the command was called wrongly; 3 there is no
such experiment, project or token; 4 not allowed: a token is missing, not valid, or of too low a role; 5 no server
answers, or its store is away; 130 ended with Ctrl-C.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer
from rich.text import Text

import evosample
from evosample.cli import compare, doctor, experiments, index, ledger, tokens
from evosample.cli.options import console
from evosample.errors import (
    EvosampleError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
    WaitTimeoutError,
)
from evosample.sampling import InvalidValue

_EXIT_CODES: dict[type[Exception], int] = {
    InvalidArgumentError: 2,
    NotFoundError: 3,
    PermissionDeniedError: 4,
    UnauthenticatedError: 4,
    UnavailableError: 5,
    WaitTimeoutError: 5,
}

app = typer.Typer(
    help="Look at the experiments of a selection server (start one with `evosample-server`), look after them, and "
    "index datasets.",
    epilog="Exit codes: 0 done, 1 failed, 2 called wrongly, 3 not found, 4 not allowed, 5 no server answers, "
    "130 ended with Ctrl-C.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(evosample.__version__)
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and end.")
    ] = False,
) -> None: ...


app.add_typer(experiments.app)
app.add_typer(ledger.app)
app.add_typer(compare.app)
app.add_typer(index.app)
app.add_typer(doctor.app)
app.add_typer(tokens.app, name="token")


def main() -> None:
    """Run the command; errors go to stderr."""
    for stream in (sys.stdout, sys.stderr):  # notes and paths may have what the terminal's encoding has not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except (EvosampleError, InvalidValue, OSError) as error:  # of a newer server's answer; of writing to stdout
        notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        console(stderr=True).print(Text.assemble(("evosample:", "red"), f" {error}{notes}"), soft_wrap=True)
        raise SystemExit(_EXIT_CODES.get(type(error), 1)) from None
