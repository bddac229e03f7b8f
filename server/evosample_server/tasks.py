"""Cancelling tasks; running work in threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")
FEW_ROWS = 2**13
"""Array work on no more rows takes the event loop a millisecond at most, hardly more than some changes of threads."""


async def in_thread(num_rows: float, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Run array work on so many rows in a thread; on few rows in the event loop."""
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
