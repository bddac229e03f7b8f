"""The turn of an epoch: fold the losses of one into the scores, plan the next."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import suppress
from weakref import WeakValueDictionary

import structlog
from redis.exceptions import RedisError

from evosample.errors import EpochClosedError
from evosample.sampling import Scores, Table, count_new, fold_epoch, initial_scores, plan_epoch, table_checksum
from evosample.wire import ExperimentName, ExperimentState
from evosample_server.store import Head, RowCounts, Store

_log = structlog.get_logger()

_LOCK_TTL_S = 3.0
_POLL_INTERVAL_S = 1.0  # should an announcement get lost
_LISTEN_AGAIN_S = 1.0


class Planner:
    """Makes the turns of all experiments, on whichever server someone waits for one.

    Every step of a turn is a deterministic function of what is committed, and the commit compares the head with what
    was read: two planners at once, or one that dies half way or wakes up late, do no harm.
    """

    def __init__(self, store: Store, tasks: asyncio.TaskGroup) -> None:
        self._store = store
        self._tasks = tasks
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._changed: WeakValueDictionary[str, asyncio.Event] = WeakValueDictionary()

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

    async def listen(self) -> None:
        """Wake who waits for an experiment when any server announces that its head has changed."""
        while True:
            try:
                async for uid in self._store.changes():
                    self._wake(uid)
            except RedisError as error:
                _log.debug("cut off from announcements", cause=str(error))
            await asyncio.sleep(_LISTEN_AGAIN_S)

    def _wake(self, uid: str) -> None:
        changed = self._changed.pop(uid, None)
        if changed is not None:
            changed.set()

    def change_of(self, uid: str) -> asyncio.Event:
        """What is set when the experiment's head changes after this call: take it before reading the head."""
        changed = self._changed.get(uid)
        if changed is None:
            changed = self._changed[uid] = asyncio.Event()
        return changed

    async def wait(self, changed: asyncio.Event) -> None:
        """Return once it is set, or after a second."""
        with suppress(TimeoutError):
            await asyncio.wait_for(changed.wait(), _POLL_INTERVAL_S)

    async def announce(self, uid: str) -> None:
        """Wake who waits for an experiment here and on all other servers: its head has changed."""
        self._wake(uid)
        await self._store.announce(uid)

    async def settled(self, name: ExperimentName) -> Head | None:
        """The head, after making the turn that is due, if one is."""
        while True:
            head = await self._store.head(name)
            if head is None or head.state in ("open", "finished"):
                return head
            changed = self.change_of(head.uid)
            if not await self.turn(head):
                await self.wait(changed)

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
            except EpochClosedError:  # another server has made it, and removed what it no longer needs
                return True
            finally:
                renewal.cancel()
                await self._store.unlock_turn(head, token)
        await self.announce(head.uid)
        return True

    async def _renew_lock(self, head: Head, token: str) -> None:
        while True:
            await asyncio.sleep(_LOCK_TTL_S / 3)
            await self._store.lock_turn(head, token, _LOCK_TTL_S)

    async def _turn(self, head: Head) -> None:
        store, spec = self._store, head.spec
        epoch, plan_id = head.epoch, head.plan_id
        table_before: Table | None = None
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
                table_before = await store.read_table(head, 0, len(losses))
                scores, counts = await asyncio.to_thread(fold_epoch, spec, prior, table_before.sample_ids, losses)
                so_far = (await store.plan_info(head, head.plan_id)).row_counts
                row_counts = RowCounts(*(before + new for before, new in zip(so_far, counts, strict=True)))
                epoch += 1
            if not await store.register_plan(head, plan_id, epoch) or not await store.write_scores(
                head, plan_id, scores
            ):
                return
        await self._plan(head, epoch, plan_id, scores, row_counts, table_before=table_before)

    async def import_scores(self, head: Head, scores: Scores) -> bool:
        """Put scores in the place of those an experiment starts with; False if its head has changed meanwhile."""
        plan_id = secrets.token_hex(8)
        is_registered = await self._store.register_plan(head, plan_id, head.epoch)
        if not is_registered or not await self._store.write_scores(head, plan_id, scores):
            return False
        is_committed = await self._plan(head, head.epoch, plan_id, scores, RowCounts(), is_imported=True)
        await self.announce(head.uid)
        return is_committed

    async def _plan(
        self,
        head: Head,
        epoch: int,
        plan_id: str,
        scores: Scores,
        row_counts: RowCounts,
        *,
        table_before: Table | None = None,
        is_imported: bool = False,
    ) -> bool:
        """Write the table of `epoch` beside its scores, and move the head to it; False if another got there first."""
        store, spec = self._store, head.spec
        is_last = epoch == spec.num_epochs
        crc = 0
        new_rows = None
        if not is_last:
            table = await asyncio.to_thread(plan_epoch, spec, epoch, scores)
            if not await store.write_table(head, plan_id, table):
                return False
            crc = await asyncio.to_thread(table_checksum, *table)
            if table_before is not None:
                new_rows = await asyncio.to_thread(
                    count_new, spec.num_samples, table_before.sample_ids, table.sample_ids
                )
        state: ExperimentState = "finished" if is_last else "open"
        if not await store.commit(
            head,
            epoch=epoch,
            plan_id=plan_id,
            state=state,
            table_checksum=crc,
            row_counts=row_counts,
            new_rows=new_rows,
            is_imported=is_imported,
        ):
            await store.collect(head, lost_plan=plan_id)
            return False
        _log.info("epoch planned", experiment=head.name.name, epoch=epoch, state=state, **row_counts._asdict())
        current = await store.head(head.name)
        if current is not None and current.uid == head.uid:
            await store.collect(current)
        return True
