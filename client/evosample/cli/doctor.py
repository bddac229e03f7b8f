"""Commands for the server itself: how it is, and what is wrong where it does not answer."""

from __future__ import annotations

import datetime
import re
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import typer
from rich.text import Text

import evosample
from evosample import Client, EvosampleError, ServerStatus, diagnosis
from evosample.cli.options import AsJson, console, echo_json, print_fields, with_client
from evosample.errors import (
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnimplementedError,
)
from evosample.sampling import InvalidValue

app = typer.Typer()

_TIMEOUT_S = 3.0
_MAX_CLOCK_DIFFERENCE_S = 5.0
_SLOW_STORE_S = 0.05
_NUM_CALLS = 5
_STORE_AWAY = re.compile(r"can't use its store(?:: (.*))?$")


class Finding(NamedTuple):
    """What a check has come to.

    Attributes:
        check: what was looked at.
        is_ok: whether that is as it should be.
        message: what was found and, if it is not, what to do.
    """

    check: str
    is_ok: bool
    message: str


@app.command()
@with_client
def status(client: Client, as_json: AsJson = False) -> None:
    """Show how the server and its store are, and what your token opens. Exit code 5: the store is away."""
    found = client.server_status()
    if as_json:
        echo_json(found)
    else:
        _print_status(client, found)
    if found.store_error:
        raise typer.Exit(5)


def _print_status(client: Client, found: ServerStatus) -> None:
    opens = "everything" if found.project is None else f"project {found.project}"
    print_fields(
        {
            "server": f"{client.address}, version {found.version}",
            "store": found.store_error
            or f"{found.store_latency_s * 1e3:.1f} ms, {_size(found.store_used_memory_bytes)}",
            "tokens": "needed" if found.needs_tokens else "not needed: whoever reaches it may do everything",
            "you": f"{found.role} of {opens}",
        }
    )


@app.command()
@with_client
def doctor(client: Client, as_json: AsJson = False) -> None:
    """Find out what keeps you from working with a server, and say what to do.

    Looks at the address, TLS, the token, versions, clocks, the store and
    the latency. Exit code 0: all is well.
    """
    findings = list(_findings(client))
    if as_json:
        echo_json([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            mark = ("ok   ", "green") if finding.is_ok else ("wrong", "red")
            console().print(Text.assemble(mark, " ", (finding.check, "bold"), f": {finding.message}"), soft_wrap=True)
    if not all(finding.is_ok for finding in findings):
        raise typer.Exit(1)


def _findings(client: Client) -> Iterator[Finding]:
    """Check after check, until one makes the others pointless."""
    for address in client.address.split(","):
        problem = _unreachable(address)
        yield Finding("address", not problem, problem or f"something listens on {address}")
        if problem:
            return
        refusal = diagnosis.refusal(address, client.tls)
        said = "encrypted" if client.tls else "plain text"
        yield Finding("TLS", not refusal, f"{address}: {refusal}" if refusal else said)
        if refusal:
            return
    began_s = time.monotonic()
    try:
        found = client.server_status()
    except (UnauthenticatedError, PermissionDeniedError, ResourceExhaustedError) as error:
        yield Finding("token", False, str(error))
        return
    except (UnimplementedError, InvalidValue) as error:
        yield Finding("version", False, _not_understood(error))
        return
    except EvosampleError as error:
        cause = _STORE_AWAY.search(str(error))  # of a token that the server wanted to look up there
        if cause is not None:
            yield _broken_store(cause[1] or "its log says why")
        else:
            yield Finding("server", False, f"what listens there gives no answer of a selection server: {error}")
        return
    took_s = time.monotonic() - began_s
    yield _token(found)
    yield _version(found)
    yield _clock(found, took_s)
    yield _store(found)
    if not found.store_error:
        yield _latency(client)


def _unreachable(address: str) -> str:
    """Why nothing answers at an address; empty if something does."""
    if address.startswith("unix:"):
        path = Path(address.removeprefix("unix:"))
        return "" if path.is_socket() else f"{path} is no socket: is the server running, and on this machine?"
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _TIMEOUT_S).close()
    except socket.gaierror:
        return f"there is no host of the name {host}: is the address right (--address, EVOSAMPLE_ADDRESS)?"
    except ConnectionRefusedError:
        return (
            f"nothing listens on {address}: start the server there with `evosample-server --listen {address}`, or name "
            "the right address (--address, EVOSAMPLE_ADDRESS)"
        )
    except OSError as error:
        why = "no answer" if isinstance(error, TimeoutError) else error.strerror
        return f"{address} can't be reached ({why}): is the address right, and does a firewall let you through?"
    return ""


def _token(found: ServerStatus) -> Finding:
    if not found.needs_tokens:
        return Finding("token", True, "the server asks for none")
    opens = "every project" if found.project is None else f"project {found.project}"
    return Finding("token", True, f"opens {opens} as {found.role}")


def _version(found: ServerStatus) -> Finding:
    ours, theirs = evosample.__version__, found.version
    if ours.split(".")[:2] == theirs.split(".")[:2]:
        return Finding("version", True, f"client {ours}, server {theirs}")
    older = "client" if _numbers(ours) < _numbers(theirs) else "server"
    return Finding("version", False, f"client {ours}, server {theirs}: upgrade the {older}")


def _not_understood(error: UnimplementedError | InvalidValue) -> str:
    """What to do if a server and this client have no common words."""
    ours = evosample.__version__
    if isinstance(error, InvalidValue):
        return f"the server's answer makes no sense to client {ours}, which is older: upgrade the client ({error})"
    return (
        f"what listens there does not know what client {ours} asks: it is an older server, which you would upgrade, or "
        f"no selection server ({error})"
    )


def _numbers(version: str) -> list[int]:
    return [int(part) if part.isdigit() else 0 for part in version.split(".")]


def _clock(found: ServerStatus, took_s: float) -> Finding:
    """The server's time was taken somewhere within the call, so that much may come from it."""
    difference_s = (datetime.datetime.now(datetime.UTC) - found.server_time).total_seconds()
    if -_MAX_CLOCK_DIFFERENCE_S < difference_s < _MAX_CLOCK_DIFFERENCE_S + took_s:
        return Finding("clock", True, "this machine's and the server's agree")
    which = "behind" if difference_s > 0 else "ahead of"
    return Finding(
        "clock",
        False,
        f"the server's clock is {abs(difference_s):.0f} s {which} this machine's: tokens and certificates expire by "
        "it. Let both machines keep time (NTP)",
    )


def _store(found: ServerStatus) -> Finding:
    if found.store_error:
        return _broken_store(found.store_error)
    slow = " (slow: is it far away, or busy?)" if found.store_latency_s > _SLOW_STORE_S else ""
    return Finding("store", True, f"takes writes, in {found.store_latency_s * 1e3:.1f} ms{slow}")


def _broken_store(error: str) -> Finding:
    remedies = {  # by what is in the message
        "maxmemory": "It is full: give Redis more memory (maxmemory), or delete experiments",
        "read only": "It is read-only: is --redis-url a replica? Name the primary",
        "NOREPLICAS": "It takes no writes without its replicas: start them, or lower min-replicas-to-write",
        "MISCONF": "It can't write its file: is its disk full?",
        "Authentication required": "It asks for a password: put it into --redis-url or --redis-password-file",
        "username-password": "The password is wrong: mend --redis-url or --redis-password-file",
    }
    remedy = next((remedies[sign] for sign in remedies if sign in error), "Is Redis running, where --redis-url says?")
    return Finding("store", False, f"the server can't use its store: {error.rstrip('.')}. {remedy}")


def _latency(client: Client) -> Finding:
    times_s = []
    for _ in range(_NUM_CALLS):
        began_s = time.monotonic()
        client.server_status()
        times_s.append(time.monotonic() - began_s)
    return Finding("latency", True, f"{statistics.median(times_s) * 1e3:.1f} ms a call (median of {_NUM_CALLS})")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:,.1f} GiB"
