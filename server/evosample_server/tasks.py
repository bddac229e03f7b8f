"""Tasks that are to end, and work that is to leave the event loop alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")
FEW_ROWS = 2**15
"""Work on no more rows takes less time than changing threads, or asking the store once more."""


async def in_thread(num_rows: int, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Work on so many rows, in a thread; on few rows right here."""
    if num_rows <= FEW_ROWS:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)


async def cancelled(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks, and return when all have ended."""
    pending = {task for task in tasks if not task.done()}
    while pending:  # redis-py may swallow a cancellation while it connects
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=0.2)
