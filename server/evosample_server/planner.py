"""The turn of an epoch: fold the losses of one into the scores, plan the next."""

from __future__ import annotations

import asyncio
import functools
import math
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from weakref import WeakValueDictionary

import numpy as np
import structlog
from numpy.typing import NDArray
from opentelemetry import trace
from redis.exceptions import RedisError

from evosample.errors import EpochClosedError, FailedPreconditionError
from evosample.sampling import (
    POLICIES,
    EpochSummary,
    ExperimentSpec,
    Groups,
    GroupSummary,
    InvalidValue,
    Mixture,
    Policy,
    Scores,
    Table,
    fold_epoch,
    group_sizes,
    initial_scores,
    mask_of,
    mean_of_finite,
    plan_epoch,
    starting_scores,
    summarize_epoch,
    summarize_groups,
    table_checksum,
)
from evosample.wire import ExperimentName, ExperimentState
from evosample_server.metrics import Metrics
from evosample_server.store import Head, RowCounts, Store
from evosample_server.tasks import FEW_ROWS, cancelled, in_thread

_log = structlog.get_logger()

_LOCK_TTL_S = 3.0
_POLL_INTERVAL_S = 1.0  # should an announcement get lost
_MAX_POLL_INTERVAL_S = 10.0
_MAX_POLLS_PER_S = 250  # of all who wait here together
_LISTEN_AGAIN_S = 1.0


class Planner:
    """Makes the turns of all experiments, on whichever server someone waits for one.

    Every step of a turn is a deterministic function of what is committed, and the commit compares the head with what
    was read: two planners at once, or one that dies half way or wakes up late, do no harm.
    """

    def __init__(self, store: Store, tasks: asyncio.TaskGroup, *, metrics: Metrics, tracer: trace.Tracer) -> None:
        self._store = store
        self._tasks = tasks
        self._metrics = metrics
        self._tracer = tracer
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._changed: WeakValueDictionary[str, asyncio.Event] = WeakValueDictionary()
        self._num_waiting = 0
        self._lookouts: set[str] = set()  # uids of the experiments for which one of those that wait looks out

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

    async def wait(self, head: Head, changed: asyncio.Event) -> None:
        """Return once the head has changed, or to look for oneself: an announcement may get lost.

        Of those that wait for an experiment one looks out for all, every second; the others look the more seldom the
        more wait here.
        """
        is_lookout = head.uid not in self._lookouts
        others_s = min(max(_POLL_INTERVAL_S, self._num_waiting / _MAX_POLLS_PER_S), _MAX_POLL_INTERVAL_S)
        self._num_waiting += 1
        if is_lookout:
            self._lookouts.add(head.uid)
        try:
            async with asyncio.timeout(_POLL_INTERVAL_S if is_lookout else others_s):
                await changed.wait()
        except TimeoutError:
            if is_lookout:
                current = await self._store.head(head.name)
                if current is None or current.identity() != head.identity():
                    self._wake(head.uid)
        finally:
            self._num_waiting -= 1
            if is_lookout:
                self._lookouts.discard(head.uid)

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
                await self.wait(head, changed)

    async def turn(self, head: Head) -> bool:
        """Make the turn that `head` is due; False if someone else is at it."""
        lock = self._locks.get(head.uid)
        if lock is None:
            lock = self._locks[head.uid] = asyncio.Lock()
        async with lock:
            token = secrets.token_hex(8)
            has_lock, current = await asyncio.gather(
                self._store.lock_turn(head, token, _LOCK_TTL_S), self._store.head(head.name)
            )
            if current is None or current.identity() != head.identity():
                if has_lock:
                    await self._store.unlock_turn(head, token)
                return True
            if not has_lock:
                return False
            renewal = asyncio.create_task(self._renew_lock(head, token))
            outcome = "interrupted"
            try:
                with self._span("turn", project=head.name.project, experiment=head.name.name, epoch=head.epoch):
                    outcome = "made" if await self._turn(current, token) else "overtaken"
            except EpochClosedError:  # another server has made it, and removed what it no longer needs
                outcome = "overtaken"
                return True
            except Exception:
                outcome = "failed"
                raise
            finally:
                self._metrics.turns.labels(outcome).inc()
                renewal.cancel()
                if outcome != "made":  # else the commit has given the lock back
                    await self._store.unlock_turn(head, token)
        await self.announce(head.uid)
        return True

    async def _renew_lock(self, head: Head, token: str) -> None:
        while True:
            await asyncio.sleep(_LOCK_TTL_S / 3)
            await self._store.renew_turn_lock(head, token, _LOCK_TTL_S)

    @contextmanager
    def _phase(self, phase: str) -> Iterator[None]:
        with self._span(phase), self._metrics.turn_seconds.labels(phase).time():
            yield

    def _span(self, name: str, **attributes: str | int) -> AbstractContextManager[trace.Span]:
        named = {f"evosample.{name}": value for name, value in attributes.items()}
        return self._tracer.start_as_current_span(name, attributes=named)

    async def _turn(self, head: Head, lock_token: str) -> bool:
        """Make the turn; False if another got there first."""
        store, spec = self._store, head.spec
        epoch, plan_id = head.epoch, head.plan_id
        was_there: NDArray[np.bool_] | None = None
        summarize: Callable[[], EpochSummary] | None = None
        is_registered = False
        next_spec = self.next_spec(head)
        groups, mixture = await self._read_groups(head, plan_id, next_spec.num_samples)
        is_replan = head.state == "unplanned" and bool(plan_id)  # someone went back to an epoch that kept its scores
        if is_replan:
            next_spec = spec
            with self._phase("read"):
                scores = await store.read_scores(head, plan_id)
                info = await store.plan_info(head, plan_id)
            row_counts = info.row_counts
            if info.groups_id != head.groups_id:  # which makes it another table: a plan's blocks never change
                plan_id, is_replan = secrets.token_hex(8), False
        else:
            plan_id = secrets.token_hex(8)
            if head.state == "unplanned":
                scores, row_counts = (
                    await asyncio.to_thread(initial_scores, spec.num_samples, spec.policy.columns),
                    RowCounts(),
                )
            else:
                with self._phase("read"):
                    info, is_registered = await asyncio.gather(
                        store.plan_info(head, head.plan_id), store.register_plan(head, plan_id, epoch + 1)
                    )
                    report = await store.read_report(head, info)
                    sample_ids = await store.take_sample_ids(head)
                    scores = await store.read_scores(head, head.plan_id)
                    so_far = info.row_counts
                with self._phase("fold"), _blaming(spec.policy):
                    counts = await in_thread(_rows_of_work(spec), fold_epoch, spec, scores, sample_ids, report)
                    by_group: tuple[GroupSummary, ...] = ()
                    if groups is not None:
                        first_groups = groups.of_first(spec.num_samples)
                        by_group = await asyncio.to_thread(
                            summarize_groups, spec, first_groups, mixture, sample_ids, report.losses
                        )
                summarize = functools.partial(
                    summarize_epoch,
                    epoch,
                    head.shape,
                    await in_thread(len(sample_ids), mean_of_finite, report.losses),
                    counts,
                    scores,
                    trained_before=so_far.trained_rows,
                    groups=by_group,
                )
                was_there = await in_thread(spec.num_samples, mask_of, next_spec.num_samples, sample_ids)
                del report, sample_ids  # of a large dataset they are large
                if mixture is not None and spec.mixture is not None:
                    excess = np.array([group.excess_loss for group in by_group])
                    mixture = spec.mixture.next_weights(mixture, excess)
                row_counts = RowCounts(
                    *(before + new for before, new in zip(so_far, (*counts, head.shape.num_trained), strict=True))
                )
                epoch += 1
            n = next_spec.num_samples
            scores = await in_thread(n, starting_scores, scores, n, spec.policy.columns)
        if groups is not None:
            groups = groups.of_first(next_spec.num_samples)
        return await self._plan(
            head,
            epoch,
            plan_id,
            scores,
            row_counts,
            next_spec,
            groups,
            mixture,
            has_scores=is_replan,
            is_registered=is_registered,
            was_there=was_there,
            summarize=summarize,
            lock_token=lock_token,
        )

    @staticmethod
    def next_spec(head: Head) -> ExperimentSpec:
        """The spec of the next epoch to be planned: with the samples that were added, once their groups are known."""
        if head.groups_spec is None or head.groups_size >= head.extended_spec.num_samples:
            return head.extended_spec
        return max(head.groups_spec, head.spec, key=lambda spec: spec.num_samples)

    async def _read_groups(
        self, head: Head, plan_id: str, num_samples: int
    ) -> tuple[Groups | None, NDArray[np.float64] | None]:
        """The groups of so many samples, and the mixture that a plan was made with, or that the first one is made with.

        None where there is no such thing.
        """
        if not head.groups_id:
            return None, None
        with self._phase("read"):
            groups = await self._store.read_groups(head, num_samples)
            mixture = (await self._store.plan_info(head, plan_id)).mixture if plan_id else None
        spec = head.spec
        is_by_size = spec.mixture == Mixture()  # of the groups as they are now
        if (mixture is None or is_by_size) and groups is not None and spec.mixture is not None:
            mixture = spec.mixture.first_weights(group_sizes(groups.ids, spec.num_groups))
        return groups, mixture

    async def plan_first(self, head: Head, scores: Scores, *, is_imported: bool) -> bool:
        """Plan an experiment's first epoch anew, from these scores; False if its head has changed meanwhile."""
        spec = self.next_spec(head)
        scores = await asyncio.to_thread(starting_scores, scores, spec.num_samples, spec.policy.columns)
        groups, mixture = await self._read_groups(head, "", spec.num_samples)
        is_committed = await self._plan(
            head, head.epoch, secrets.token_hex(8), scores, RowCounts(), spec, groups, mixture, is_imported=is_imported
        )
        await self.announce(head.uid)
        return is_committed

    async def _plan(
        self,
        head: Head,
        epoch: int,
        plan_id: str,
        scores: Scores,
        row_counts: RowCounts,
        spec: ExperimentSpec,
        groups: Groups | None,
        mixture: NDArray[np.float64] | None,
        *,
        has_scores: bool = False,
        is_registered: bool = False,
        was_there: NDArray[np.bool_] | None = None,
        summarize: Callable[[], EpochSummary] | None = None,
        is_imported: bool = False,
        lock_token: str = "",
    ) -> bool:
        """Write the scores and the table of `epoch`, and move the head to it.

        False if another got there first, or if the store has lost some of it.

        Args:
            has_scores: whether the store has this plan's scores already.
            is_registered: whether its columns can be written.
            was_there: bool [n], which samples the epoch before had; None: there was none.
            summarize: sums up the epoch before.
            lock_token: of the turn's lock, which the commit gives back; empty: there is none.
        """
        store = self._store
        is_last = epoch == spec.num_epochs
        shape = table = counting = None
        if not (has_scores or is_registered or await store.register_plan(head, plan_id, epoch)):
            return False
        # While the table is made, the store takes the scores, and another thread sums up the epoch before. Few scores
        # are written together with the table.
        num_rows = _rows_of_work(spec)
        is_apart = not has_scores and num_rows > FEW_ROWS
        writing = None
        if is_apart:
            writing = asyncio.create_task(store.write(head, plan_id, scores=scores))
        summing = None if summarize is None else asyncio.create_task(in_thread(spec.num_samples, summarize))
        try:
            if not is_last:
                with self._phase("plan"), _blaming(spec.policy):
                    table, shape = await in_thread(num_rows, plan_epoch, spec, epoch, scores, groups, mixture)
                counting = asyncio.create_task(in_thread(spec.num_samples, _checksum_and_new_rows, table, was_there))
            with self._phase("write"):
                if writing is not None and not await writing:
                    return False
                rest = None if has_scores or is_apart else scores
                if not await store.write(head, plan_id, scores=rest, table=table):
                    return False
            crc, new_rows = (0, None) if counting is None else await counting
            folded = None if summing is None else await summing
        finally:
            await cancelled(task for task in (writing, summing, counting) if task is not None)
        state: ExperimentState = "finished" if is_last else "open"
        with self._phase("commit"):
            is_committed = await store.commit(
                head,
                epoch=epoch,
                plan_id=plan_id,
                state=state,
                table_checksum=crc,
                spec=spec,
                shape=shape,
                row_counts=row_counts,
                new_rows=new_rows,
                mixture=mixture,
                folded=folded,
                is_imported=is_imported,
                lock_token=lock_token,
            )
        if not is_committed:
            await store.collect(head, lost_plan=plan_id)
            return False
        _log.info("epoch planned", experiment=head.name.name, epoch=epoch, state=state, **row_counts._asdict())
        with self._phase("collect"):
            current = await store.head(head.name)
            if current is not None and current.uid == head.uid:
                await store.collect(current)
        return True


def _rows_of_work(spec: ExperimentSpec) -> float:
    """Rows by which folding and planning are measured; infinite where it may take long however few there are."""
    is_simple = type(spec.policy) in POLICIES.values() and not spec.shard_sizes and not spec.num_groups
    return spec.num_samples if is_simple else math.inf


def _checksum_and_new_rows(table: Table, was_there: NDArray[np.bool_] | None) -> tuple[int, int | None]:
    """A table's checksum, and how many of its rows the epoch before did not have; None: there was none."""
    crc = table_checksum(*table)
    return crc, None if was_there is None else int(np.count_nonzero(~was_there[table.sample_ids]))


@contextmanager
def _blaming(policy: Policy) -> Iterator[None]:
    """Say whose fault it is if a policy of another package fails."""
    try:
        yield
    except InvalidValue:
        raise
    except Exception as error:
        if type(policy) in POLICIES.values():
            raise
        _log.exception("a policy has failed", policy=type(policy).__name__)
        raise FailedPreconditionError(
            f"the policy {type(policy).__name__} has failed: {error!r}. The server's log has the traceback; a policy's "
            "methods are pure functions on arrays, which can be tried without a server"
        ) from error
