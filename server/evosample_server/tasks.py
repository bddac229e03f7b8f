"""Tasks that are to end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any


async def cancelled(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks, and return when all have ended."""
    pending = {task for task in tasks if not task.done()}
    while pending:  # redis-py may swallow a cancellation while it connects
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=0.2)
