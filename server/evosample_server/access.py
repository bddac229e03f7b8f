"""Who may call what: callers by their tokens, and the role that each method needs."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import hmac
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable
from contextvars import ContextVar
from ipaddress import IPv4Address, IPv6Network, ip_address
from typing import Any, NamedTuple
from urllib.parse import unquote
from weakref import WeakValueDictionary

import structlog
from redis.exceptions import RedisClusterException, RedisError

from evosample.errors import (
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from evosample.wire import DEFAULT_PROJECT, ROLES, Role, Token
from evosample_server.tokens import Tokens

_log = structlog.get_logger()

OPEN_SERVICES = ("/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/")
"""What anybody may call: it tells whether the server is well, and what is public anyway."""

DASHBOARD = "dashboard"
_SELECTION, _ADMINISTRATION = "/evosample.v1.SelectionService/", "/evosample.v1.AdministrationService/"
ROLE_NEEDED: dict[str, Role] = {
    DASHBOARD: "reader",
    f"{_SELECTION}GetExperiment": "reader",
    f"{_SELECTION}ListExperiments": "reader",
    f"{_SELECTION}ExportScores": "reader",
    f"{_SELECTION}WatchExperiment": "reader",
    f"{_ADMINISTRATION}GetServer": "reader",
    f"{_SELECTION}CreateExperiment": "writer",
    f"{_SELECTION}JoinRun": "writer",
    f"{_SELECTION}StreamEpoch": "writer",
    f"{_SELECTION}ReportLosses": "writer",
    f"{_SELECTION}SelectMiniBatch": "writer",
    f"{_SELECTION}FinishEpoch": "writer",
    f"{_SELECTION}PinEpoch": "writer",
    f"{_SELECTION}ImportScores": "writer",
    f"{_SELECTION}SetGroups": "writer",
    f"{_SELECTION}ExtendDataset": "writer",
    f"{_SELECTION}DeleteExperiment": "administrator",
    f"{_SELECTION}ForceFinishEpoch": "administrator",
    f"{_ADMINISTRATION}CreateToken": "administrator",
    f"{_ADMINISTRATION}ListTokens": "administrator",
    f"{_ADMINISTRATION}RevokeToken": "administrator",
}
"""Of the dashboard, and of methods by full name. What is not in here is refused to everybody."""

_NAMES_NO_PROJECT = (f"{_ADMINISTRATION}GetServer",)

_ROOT = Token(
    "root", "", "administrator", "", create_time=datetime.datetime.fromtimestamp(0, datetime.UTC), expire_time=None
)
_BELIEVED_S = 1.0  # for so long the store is not asked again about a token
_MAX_KNOWN = 10_000
_WINDOW_S = 60.0
_MAX_FAILURES = 10  # of a host in a window

_HOW = (
    "Pass one with connect(token=...), in the environment variable EVOSAMPLE_TOKEN, or in a file that "
    "EVOSAMPLE_TOKEN_FILE names; in other languages in the metadata `authorization: Bearer TOKEN`. A project's "
    "administrator makes them with `evosample token create`"
)


class Caller(NamedTuple):
    """Who calls.

    Attributes:
        name: id of the token; "root", or "open" where none is needed.
        project: the only one that may be named; empty: any.
        peer: address, as gRPC gives it, but with the brackets of IPv6.
    """

    name: str
    project: str
    role: Role
    peer: str


caller: ContextVar[Caller] = ContextVar("caller")
"""Of the call that is being served."""


def audit(act: str, *, project: str, **what: object) -> None:
    """Log an administrative act of the present caller."""
    by = caller.get()
    _log.info("audit", act=act, by=by.name, project=project, **what, peer=by.peer)


class _Known(NamedTuple):
    """A token that was right when it was looked up."""

    token: Token
    looked_up_s: float


class Access:
    """Tells callers by their tokens.

    Args:
        tokens: those of the store.
        needs_tokens: whether callers need one. If not, everybody is administrator of every project.
        root_token: its holder is administrator of every project.
    """

    def __init__(self, tokens: Tokens, *, needs_tokens: bool, root_token: str | None = None) -> None:
        self.needs_tokens = needs_tokens
        self._tokens = tokens
        self._root_digest = None if root_token is None else _digest(root_token)
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._failures: Counter[str] = Counter()  # by host, in this window
        self._refusals: Counter[str] = Counter()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def admit(self, method: str, metadata: Iterable[tuple[str, str | bytes]], peer: str) -> Caller:
        """The caller of a method, by what came with the call.

        Raises:
            UnauthenticatedError: no token, or none that is valid.
            PermissionDeniedError: the token's role does not allow this method.
            ResourceExhaustedError: too many wrong tokens came from this host.
            UnavailableError: the store can't tell.
        """
        peer = unquote(peer)
        try:
            found = (
                await self._caller(metadata, peer) if self.needs_tokens else Caller("open", "", "administrator", peer)
            )
            _check_role(method, found)
        except (UnauthenticatedError, PermissionDeniedError, ResourceExhaustedError) as error:
            self._note_refusal(method, peer, error)
            raise
        except (RedisError, RedisClusterException) as error:  # nobody knows yet whom it would be told
            _log.warning("the store is away", cause=str(error))
            raise UnavailableError("the server can't use its store: its log says why") from error
        return found

    async def sign_in(self, token: str, host: str) -> Caller | None:
        """Who a token's holder is to the dashboard; None if it is not valid, or not any more.

        Raises:
            ResourceExhaustedError: too many wrong tokens came from this host.
            UnavailableError: the store can't tell.
        """
        peer = f"ipv6:[{host}]:0" if ":" in host else f"ipv4:{host}:0"
        try:
            return await self.admit(DASHBOARD, [("authorization", f"Bearer {token}")], peer)
        except UnauthenticatedError:
            return None

    async def _caller(self, metadata: Iterable[tuple[str, str | bytes]], peer: str) -> Caller:
        presented = _bearer(metadata)
        if not presented:
            raise UnauthenticatedError(f"this server asks for a token, and none came with the call. {_HOW}")
        token = await self._token(_digest(presented), presented, _host(peer))
        if token is None:
            raise UnauthenticatedError(
                f"the token is not valid: no token of this server's store is like it, or it was revoked. {_HOW}"
            )
        if token.has_expired:
            raise UnauthenticatedError(
                f"the token {token.id} expired on {token.expire_time:%Y-%m-%d %H:%M} UTC. {_HOW}"
            )
        return Caller(token.id, token.project, token.role, peer)

    async def _token(self, digest: bytes, presented: str, host: str) -> Token | None:
        """What is known of a token, asking the store now and then; None if it is none, or not any more."""
        known = self._known.get(digest)
        if known is None:
            lock = self._locks.setdefault(host, asyncio.Lock())
            async with lock:  # one by one, or many at once would all come before the first failure is counted
                known = self._known.get(digest) or await self._look_up(digest, presented, host)
        elif time.monotonic() - known.looked_up_s >= _BELIEVED_S:
            known = await self._look_up(digest, presented, host)
        return None if known is None else known.token

    async def _look_up(self, digest: bytes, presented: str, host: str) -> _Known | None:
        if digest not in self._known and self._failures[host] >= _MAX_FAILURES:
            raise ResourceExhaustedError(
                f"{_MAX_FAILURES} calls with wrong tokens came from {host} within a minute: tokens that were not in "
                "use before are taken again when it is over. Is a job running there with a token that was revoked?"
            )
        began_s = time.monotonic()
        is_root = self._root_digest is not None and hmac.compare_digest(digest, self._root_digest)
        token = _ROOT if is_root else await self._tokens.find(presented)
        if token is None:
            self._known.pop(digest, None)
            self._failures[host] += 1
            return None
        known = self._known[digest] = _Known(token, began_s)
        self._known.move_to_end(digest)
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)
        return known

    def _note_refusal(self, method: str, peer: str, error: Exception) -> None:
        host = _host(peer)
        self._refusals[host] += 1
        if self._refusals[host] == 1:
            _log.warning("refused", peer=peer, method=method, why=type(error).__name__)

    async def count_refusals(self) -> None:
        """Begin a new window every minute, for ever, and log how many more calls each host had refused in the last."""
        while True:
            await asyncio.sleep(_WINDOW_S)
            for host, count in self._refusals.items():
                if count > 1:
                    _log.warning("refused in the last minute", peer=host, count=count)
            self._refusals.clear()
            self._failures.clear()


def _check_role(method: str, found: Caller) -> None:
    needed = ROLE_NEEDED.get(method)
    if needed is None:
        raise PermissionDeniedError(f"nobody may call {method}")
    if ROLES.index(found.role) < ROLES.index(needed):
        raise PermissionDeniedError(
            f"{method.rpartition('/')[2]} needs the role {needed}, and the token {found.name} is of a {found.role}: "
            f"ask an administrator of project {found.project!r} for another one"
        )


def confine(method: str, request: Any, by: Caller) -> None:
    """Fill in the project of a request that names none.

    Raises:
        NotFoundError: it names another than the caller's. That says nothing of what that one has.
    """
    if method in _NAMES_NO_PROJECT:
        return
    named = request
    for field in ("member", "ref"):
        named = getattr(named, field, named)
    if not named.project:
        named.project = by.project or DEFAULT_PROJECT
    elif by.project and named.project != by.project:
        raise NotFoundError(
            f"project: the token {by.name} opens project {by.project!r} alone, and nothing of others can be seen with "
            "it. Leave the project out, or pass a token of the other one",
            field="project",
        )


def _bearer(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """The token that came with a call; empty if there is none."""
    for key, value in metadata:
        if key == "authorization" and isinstance(value, str):
            scheme, _, token = value.partition(" ")
            return token.strip() if scheme.lower() == "bearer" else ""
    return ""


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _host(peer: str) -> str:
    """A peer's address without its port, of IPv6 the network: one host has all of it. Unix sockets are all one."""
    kind, _, rest = peer.partition(":")
    if not kind.startswith("ipv"):
        return kind
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    if not host:  # it has gone before the dashboard could ask where it is
        return ""
    address = ip_address(host)
    if isinstance(address, IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or IPv6Network((int(address), 64), strict=False))
