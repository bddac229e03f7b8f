"""Who is signed in: browsers' sessions, in this server's memory."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

from starlette.requests import HTTPConnection

_MAX_SESSIONS = 10_000
_MAX_SESSIONS_OF_TOKEN = 100  # several people may share one
_MAX_AGE_S = 7 * 86_400.0


class Grant(Protocol):
    """What a token opens."""

    @property
    def project(self) -> str:
        """The only project to be seen; empty: any."""


SignIn = Callable[[str, str], Awaitable[Grant | None]]
"""What a token opens, asked with the token and the host that shows it; None if it opens nothing, or no longer.

It is asked again whenever a page is loaded or brought up to date, so it should answer at once about a token that it has
seen lately. It raises an error if it can't tell, of which the visitor is told."""


class _Everything(NamedTuple):
    project: str = ""


class _Session(NamedTuple):
    token: str
    began_s: float


class Sessions:
    """Sessions by their ids, which nobody can guess. A session ends with its token, and after a week.

    Args:
        sign_in: what a token opens; None: nobody has to sign in, and everybody may see everything.
        cookie: name of the cookie with a session's id.
    """

    def __init__(self, sign_in: SignIn | None, *, cookie: str) -> None:
        self.cookie = cookie
        self._sign_in = sign_in
        self._sessions: OrderedDict[str, _Session] = OrderedDict()

    @property
    def are_needed(self) -> bool:
        """Whether one has to sign in."""
        return self._sign_in is not None

    async def begin(self, token: str, connection: HTTPConnection) -> str | None:
        """The id of a new session; None if the token opens nothing."""
        if self._sign_in is None or await self._sign_in(token, _host(connection)) is None:
            return None
        same = [session_id for session_id, session in self._sessions.items() if session.token == token]
        if len(same) >= _MAX_SESSIONS_OF_TOKEN:
            del self._sessions[same[0]]
        session_id = secrets.token_urlsafe(32)
        self._sessions[session_id] = _Session(token, time.monotonic())
        if len(self._sessions) > _MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return session_id

    async def grant(self, connection: HTTPConnection) -> Grant | None:
        """What the session of a request may see now; None if there is none, or it has ended."""
        if self._sign_in is None:
            return _Everything()
        session = self._sessions.get(connection.cookies.get(self.cookie, ""))
        if session is None:
            return None
        is_young = time.monotonic() - session.began_s < _MAX_AGE_S
        found = await self._sign_in(session.token, _host(connection)) if is_young else None
        if found is None:
            self.end(connection)
        return found

    def are_same(self, one: HTTPConnection, other: HTTPConnection) -> bool:
        """Whether two requests came in the same session, or both in none."""
        return one.cookies.get(self.cookie) == other.cookies.get(self.cookie)

    def end(self, connection: HTTPConnection) -> None:
        """End the session of a request, if there is one."""
        self._sessions.pop(connection.cookies.get(self.cookie, ""), None)


def _host(connection: HTTPConnection) -> str:
    return connection.client.host if connection.client is not None else ""
