"""What the commands have in common: options, and how they answer programs."""

from __future__ import annotations

import dataclasses
import datetime
import inspect
import json
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from evosample import Client, Policy, Tls, connect
from evosample.credentials import read_token, tls_files_of_environment

Project = Annotated[
    str | None,
    typer.Option(envvar="EVOSAMPLE_PROJECT", help="The project. Default: the token's; where none is needed, default."),
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs: a line of JSON.")]
Name = Annotated[str, typer.Argument(help="The experiment's name.")]
Yes = Annotated[bool, typer.Option("--yes", help="Don't ask.")]


def console(*, stderr: bool = False) -> Console:
    """What shows text as it is: names, notes and messages may look like markup."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def print_fields(fields: Mapping[str, str]) -> None:
    """Print names and values as a table."""
    table = Table(show_header=False)
    for field, value in fields.items():
        table.add_row(field, value)
    console().print(table)


def echo_json(value: Any) -> None:
    """Print a value as one line of JSON."""
    typer.echo(json.dumps(jsonable(value)))


def jsonable(value: Any) -> Any:
    """A value of the client as JSON has it: times in ISO form, and the kind of a policy beside its settings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__} | fields if isinstance(value, Policy) else fields
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return jsonable(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): jsonable(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(each) for each in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, datetime.datetime):
        return value.isoformat()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def _connect(
    address: Annotated[
        str,
        typer.Option(envvar="EVOSAMPLE_ADDRESS", help="The server: HOST:PORT or unix:/PATH; or several, with commas."),
    ] = "127.0.0.1:50051",
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="A file with a token. Default: EVOSAMPLE_TOKEN, or the file that EVOSAMPLE_TOKEN_FILE names."
        ),
    ] = None,
    tls: Annotated[
        bool | None, typer.Option(help="Speak TLS with the server. Default: EVOSAMPLE_TLS (1 or 0).")
    ] = None,
    tls_ca: Annotated[
        Path | None, typer.Option(help="Authorities that sign the server's certificate. Default: EVOSAMPLE_TLS_CA.")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="The certificate to show to the server. Default: EVOSAMPLE_TLS_CERT.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key. Default: EVOSAMPLE_TLS_KEY.")] = None,
) -> Client:
    files = {name: path for name, path in (("ca", tls_ca), ("cert", tls_cert), ("key", tls_key)) if path is not None}
    is_wanted = bool(tls or (files and tls is None))
    return connect(
        address,
        token=None if token_file is None else read_token(token_file),
        tls=Tls(**(tls_files_of_environment() | files)) if is_wanted else tls,
        connect_timeout_s=3,
        outage_timeout_s=10,  # as long as a fail-over takes; who looks at a terminal wants to know
    )


def with_client(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes the options of `_connect` in place of its first argument, the client."""
    options = inspect.signature(_connect, eval_str=True).parameters
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

    @wraps(command)
    def connected(**arguments: Any) -> None:
        with _connect(**{option: arguments.pop(option) for option in options}) as client:
            command(client, **arguments)

    parameters = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in (*own, *options.values())]
    connected.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what Typer goes by
    connected.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return connected
