"""The turn of an epoch: fold the losses of one into the scores, plan the next."""

from __future__ import annotations

import asyncio
import secrets
from collections import defaultdict
from contextlib import suppress
from weakref import WeakValueDictionary

import structlog
from redis.exceptions import RedisError

from evosample.sampling import fold_epoch, initial_scores, plan_epoch
from evosample.wire import ExperimentName, ExperimentState
from evosample_server.store import Head, RowCounts, Store

_log = structlog.get_logger()

_LOCK_TTL_S = 10.0
_POLL_INTERVAL_S = 0.1


class Planner:
    """Makes the turns of all experiments, on whichever server someone waits for one.

    Every step of a turn is a deterministic function of what is committed, and the commit compares the head with what
    was read: two planners at once, or one that dies half way or wakes up late, do no harm.
    """

    def __init__(self, store: Store, tasks: asyncio.TaskGroup) -> None:
        self._store = store
        self._tasks = tasks
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._turned: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    def start_turn(self, head: Head) -> None:
        """Begin a turn that nobody here waits for."""
        self._tasks.create_task(self._turn_in_background(head))

    async def _turn_in_background(self, head: Head) -> None:
        # Whoever waits for the epoch tries again, and sees what fails; a task group's task must not raise.
        try:
            await self.turn(head)
        except RedisError as error:
            _log.warning("turn failed for now", experiment=head.name.name, epoch=head.epoch, cause=str(error))
        except Exception:  # noqa: BLE001  # whatever it is, it is logged and met again
            _log.exception("turn failed", experiment=head.name.name, epoch=head.epoch)

    async def wait(self, head: Head) -> None:
        """Return soon after the experiment may have changed: at once where this server changed it."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._turned[head.uid].wait(), _POLL_INTERVAL_S)

    async def settled(self, name: ExperimentName) -> Head | None:
        """The head, after making the turn that is due, if one is."""
        while True:
            head = await self._store.head(name)
            if head is None or head.state in ("open", "finished"):
                return head
            if not await self.turn(head):
                await self.wait(head)

    async def turn(self, head: Head) -> bool:
        """Make the turn that `head` is due; False if someone else is at it."""
        lock = self._locks.get(head.uid)
        if lock is None:
            lock = self._locks[head.uid] = asyncio.Lock()
        async with lock:
            current = await self._store.head(head.name)
            if current is None or current.identity() != head.identity():
                return True
            token = secrets.token_hex(8)
            if not await self._store.lock_turn(head, token, _LOCK_TTL_S):
                return False
            renewal = asyncio.create_task(self._renew_lock(head, token))
            try:
                await self._turn(head)
            finally:
                renewal.cancel()
                await self._store.unlock_turn(head, token)
        self._turned.pop(head.uid, asyncio.Event()).set()
        return True

    async def _renew_lock(self, head: Head, token: str) -> None:
        while True:
            await asyncio.sleep(_LOCK_TTL_S / 3)
            await self._store.lock_turn(head, token, _LOCK_TTL_S)

    async def _turn(self, head: Head) -> None:
        store, spec = self._store, head.spec
        epoch, plan_id = head.epoch, head.plan_id
        is_replan = head.state == "unplanned" and bool(plan_id)  # someone went back to an epoch that kept its scores
        if is_replan:
            scores, row_counts = (
                await store.read_scores(head, plan_id),
                (await store.plan_info(head, plan_id)).row_counts,
            )
        else:
            plan_id = secrets.token_hex(8)
            if head.state == "unplanned":
                scores, row_counts = await asyncio.to_thread(initial_scores, spec.num_samples), RowCounts()
            else:
                losses = await store.read_losses(head)
                prior = await store.read_scores(head, head.plan_id)
                table = await store.read_table(head, 0, len(losses))
                scores, counts = await asyncio.to_thread(fold_epoch, spec, prior, table.sample_ids, losses)
                so_far = (await store.plan_info(head, head.plan_id)).row_counts
                row_counts = RowCounts(*(before + new for before, new in zip(so_far, counts, strict=True)))
                epoch += 1
            if not await store.register_plan(head, plan_id, epoch) or not await store.write_scores(
                head, plan_id, scores
            ):
                return
        is_last = epoch == spec.num_epochs
        if not is_last:
            table = await asyncio.to_thread(plan_epoch, spec, epoch, scores)
            if not await store.write_table(head, plan_id, table):
                return
        state: ExperimentState = "finished" if is_last else "open"
        if not await store.commit(head, epoch=epoch, plan_id=plan_id, state=state, row_counts=row_counts):
            await store.collect(head, lost_plan=plan_id)
            return
        _log.info("epoch planned", experiment=head.name.name, epoch=epoch, state=state, **row_counts._asdict())
        current = await store.head(head.name)
        if current is not None and current.uid == head.uid:
            await store.collect(current)
