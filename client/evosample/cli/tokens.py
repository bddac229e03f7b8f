"""Commands for the tokens of a project."""

from __future__ import annotations

import re
from typing import Annotated

import typer
from rich.table import Table

from evosample import Client, InvalidArgumentError, Token
from evosample.cli.options import AsJson, Project, console, echo_json, jsonable, with_client
from evosample.wire import Role

app = typer.Typer(help="Make, list and revoke the tokens that open a project.", no_args_is_help=True)
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


@app.command("create")
@with_client
def create_token(
    client: Client,
    role: Annotated[
        Role,
        typer.Option(
            help="reader: to look. writer: to train, too. administrator: also to delete experiments, to end epochs, "
            "and to make tokens."
        ),
    ],
    project: Project = None,
    note: Annotated[str, typer.Option(help="What it is for.")] = "",
    expires_in: Annotated[
        str | None, typer.Option(help="A number of s, m, h, d or w, such as 90d. Default: it never expires.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a token and print it: this once, for the server keeps a hash of it alone."""
    ttl_s = None if expires_in is None else _seconds(expires_in)
    token, bearer_token = client.create_token(role, project=project, note=note, ttl_s=ttl_s)
    if as_json:
        echo_json(jsonable(token) | {"token": bearer_token})
        return
    typer.echo(bearer_token)
    typer.echo(
        f"token {token.id} opens project {token.project} as {token.role}, {_until(token)}. Keep it: nobody can find it "
        "out later",
        err=True,
    )


@app.command("list")
@with_client
def list_tokens(client: Client, project: Project = None, as_json: AsJson = False) -> None:
    """List a project's tokens, without their secrets."""
    tokens = client.list_tokens(project=project)
    if as_json:
        echo_json(tokens)
        return
    table = Table("id", "role", "made", "valid", "note")
    for token in tokens:
        table.add_row(token.id, token.role, f"{token.create_time:%Y-%m-%d}", _until(token), token.note)
    console().print(table)


@app.command("revoke")
@with_client
def revoke_token(
    client: Client,
    token_id: Annotated[str, typer.Argument(help="As `evosample token list` shows it.")],
    project: Project = None,
) -> None:
    """Make a token worthless, within a second."""
    client.revoke_token(token_id, project=project)
    typer.echo(f"revoked token {token_id}")


def _seconds(duration: str) -> int:
    found = re.fullmatch(r"(\d{1,9})([smhdw])", duration)
    if found is None:
        raise InvalidArgumentError(f"--expires-in {duration}: expected a number of s, m, h, d or w, such as 90d")
    return int(found[1]) * _SECONDS[found[2]]


def _until(token: Token) -> str:
    if token.expire_time is None:
        return "for ever"
    return f"{'expired' if token.has_expired else 'until'} {token.expire_time:%Y-%m-%d}"
