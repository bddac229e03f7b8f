"""What the visitor of a page may see, asked anew each time."""

from __future__ import annotations

import asyncio
from urllib.parse import quote, urlencode

from starlette.requests import HTTPConnection

from evosample.errors import NotFoundError
from evosample.figures import merged_epochs
from evosample.sampling import EpochSummary, InvalidValue, check_name
from evosample.wire import DEFAULT_PROJECT, ExperimentName, Watched
from evosample_server.dashboard.sessions import Sessions
from evosample_server.experiments import Experiments

NO_PAST_EPOCH = 2**32
"""As first_epoch: from which on there is none."""


class SignedOut(Exception):
    """The session has ended: by signing out, with its token, or with the server."""


class Visit:
    """One visit of one page.

    Args:
        connection: the request for the page.
        project: what it is about; empty: the project that the visitor's token opens or, where it opens all, "default".

    Attributes:
        may_switch: other projects may be seen, too.
    """

    def __init__(self, experiments: Experiments, sessions: Sessions, connection: HTTPConnection, project: str) -> None:
        self.project = project
        self.may_switch = True
        self._experiments = experiments
        self._sessions = sessions
        self._connection = connection

    @property
    def can_sign_out(self) -> bool:
        """Whether there is a session to end."""
        return self._sessions.are_needed

    def sign_out(self) -> None:
        """End the session."""
        self._sessions.end(self._connection)

    async def names(self) -> list[str]:
        """The names of the project's experiments."""
        await self.check()
        return await self._experiments.names(self.project)

    async def watch(self, name: str, *, uid: str = "", first_epoch: int = NO_PAST_EPOCH) -> Watched:
        """An experiment's figures now; see `Experiments.watch`."""
        await self.check()
        return await self._figures(name, uid, first_epoch)

    async def watch_all(self, names: list[str]) -> dict[str, Watched]:
        """The figures of several experiments, of those that are still there."""
        await self.check()
        found = await asyncio.gather(*map(self._figures, names), return_exceptions=True)
        for figures in found:
            if isinstance(figures, BaseException) and not isinstance(figures, NotFoundError):
                raise figures
        return {name: figures for name, figures in zip(names, found, strict=True) if isinstance(figures, Watched)}

    async def check(self) -> None:
        """Raises SignedOut, or NotFoundError if the project is another one than the visitor's."""
        grant = await self._sessions.grant(self._connection)
        if grant is None:
            raise SignedOut
        self.may_switch = not grant.project
        self.project = self.project or grant.project or DEFAULT_PROJECT
        if grant.project and grant.project != self.project:
            raise _not_found("project", self.project)

    async def _figures(self, name: str, uid: str = "", first_epoch: int = NO_PAST_EPOCH) -> Watched:
        try:
            checked = ExperimentName(check_name("project", self.project), check_name("name", name))
        except InvalidValue as error:
            raise _not_found("experiment", name) from error
        watching = self._experiments.watch(checked, uid, interval_ms=1000, first_epoch=first_epoch, once=True)
        return await anext(watching)

    def link(self, path: str, **query: str) -> str:
        """Where a page about the same project is."""
        if self.may_switch and self.project != DEFAULT_PROJECT:
            query["project"] = self.project
        return quote(path) + (f"?{urlencode(query)}" if query else "")


class Followed:
    """An experiment that a page follows: past epochs are read once.

    Attributes:
        watched: its latest figures; None before the first `read`.
        epochs: those that have ended, ascending.
    """

    def __init__(self, visit: Visit, name: str) -> None:
        self.name = name
        self.watched: Watched | None = None
        self.epochs: list[EpochSummary] = []
        self._visit = visit
        self._first_epoch = 0

    async def read(self) -> Watched:
        """The figures as they are now. Raises NotFoundError, also if another experiment has taken the name."""
        before = self.watched
        uid = before.status.uid if before is not None else ""
        watched = await self._visit.watch(self.name, uid=uid, first_epoch=self._first_epoch)
        self.epochs = merged_epochs(self.epochs, watched)
        # A new run may have gone back and forth again: what it went through again is told anew.
        is_new_run = before is not None and before.status.generation != watched.status.generation
        self._first_epoch = 0 if is_new_run else watched.status.epoch
        self.watched = watched
        return watched


def _not_found(what: str, name: str) -> NotFoundError:
    return NotFoundError(f"there is no {what} {name!r}", field=f"ref.{what}")
