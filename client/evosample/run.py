"""A rank's way through the epochs: ids come in ahead, mini-batches are drawn here, losses leave in the background."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

import grpc
import numpy as np

from evosample.epoch import Chunk, Epoch
from evosample.errors import (
    DataLossError,
    EpochClosedError,
    FailedPreconditionError,
    InternalError,
    StoreBehindError,
    SupersededError,
    UnavailableError,
    UsageError,
    WaitTimeoutError,
)
from evosample.rows import Rows
from evosample.rpc import Connection, from_grpc
from evosample.sampling import (
    ExperimentSpec,
    RandomSubset,
    Uniform,
    checksum,
    initial_scores,
    part,
    plan_epoch,
    sample_id_dtype,
)
from evosample.v1 import selection_pb2 as pb
from evosample.wire import Position, column, column_bytes

_log = logging.getLogger("evosample")

OnUnavailable = Literal["error", "uniform"]

_BUFFER_BYTES = 64 * 2**20
_BUFFERED_ROW_BYTES = 16  # int64 id, float32 prior score, float32 importance weight
_KEPT_BYTES = 64 * 2**20
_REPORT_BYTES = 2**20
_REPORT_INTERVAL_S = 0.2
_LONGEST_REPORT_INTERVAL_S = 5.0
_REPORTS_A_S = 320  # of all ranks together: a store takes some 3,000 of an experiment
_CHECK_INTERVAL_S = 5.0
_WAIT_LOG_INTERVAL_S = 10.0
_STREAM_TIMEOUT_S = 60.0
_TICK_S = 0.5
_PATIENCE_S = 3.0  # for a server that may just have come back: longer than the pause between two attempts
_CLOSE_TIMEOUT_S = 10.0
_MAX_REJOINS = 10
_MAX_REPORTS_AGAIN = 5
_CLOSED = "the run is closed: its client was closed, or has begun a newer run as the same rank"


class Run:
    """One start of a training job, as one of its ranks: an iterator over the epochs that are left.

    Two threads work in the background: one fetches ids ahead, up to 64 MiB and into the next epoch; one reports losses,
    many steps a message (every 0.2 s; with more than 64 ranks less often, up to every 5 s), and ends epochs. They try
    on for as long as no server answers: only who waits for them gives up at some time. What fails there is raised by
    the next call here.

    If the store loses what it had acknowledged (a fail-over), the reporting thread joins again and sends again what is
    kept: the losses of the current epoch, of the one before, and of earlier ones up to 64 MiB.

    Attributes:
        uid: of the experiment.
        rank, world_size: this process's place in the job.
        generation: number of this run in the experiment, from 1.
        position: the next step whose losses are due.
    """

    def __init__(
        self,
        connection: Connection,
        spec: ExperimentSpec,
        join: pb.JoinRunRequest,
        joined: pb.JoinRunResponse,
        *,
        read_ahead: int,
        wait_timeout_s: float,
        on_unavailable: OnUnavailable,
    ) -> None:
        self.spec = spec
        self.uid = join.ref.uid
        self.rank = join.rank
        self.world_size = join.world_size
        self.read_ahead = read_ahead
        self.num_non_finite = 0
        self._connection = connection
        self._join = join
        interval_s = max(self.world_size / _REPORTS_A_S, _REPORT_INTERVAL_S)
        self._report_interval_s = min(interval_s, _LONGEST_REPORT_INTERVAL_S)
        self._start = Position(joined.position.epoch, joined.position.step)
        self._wait_timeout_s = wait_timeout_s
        self._on_unavailable = on_unavailable
        self._changed = threading.Condition()
        self._became_member(joined)
        self._epochs: deque[Epoch] = deque()  # received, not yet taken
        self._current: Epoch | None = None
        self._reporting: Epoch | None = None  # the one whose losses go out, or went last
        self._asked_for = self._start.epoch  # what the fetching thread waits for, or takes in
        self._kept: dict[int, Epoch] = {}  # what can be sent again
        self._missed: set[int] = set()  # epochs that went on without this rank from beginning to end
        self._uniform_stop = 0  # the epochs before it were begun on draws of our own, while no server answered
        self._behind: FailedPreconditionError | None = None  # why the reporting thread is to join again
        self._num_rejoins = 0
        self._waiting_for: list[int] = []
        self._is_flushing = False
        self._has_ended = False
        self._last_contact_s = time.monotonic()
        self._closing = threading.Event()
        self._pid = os.getpid()
        self._error: BaseException | None = None
        self._call: grpc.Call | None = None
        self._fetching: Epoch | None = None
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"evosample-{work.__name__}", daemon=True)
            for work in (self._fetch, self._report)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    def __iter__(self) -> Iterator[Epoch]:
        return self

    def __next__(self) -> Epoch:
        """The next epoch, once it is planned.

        Raises:
            WaitTimeoutError: that takes too long; names the ranks that it waits for.
            UnavailableError: no server answers, and `on_unavailable` is "error".
        """
        current = self._current
        if current is not None and not current.is_complete:
            raise UsageError(
                f"epoch {current.number} has {current.num_steps} steps, but only the losses of {current.num_consumed} "
                "were handed over: go through all batches of an epoch before taking the next epoch"
            )
        while True:
            epoch = self._next_epoch()
            if epoch is None:
                atexit.unregister(self.close)  # nothing is left to report: who drops the run frees it
                raise StopIteration
            self._current = epoch
            if epoch.first_step < epoch.num_steps:  # else it was resumed at its very end
                return epoch

    def _next_epoch(self) -> Epoch | None:
        number = self._start.epoch if self._current is None else self._current.number + 1
        with self._changed:
            try:
                self._wait_for(lambda: bool(self._epochs) or self._has_ended, f"for epoch {number}")
            except UnavailableError:
                if self._on_unavailable != "uniform":
                    raise
                if number == self.spec.num_epochs:
                    _log.warning("the run ends without a server: losses of its last epochs are not reported")
                    return None
                self._uniform_stop = number + 1
            else:
                return self._epochs.popleft() if self._epochs else None
        return self._uniform_epoch(number)

    @property
    def generation(self) -> int:
        return self._member.generation

    @property
    def position(self) -> Position:
        """The next step whose losses are due; at an epoch's end the next epoch's first."""
        epoch = self._current
        if epoch is None:
            return self._start
        if epoch.is_complete:
            return Position(epoch.number + 1, 0)
        return Position(epoch.number, epoch.num_consumed)

    @property
    def is_active(self) -> bool:
        """Whether it may still report: neither closed nor failed."""
        return not self._closing.is_set() and self._error is None

    def flush(self) -> None:
        """Return when all losses handed over so far are in the store: what is before `position` is safe then.

        In an epoch that is drawn uniformly it returns at once: what the epochs before have yet to report is kept, and
        reported when a server is back.
        """
        epoch = self._current
        if epoch is not None and not epoch.is_uniform and not self._closing.is_set():
            self._flush(epoch, self._wait_timeout_s)

    def _flush(self, epoch: Epoch, timeout_s: float) -> None:
        with self._changed:
            self._is_flushing = True
            self._changed.notify_all()
            num_consumed, is_last = epoch.num_consumed, epoch.is_complete
            self._wait_for(
                lambda: epoch.is_finished or (not is_last and epoch.num_reported >= num_consumed),
                "for the losses to be reported",
                timeout_s,
            )

    def close(self) -> None:
        """Report what is left, if that works within ten seconds, and end the background work. Also done at exit."""
        if self._closing.is_set() or self._pid != os.getpid():  # the threads stay behind when a process forks
            return
        epoch = self._reporting if self._current is not None and self._current.is_uniform else self._current
        try:
            if epoch is not None and self._error is None:
                self._flush(epoch, _CLOSE_TIMEOUT_S)
        except SupersededError as error:
            _log.info("closing a run that was superseded: %s", error)
        except (WaitTimeoutError, UnavailableError):
            _log.warning("closing without an answer from the server: some losses of the last steps are not reported")
        finally:
            atexit.unregister(self.close)
            with self._changed:
                self._closing.set()
                self._changed.notify_all()
                call = self._call
            if call is not None:
                call.cancel()
            for thread in self._threads:
                thread.join(_CLOSE_TIMEOUT_S)

    # Between the caller and the threads

    def _wait_for(self, condition: Callable[[], bool], what: str, timeout_s: float | None = None) -> None:
        """Wait, holding the lock, until the condition holds; raises what failed in the background."""
        timeout_s = self._wait_timeout_s if timeout_s is None else timeout_s
        outage_timeout_s = min(timeout_s, self._connection.outage_timeout_s)
        began_s = time.monotonic()
        while not condition():
            if self._error is not None:
                raise self._error
            if self._closing.is_set():
                raise UsageError(_CLOSED)
            waited_s, outage_s = time.monotonic() - began_s, self._connection.outage_s()
            has_given_up = self._current is not None and self._current.is_uniform  # in this same outage
            patience_s = min(_PATIENCE_S, outage_timeout_s) if has_given_up else outage_timeout_s
            if outage_s >= outage_timeout_s and waited_s >= patience_s:
                raise self._connection.unavailable(outage_timeout_s)
            if waited_s >= timeout_s:
                raise WaitTimeoutError(
                    f"{what}: waited {timeout_s:g} s {_for_whom(self._waiting_for)}. Are all ranks running, with the "
                    "same run_id?"
                )
            self._changed.wait(min(_TICK_S, timeout_s - waited_s))

    def next_chunk(self, epoch: Epoch) -> Chunk | None:
        """The next rows of an epoch, once they are here; None if it ends before."""
        with self._changed:
            try:
                self._wait_for(
                    lambda: bool(epoch.chunks) or epoch.num_yielded >= epoch.stop, f"for more of epoch {epoch.number}"
                )
            except UnavailableError:
                if self._on_unavailable != "uniform":
                    raise
                self._end_early(epoch, "no server answers")
            self._changed.notify_all()  # there is room again
            return epoch.chunks.popleft() if epoch.num_yielded < epoch.stop else None

    def consumed(self, epoch: Epoch, num_non_finite: int) -> None:
        """Note that one more step's losses are in `epoch.losses`."""
        if self._error is not None:
            raise self._error
        if self._closing.is_set():
            raise UsageError(_CLOSED)
        if num_non_finite and not self.num_non_finite:
            _log.warning(
                "step %d of epoch %d has %d losses that are not finite: they count as not visited (said once)",
                epoch.num_consumed,
                epoch.number,
                num_non_finite,
            )
        self.num_non_finite += num_non_finite
        epoch.num_consumed += 1
        pending_bytes = epoch.step_bytes * (epoch.num_consumed - epoch.num_reported)
        if epoch.is_complete or pending_bytes >= _REPORT_BYTES:
            with self._changed:
                self._changed.notify_all()

    def _end_early(self, epoch: Epoch, why: str) -> None:
        """End an epoch for this rank with the batches that were taken; the caller holds the lock."""
        if epoch.num_yielded < epoch.stop:
            _log.warning(
                "epoch %d ends for rank %d after %d of its %d steps: %s",
                epoch.number,
                self.rank,
                epoch.num_yielded,
                epoch.num_steps,
                why,
            )
            epoch.stop = epoch.num_yielded
        self._changed.notify_all()

    def _uniform_epoch(self, number: int) -> Epoch:
        """An epoch of the same steps drawn without scores, and without a server: the same on all ranks."""
        spec, policy = self.spec, self.spec.policy
        is_whole = spec.is_annealing(number) or spec.num_places == spec.num_samples
        uniform = replace(
            spec,
            policy=Uniform() if is_whole else RandomSubset(prune_ratio=policy.prune_ratio),
            mini_batch_size=spec.meta_batch_size,
            importance_weight="none",
            mixture=None,  # it needs a server
        )
        table, _ = plan_epoch(uniform, number, initial_scores(spec.num_samples))
        shape = spec.shape(number, len(table.sample_ids))
        start = pb.EpochStart(
            num_steps=shape.num_steps,
            step_rows=shape.trained_rows,
            trained_rows=shape.trained_rows,
            selecting_interval=1,
            learning_rate_factor=1,
        )
        first_step = self._start.step if number == self._start.epoch else 0
        epoch = Epoch(self, number, first_step, start, is_uniform=True)
        # The order is random, so the first rows of a part are as good as any.
        sample_ids, prior_scores = (
            part(rows, shape.step_rows, self.rank, self.world_size)[first_step:, : epoch.part_rows]
            for rows in (table.sample_ids, table.prior_scores)
        )
        epoch.chunks.append(Chunk(sample_ids.astype(np.int64), prior_scores, None))
        _log.warning(
            "no server answers: epoch %d goes on with %s, and its losses are not reported",
            number,
            "all samples" if is_whole else "samples drawn uniformly",
        )
        return epoch

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # carried over to the thread that can do something about it
            with self._changed:
                if not self._closing.is_set():
                    self._error = self._error or error
                self._changed.notify_all()

    # The fetching thread

    def _fetch(self) -> None:
        number, first_step = self._start
        while True:
            self._fetching, self._asked_for = None, number
            self._fetch_epoch(number, first_step)
            with self._changed:
                epoch = self._fetching
                self._has_ended = epoch is None and self._joined_epoch <= number
                self._changed.notify_all()
                # The next epoch can't be there before this one is finished: no use in asking for it.
                while epoch is not None and not epoch.is_finished and not self._is_stopping:
                    self._changed.wait()
                if self._is_stopping or self._has_ended:
                    return
                missed = range(number if epoch is None else number + 1, self._joined_epoch)
                if missed:
                    self._missed.update(missed)
                    _log.warning("epochs %d to %d went on without rank %d", missed[0], missed[-1], self.rank)
                number, first_step = max(number + 1, self._joined_epoch), 0

    def _fetch_epoch(self, number: int, first_step: int) -> None:
        """Fetch one epoch as room permits, through outages. Leaves `_fetching` unset if the run has ended instead."""
        outage = self._connection.retries(self._closing)
        self._wait_began_s = time.monotonic()
        has_ended = False
        while not has_ended:
            streaming_as = self._member
            retry = next(outage)
            try:
                has_ended = self._fetch_rows(number, first_step)
                outage = self._connection.retries(self._closing)
            except grpc.RpcError as error:
                failure = from_grpc(error)
                if isinstance(failure, (EpochClosedError, StoreBehindError)):
                    self._join_again(failure)
                elif isinstance(failure, SupersededError) and self._has_joined_since(streaming_as):
                    pass  # it was sent as who this process was before
                elif not isinstance(failure, WaitTimeoutError):
                    retry(error)
                if self._joined_epoch > number:
                    return
            epoch = self._fetching
            with self._changed:
                while epoch is not None and self._is_buffered(epoch) and not self._is_stopping:
                    self._changed.wait()
                if self._is_stopping or (epoch is not None and epoch.num_received >= epoch.stop):
                    return

    @property
    def _is_stopping(self) -> bool:
        return self._closing.is_set() or self._error is not None

    @staticmethod
    def _room(epoch: Epoch) -> int:
        return _BUFFER_BYTES - sum(chunk.num_bytes for chunk in epoch.chunks)

    def _is_buffered(self, epoch: Epoch) -> bool:
        """Whether there is more to come of an epoch, but little room for it."""
        return epoch.num_received < epoch.stop and self._room(epoch) < _BUFFER_BYTES // 2

    def _fetch_rows(self, number: int, first_step: int) -> bool:
        """One stream: wait for the epoch, take as many steps as there is room for. Returns whether it never comes."""
        epoch = self._fetching
        shape = self.spec.shape(min(number, self.spec.num_epochs - 1))
        room = _BUFFER_BYTES if epoch is None else self._room(epoch)
        request = pb.StreamEpochRequest(
            member=self._member,
            epoch=number,
            first_step=first_step if epoch is None else epoch.num_received,
            max_steps=max(room // (_BUFFERED_ROW_BYTES * shape.step_rows // self.world_size), 1),
        )
        last_log_s = time.monotonic()
        with self._changed:  # close() cancels either this call or its making
            if self._closing.is_set():
                return False
            self._call = call = self._connection.stub().StreamEpoch(request, timeout=_STREAM_TIMEOUT_S)
        for response in call:
            self._connection.answered()
            if isinstance(response, Rows):
                self._received(response)
                continue
            match response.WhichOneof("event"):
                case "wait":
                    self._waiting_for = list(response.wait.waiting_for_ranks)
                    self._finish_again_if_lost(self._waiting_for)
                    if time.monotonic() - last_log_s > _WAIT_LOG_INTERVAL_S:
                        last_log_s = time.monotonic()
                        waited_s = last_log_s - self._wait_began_s
                        _log.warning(
                            "epoch %d: waiting since %.0f s %s", number, waited_s, _for_whom(self._waiting_for)
                        )
                case "start":
                    epoch = self._started(number, first_step, response.start)
                    if epoch.num_received == epoch.num_steps:
                        call.cancel()
                        return False
        self._connection.answered()
        return self._fetching is None

    def _started(self, number: int, first_step: int, start: pb.EpochStart) -> Epoch:
        with self._changed:
            epoch = self._fetching
            if epoch is None:
                # One that this job went through on draws of its own is only finished, so that the next is planned.
                is_passed = number < self._uniform_stop
                epoch = Epoch(self, number, start.num_steps if is_passed else first_step, start)
                self._fetching = self._reporting = epoch
                self._keep(epoch)
                if not is_passed:
                    self._epochs.append(epoch)
                if epoch.skipped_ranks:
                    _log.warning("epoch %d has ended without the ranks %s", number - 1, list(epoch.skipped_ranks))
            self._check_same_rows(epoch, start)
            epoch.plan_id = start.plan_id
            self._waiting_for = []
            self._changed.notify_all()
            return epoch

    def _keep(self, epoch: Epoch) -> None:
        """Keep an epoch's losses, those of the one before, and those of earlier ones as room permits."""
        self._kept[epoch.number] = epoch
        kept_bytes = 0
        for number in sorted(self._kept, reverse=True):
            kept_bytes += self._kept[number].num_bytes
            if kept_bytes > _KEPT_BYTES and number < epoch.number - 1:
                del self._kept[number]

    @staticmethod
    def _check_same_rows(epoch: Epoch, start: pb.EpochStart) -> None:
        if start.table_checksum != epoch.table_checksum:
            raise DataLossError(
                f"the store has lost losses that nobody could send again, and has planned epoch {epoch.number} anew "
                "with other rows than this run has: begin a new run, from the start of that epoch or from a checkpoint"
            )

    def _received(self, rows: Rows) -> None:
        epoch = self._fetching
        if epoch is None or rows.first_step != epoch.num_received:
            raise InternalError(f"the server sent step {rows.first_step} out of turn")
        shape = (rows.num_steps, epoch.part_rows)
        ids, scores, weights = (
            column(rows.sample_ids, sample_id_dtype(self.spec.num_samples)),
            column(rows.prior_scores, np.float32),
            column(rows.importance_weights, np.float32) if rows.importance_weights else None,
        )
        chunk = Chunk(  # of arrays of their own: the message itself need not be kept
            ids.astype(np.int64).reshape(shape),
            scores.copy().reshape(shape),
            None if weights is None else weights.copy().reshape(shape),
        )
        with self._changed:
            epoch.chunks.append(chunk)
            epoch.num_received += rows.num_steps
            self._changed.notify_all()

    def _finish_again_if_lost(self, waiting_for: list[int]) -> None:
        """If others wait for this rank although it has finished, the store has lost that: say it again."""
        epoch = self._reporting
        if epoch is not None and epoch.is_finished and self.rank in waiting_for:
            with self._changed:
                epoch.is_finished = False
                self._changed.notify_all()

    def _join_again(self, why: FailedPreconditionError) -> None:
        """Have the reporting thread join again, and wait until it has."""
        with self._changed:
            self._behind = why
            self._changed.notify_all()
            self._wait_until_joined()

    def _wait_until_joined(self) -> None:
        while self._behind is not None and not self._is_stopping:
            self._changed.wait()

    def _has_joined_since(self, member: pb.Member) -> bool:
        """Whether the reporting thread has joined again; where it is at it, once it has."""
        with self._changed:
            self._wait_until_joined()
            return self._member is not member

    # The reporting thread

    def _report(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_urgent_work, self._report_interval_s)
                if self._closing.is_set() or self._has_ended or self._error is not None:
                    return
                epoch, behind = self._reporting, self._behind
            try:
                if behind is not None:
                    self._rejoin(behind)
                elif epoch is not None:
                    self._deliver(epoch)
                    self._check_store(epoch)
            except (EpochClosedError, StoreBehindError) as error:
                self._behind = error
                continue
            with self._changed:
                if self._behind is behind:
                    self._behind = None
                self._is_flushing = self._is_flushing and epoch is not None and epoch.num_reported < epoch.num_consumed
                self._changed.notify_all()

    def _has_urgent_work(self) -> bool:
        epoch = self._reporting
        if self._closing.is_set() or self._has_ended or self._behind is not None:
            return True
        if epoch is None:
            return False
        if epoch.is_complete:
            return not epoch.is_finished
        num_pending = epoch.num_consumed - epoch.num_reported
        return num_pending > 0 and (self._is_flushing or epoch.step_bytes * num_pending >= _REPORT_BYTES)

    def _deliver(self, epoch: Epoch) -> None:
        """Report what was handed over, and finish the epoch if that was all: its last report goes with that."""
        is_last = epoch.is_closed or epoch.num_due >= epoch.stop
        most = max(_REPORT_BYTES // epoch.step_bytes, 1) if is_last else 0
        while epoch.num_due - epoch.num_reported > most and not epoch.is_finished:
            self._report_steps(epoch, epoch.num_reported, epoch.num_due)
        if is_last and not epoch.is_finished:
            self._finish(epoch)

    def _report_steps(self, epoch: Epoch, first_step: int, stop: int) -> None:
        stop = min(stop, first_step + max(_REPORT_BYTES // epoch.step_bytes, 1))
        request = self._report_of(epoch, first_step, stop)
        request.member.CopyFrom(self._member)
        request.plan_id = epoch.plan_id
        self._connection.call("ReportLosses", request, give_up=self._closing)
        epoch.num_reported = max(epoch.num_reported, stop)
        self._made_contact()

    @staticmethod
    def _report_of(epoch: Epoch, first_step: int, stop: int) -> pb.ReportLossesRequest:
        return pb.ReportLossesRequest(
            first_step=first_step,
            num_steps=stop - first_step,
            losses=column_bytes(epoch.losses[first_step:stop]),
            columns={name: column_bytes(values[first_step:stop]) for name, values in epoch.columns.items()},
            chosen=np.packbits(epoch.chosen[first_step:stop], axis=1, bitorder="little").tobytes(),
        )

    def _finish(self, epoch: Epoch) -> None:
        losses = epoch.losses.reshape(-1)
        # Of an epoch that this process has not gone through to its end, an earlier process may have reported more.
        is_whole = not epoch.is_closed and epoch.stop == epoch.num_steps and epoch.first_step < epoch.num_steps
        for attempt in range(_MAX_REPORTS_AGAIN):
            request = pb.FinishEpochRequest(member=self._member, epoch=epoch.number, plan_id=epoch.plan_id)
            if is_whole or not attempt:
                request.reported_rows = int(np.count_nonzero(~np.isnan(losses)))
                request.checksum = checksum(losses)
            due = epoch.num_due
            if epoch.num_reported < due:
                request.last_report.CopyFrom(self._report_of(epoch, epoch.num_reported, due))
            response = self._connection.call("FinishEpoch", request, give_up=self._closing)
            if not response.missing_steps:
                epoch.num_reported = max(epoch.num_reported, due)
                epoch.is_finished = True
                self._made_contact()
                return
            _log.warning("epoch %d: the store lacks some losses: sending them again", epoch.number)
            for missing in response.missing_steps:
                stop = min(missing.first_step + missing.num_steps, epoch.num_due)
                first = max(missing.first_step, epoch.first_step)
                for step in range(first, stop, max(_REPORT_BYTES // epoch.step_bytes, 1)):
                    self._report_steps(epoch, step, stop)
        raise InternalError(f"epoch {epoch.number}: the store keeps other losses than it is sent")

    def _made_contact(self) -> None:
        self._num_rejoins = 0
        self._last_contact_s = time.monotonic()

    def _check_store(self, epoch: Epoch) -> None:
        """See now and then whether the store still knows of this epoch: others may wait for what it has lost."""
        if epoch.is_finished or time.monotonic() - self._last_contact_s < _CHECK_INTERVAL_S:
            return
        request = pb.GetExperimentRequest(ref=self._member.ref)
        found = self._connection.call("GetExperiment", request, give_up=self._closing).experiment
        self._last_contact_s = time.monotonic()
        if found.epoch < epoch.number:
            raise StoreBehindError(f"the store has gone back from epoch {epoch.number} to epoch {found.epoch}")

    def _rejoin(self, why: FailedPreconditionError) -> None:
        """Find out where the experiment stands, and send again what the store has lost."""
        self._num_rejoins += 1
        if self._num_rejoins > _MAX_REJOINS:
            raise StoreBehindError(
                f"the store does not keep what it is sent, however often the run joins again: begin a new run. ({why})"
            ) from why
        self._closing.wait(_REPORT_INTERVAL_S * (self._num_rejoins - 1))
        request = pb.JoinRunRequest()
        request.CopyFrom(self._join)
        request.position.CopyFrom(pb.Position(epoch=self._start.epoch, step=self._start.step))
        request.rejoining_as.CopyFrom(self._member)
        joined = self._connection.call("JoinRun", request, give_up=self._closing)
        with self._changed:
            self._became_member(joined)
            latest = self._reporting
            last = self._asked_for - 1 if latest is None else latest.number
            if joined.position.epoch > last:
                if latest is not None and not latest.is_finished:
                    self._end_early(latest, "it has ended without it")
                    latest.close()
                return
        _log.warning("the store has lost what it had acknowledged (%s): sending it again", why)
        before: Epoch | None = None
        for number in range(joined.position.epoch, last + 1):
            while (start := self._start_of(number)) is None:
                if before is not None:  # once more: the store may have lost just that, and wait for it
                    self._finish(before)
            before = self._to_send_again(number, start, Position(joined.position.epoch, joined.position.step))
            self._deliver(before)

    def _to_send_again(self, number: int, start: pb.EpochStart, joined_at: Position) -> Epoch:
        """An epoch as it is kept, for a plan that the store has now."""
        epoch = self._kept.get(number)
        if epoch is None:
            # None of its rows is ours if it went on without this rank, or the run began where it ends.
            if number not in self._missed and (number, start.num_steps) != joined_at:
                raise DataLossError(
                    f"the store has gone back to epoch {number}, whose losses this run no longer has: begin a new run "
                    "from a checkpoint"
                )
            return Epoch(self, number, start.num_steps, start)
        self._check_same_rows(epoch, start)
        epoch.plan_id = start.plan_id
        epoch.num_reported, epoch.is_finished = epoch.first_step, False
        return epoch

    def _became_member(self, joined: pb.JoinRunResponse) -> None:
        self._joined_epoch = joined.position.epoch
        self._member = pb.Member(ref=self._join.ref, generation=joined.generation, rank=self.rank, claim=joined.claim)

    def _start_of(self, number: int) -> pb.EpochStart | None:
        """What an epoch's stream begins with; None if it is not planned soon."""
        request = pb.StreamEpochRequest(member=self._member, epoch=number, max_steps=1)
        for retry in self._connection.retries(self._closing):
            try:
                for response in self._connection.stub().StreamEpoch(request, timeout=_CHECK_INTERVAL_S):
                    self._connection.answered()
                    if not isinstance(response, Rows) and response.HasField("start"):
                        return response.start
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                    return None
                retry(error)
        raise AssertionError("retries end by raising")


def _for_whom(ranks: list[int]) -> str:
    return f"for the ranks {ranks} to finish the epoch before" if ranks else "for it to be planned"
