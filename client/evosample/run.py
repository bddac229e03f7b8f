"""A rank's way through the epochs: ids come in ahead, mini-batches are drawn here, losses leave in the background."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grpc
import numpy as np
from numpy.typing import NDArray

from evosample.errors import (
    InternalError,
    InvalidArgumentError,
    SupersededError,
    UsageError,
    WaitTimeoutError,
)
from evosample.rpc import Connection
from evosample.sampling import (
    ExperimentSpec,
    InvalidValue,
    MiniBatch,
    check_losses,
    checksum,
    recorded_losses,
    sample_id_dtype,
    select_mini_batch,
)
from evosample.v1 import selection_pb2 as pb
from evosample.wire import Position, column, column_bytes

_log = logging.getLogger("evosample")

_BUFFER_BYTES = 64 * 2**20
_BUFFERED_ROW_BYTES = 16  # int64 id, float32 prior score, float32 importance weight
_REPORT_BYTES = 2**20
_REPORT_INTERVAL_S = 0.2
_WAIT_LOG_INTERVAL_S = 10.0
_CLOSE_TIMEOUT_S = 10.0
_CLOSED = "the run is closed: its client was closed, or has begun a newer run as the same rank"


class _Chunk(NamedTuple):
    """Consecutive steps as they came: the columns are [num_steps, part rows of a step]."""

    sample_ids: NDArray[np.int64]
    prior_scores: NDArray[np.float32]
    importance_weights: NDArray[np.float32] | None

    @property
    def num_bytes(self) -> int:
        return sum(rows.nbytes for rows in self if rows is not None)


class Batch:
    """One step of a rank's part.

    Attributes:
        sample_ids: int64 [m], what to load.
        epoch: from 0.
        step: from 0, in the epoch.
        selects: whether the losses of a scoring pass decide which rows are trained on. Where not, all of them are:
            one ordinary forward and backward pass, whose losses are handed over.
        progress: the share of the whole run's steps that came before this one, in [0, 1).
    """

    __slots__ = (
        "_epoch",
        "_prior_scores",
        "_set_importance_weights",
        "epoch",
        "progress",
        "sample_ids",
        "selects",
        "step",
    )

    def __init__(
        self,
        epoch: Epoch,
        step: int,
        sample_ids: NDArray[np.int64],
        prior_scores: NDArray[np.float32],
        set_importance_weights: NDArray[np.float32] | None,
    ) -> None:
        self.sample_ids = sample_ids
        self.step = step
        self.epoch = epoch.number
        self.selects = epoch.selects
        self.progress = epoch.progress(step)
        self._epoch = epoch
        self._prior_scores = prior_scores
        self._set_importance_weights = set_importance_weights

    def select(self, losses: Any) -> MiniBatch:
        """Hand over the losses and draw the rows to back-propagate; where the step does not select: all of them.

        Args:
            losses: [m], one a sample and in their order, >= 0; an array or a tensor. Non-finite ones count as not
                visited, and are chosen only to fill up.

        Returns:
            Positions in this batch (int64, ascending) and the importance weights that multiply their losses (float32).

        Raises:
            InvalidArgumentError: another shape, or a negative loss. Nothing was recorded.
            UsageError: not this batch's turn. Nothing was recorded.
        """
        values = self._epoch.hand_over(self, losses)
        return self._epoch.select(self, values)

    def report(self, losses: Any) -> None:
        """Hand over the losses without drawing. Arguments and errors as those of `select`."""
        self._epoch.hand_over(self, losses)

    def all(self) -> MiniBatch:
        """The mini-batch of a step that does not select: every row, with its importance weight."""
        if self.selects:
            raise UsageError(f"step {self.step} of epoch {self.epoch} selects: draw its mini-batch with select(losses)")
        return self._epoch.select(self, np.zeros(len(self.sample_ids), np.float32))

    def draw_inputs(self) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Prior scores and set-level importance weights, float32 [m] each: what a draw takes besides the losses."""
        return self._prior_scores, self._set_importance_weights


class Epoch:
    """One epoch of a rank's part; iterating it yields what is left of its batches.

    Attributes:
        number: from 0.
        num_steps: steps of the epoch.
        first_step: where this run entered the epoch: 0 unless it resumed in the middle.
        selects: see `Batch`.
    """

    def __init__(self, run: Run, number: int, first_step: int, start: pb.EpochStart) -> None:
        self.number = number
        self.num_steps = start.num_steps
        self.first_step = first_step
        self.selects = start.trained_rows < start.step_rows
        self.part_rows = start.step_rows // run.world_size
        self.plan_id = start.plan_id
        # NaN: not reported. Kept until the next epoch is there: what the store lost can be sent again.
        self.losses = np.full((self.num_steps, self.part_rows), np.nan, np.float32)
        self.num_consumed = first_step
        self.num_reported = first_step
        self.num_received = first_step
        self.is_finished = False
        self.chunks: deque[_Chunk] = deque()
        self._run = run
        self._num_yielded = first_step
        self._steps_before = run.spec.num_steps_before(number)
        self._total_steps = run.spec.total_steps
        self._rows: Iterator[tuple[Any, ...]] = iter(())

    def __len__(self) -> int:
        """Steps of the epoch."""
        return self.num_steps

    def __iter__(self) -> Iterator[Batch]:
        while self._num_yielded < self.num_steps:
            if self._num_yielded - self.num_consumed > self._run.read_ahead:
                raise UsageError(
                    f"the losses of step {self.num_consumed} of epoch {self.number} were not handed over: call "
                    "batch.select(losses) or batch.report(losses) for every batch before taking the next"
                )
            yield self.next_batch()

    def next_batch(self) -> Batch:
        """The next batch, whether or not the ones before had their losses handed over."""
        step = self._num_yielded
        rows = next(self._rows, None)
        if rows is None:
            chunk = self._run.next_chunk(self)
            weights = [None] * len(chunk.sample_ids) if chunk.importance_weights is None else chunk.importance_weights
            self._rows = zip(chunk.sample_ids, chunk.prior_scores, weights, strict=True)
            rows = next(self._rows)
        self._num_yielded += 1
        return Batch(self, step, *rows)

    def progress(self, step: int) -> float:
        """The share of the whole run's steps that come before `step` of this epoch."""
        return (self._steps_before + step) / self._total_steps

    def hand_over(self, batch: Batch, losses: Any) -> NDArray[np.float32]:
        """Take a batch's losses; see `Batch.select`."""
        values = _as_losses(losses, self.part_rows)
        if batch.step != self.num_consumed:
            if batch.step < self.num_consumed:
                raise UsageError(f"the losses of step {batch.step} of epoch {self.number} were handed over already")
            raise UsageError(
                f"the losses of step {self.num_consumed} of epoch {self.number} were not handed over: they come "
                f"before those of step {batch.step}"
            )
        recorded, num_non_finite = recorded_losses(values)
        self.losses[batch.step] = recorded
        self._run.consumed(self, num_non_finite)
        return values

    def select(self, batch: Batch, losses: NDArray[np.float32]) -> MiniBatch:
        """Draw a batch's mini-batch; see `Batch.select`."""
        prior_scores, set_importance_weights = batch.draw_inputs()
        return select_mini_batch(
            self._run.spec,
            epoch=self.number,
            step=batch.step,
            rank=self._run.rank,
            world_size=self._run.world_size,
            prior_scores=prior_scores,
            losses=losses,
            set_importance_weights=set_importance_weights,
        )


@contextlib.contextmanager
def as_invalid_argument() -> Iterator[None]:
    """Raise what the checks of `evosample.sampling` find as evosample's own error."""
    try:
        yield
    except InvalidValue as error:
        raise InvalidArgumentError(str(error), field=error.field) from error


def _as_losses(losses: Any, num_rows: int) -> NDArray[np.float32]:
    if hasattr(losses, "detach"):  # a tensor of PyTorch, which need not be installed
        losses = losses.detach().float().cpu().numpy()
    try:
        values = np.asarray(losses, np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"losses: expected {num_rows} numbers, got {losses!r}", field="losses") from error
    if values.shape != (num_rows,):
        raise InvalidArgumentError(
            f"losses have shape {values.shape}, expected ({num_rows},): one loss a sample, in the order of "
            'batch.sample_ids. Compute them without reduction (in PyTorch: reduction="none"), and average what belongs '
            "to one sample",
            field="losses",
        )
    with as_invalid_argument():
        check_losses(values)
    return values


class Run:
    """One start of a training job, as one of its ranks: an iterator over the epochs that are left.

    Two threads work in the background: one fetches ids ahead, up to 64 MiB and into the next epoch; one reports losses,
    many steps a message, and ends epochs. What fails there is raised by the next call here.

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
        member: pb.Member,
        position: Position,
        *,
        world_size: int,
        read_ahead: int,
        wait_timeout_s: float,
    ) -> None:
        self.spec = spec
        self.uid = member.ref.uid
        self.rank = member.rank
        self.world_size = world_size
        self.generation = member.generation
        self.read_ahead = read_ahead
        self.num_non_finite = 0
        self._connection = connection
        self._member = member
        self._start = position
        self._wait_timeout_s = wait_timeout_s
        self._changed = threading.Condition()
        self._epochs: deque[Epoch] = deque()  # received, not yet taken
        self._current: Epoch | None = None
        self._reporting: Epoch | None = None  # the one whose losses go out, or went last
        self._is_flushing = False
        self._has_ended = False
        self._closing = threading.Event()
        self._pid = os.getpid()
        self._error: BaseException | None = None
        self._call: Any = None
        self._fetching: Epoch | None = None
        self._outage: Iterator[Callable[[grpc.RpcError], None]] | None = None
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
        """The next epoch, once it is planned; raises WaitTimeoutError if that takes too long."""
        current = self._current
        if current is not None and current.num_consumed < current.num_steps:
            raise UsageError(
                f"epoch {current.number} has {current.num_steps} steps, but only the losses of {current.num_consumed} "
                "were handed over: go through all batches of an epoch before taking the next epoch"
            )
        while True:
            with self._changed:
                self._wait_for(lambda: bool(self._epochs) or self._has_ended)
                if not self._epochs:
                    atexit.unregister(self.close)  # nothing is left to report: who drops the run frees it
                    raise StopIteration
                self._current = self._epochs.popleft()
            if self._current.first_step < self._current.num_steps:  # else it was resumed at its very end
                return self._current

    @property
    def position(self) -> Position:
        """The next step whose losses are due; at an epoch's end the next epoch's first."""
        epoch = self._current
        if epoch is None:
            return self._start
        if epoch.num_consumed == epoch.num_steps:
            return Position(epoch.number + 1, 0)
        return Position(epoch.number, epoch.num_consumed)

    @property
    def is_active(self) -> bool:
        """Whether it may still report: neither closed nor failed."""
        return not self._closing.is_set() and self._error is None

    def flush(self) -> None:
        """Return when all losses handed over so far are in the store: what is before `position` is safe then."""
        self._flush(deadline_s=None)

    def _flush(self, *, deadline_s: float | None) -> None:
        epoch = self._current
        if epoch is None or self._closing.is_set():
            return
        with self._changed:
            self._is_flushing = True
            self._changed.notify_all()
            num_consumed, is_last = epoch.num_consumed, epoch.num_consumed == epoch.num_steps
            self._wait_for(
                lambda: epoch.is_finished if is_last else epoch.num_reported >= num_consumed, deadline_s=deadline_s
            )

    def close(self) -> None:
        """Report what is left, if that works within ten seconds, and end the background work. Also done at exit."""
        if self._closing.is_set() or self._pid != os.getpid():  # the threads stay behind when a process forks
            return
        try:
            if self._error is None:
                self._flush(deadline_s=time.monotonic() + _CLOSE_TIMEOUT_S)
        except SupersededError as error:
            _log.info("closing a run that was superseded: %s", error)
        except WaitTimeoutError:
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

    def _wait_for(self, condition: Callable[[], bool], *, deadline_s: float | None = None) -> None:
        """Wait, holding the lock, until the condition holds; raises what failed in the background."""
        while not condition():
            if self._error is not None:
                raise self._error
            if self._closing.is_set():
                raise UsageError(_CLOSED)
            if not self._changed.wait(None if deadline_s is None else deadline_s - time.monotonic()):
                raise WaitTimeoutError("the losses could not be reported in time")

    def next_chunk(self, epoch: Epoch) -> _Chunk:
        """The next rows of an epoch, once they are here."""
        with self._changed:
            self._wait_for(lambda: bool(epoch.chunks))
            self._changed.notify_all()  # there is room again
            return epoch.chunks.popleft()

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
        pending_bytes = 4 * epoch.part_rows * (epoch.num_consumed - epoch.num_reported)
        if epoch.num_consumed == epoch.num_steps or pending_bytes >= _REPORT_BYTES:
            with self._changed:
                self._changed.notify_all()

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
        for number in range(self._start.epoch, self.spec.num_epochs + 1):
            self._fetching = None
            self._fetch_epoch(number, self._start.step if number == self._start.epoch else 0)
            with self._changed:
                epoch = self._fetching
                self._has_ended = epoch is None
                self._changed.notify_all()
                # The next epoch can't be there before this one is finished: no use in asking for it.
                while not (self._closing.is_set() or epoch is None or epoch.is_finished):
                    self._changed.wait()
                if self._closing.is_set():
                    return

    def _fetch_epoch(self, number: int, first_step: int) -> None:
        """Fetch one epoch as room permits, through outages. Leaves `_fetching` unset if the run has ended instead."""
        while True:
            try:
                self._fetch_rows(number, first_step)
            except grpc.RpcError as error:
                self._outage = self._outage or self._connection.retries(self._closing)
                next(self._outage)(error)
            epoch = self._fetching
            if (epoch is None and self._outage is None) or (
                epoch is not None and epoch.num_received == epoch.num_steps
            ):
                return
            with self._changed:
                while epoch is not None and not self._closing.is_set() and self._room(epoch) < _BUFFER_BYTES // 2:
                    self._changed.wait()
                if self._closing.is_set():
                    return

    @staticmethod
    def _room(epoch: Epoch) -> int:
        return _BUFFER_BYTES - sum(chunk.num_bytes for chunk in epoch.chunks)

    def _fetch_rows(self, number: int, first_step: int) -> None:
        """One stream: wait for the epoch, then take as many steps as there is room for."""
        epoch = self._fetching
        shape = self.spec.shape(min(number, self.spec.num_epochs - 1))
        room = _BUFFER_BYTES if epoch is None else self._room(epoch)
        request = pb.StreamEpochRequest(
            member=self._member,
            epoch=number,
            first_step=first_step if epoch is None else epoch.num_received,
            max_steps=max(room // (_BUFFERED_ROW_BYTES * shape.step_rows // self.world_size), 1),
        )
        began_s = last_log_s = time.monotonic()
        waiting_for: list[int] = []
        with self._changed:  # close() cancels either this call or its making
            if self._closing.is_set():
                return
            self._call = self._connection.stub().StreamEpoch(request, timeout=self._wait_timeout_s)
        try:
            for response in self._call:
                self._outage = None
                match response.WhichOneof("event"):
                    case "wait":
                        waiting_for = list(response.wait.waiting_for_ranks)
                        self._finish_again_if_lost(waiting_for)
                        if time.monotonic() - last_log_s > _WAIT_LOG_INTERVAL_S:
                            last_log_s = time.monotonic()
                            _log.warning(
                                "epoch %d: waiting since %.0f s %s",
                                number,
                                last_log_s - began_s,
                                _for_whom(waiting_for),
                            )
                    case "start":
                        self._started(number, first_step, response.start)
                    case "rows":
                        self._received(response.rows)
            self._outage = None
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise WaitTimeoutError(
                    f"epoch {number}: waited {self._wait_timeout_s:g} s {_for_whom(waiting_for)}. "
                    "Are all ranks running, with the same run_id?"
                ) from error
            raise

    def _started(self, number: int, first_step: int, start: pb.EpochStart) -> None:
        with self._changed:
            if self._fetching is None:
                self._fetching = self._reporting = Epoch(self, number, first_step, start)
                self._epochs.append(self._fetching)
            self._fetching.plan_id = start.plan_id
            self._changed.notify_all()

    def _received(self, rows: pb.EpochRows) -> None:
        epoch = self._fetching
        if epoch is None or rows.first_step != epoch.num_received:
            raise InternalError(f"the server sent step {rows.first_step} out of turn")
        shape = (rows.num_steps, epoch.part_rows)
        weights = column(rows.importance_weights, np.float32).reshape(shape) if rows.importance_weights else None
        chunk = _Chunk(
            column(rows.sample_ids, sample_id_dtype(self.spec.num_samples)).astype(np.int64).reshape(shape),
            column(rows.prior_scores, np.float32).reshape(shape),
            weights,
        )
        with self._changed:
            epoch.chunks.append(chunk)
            epoch.num_received += rows.num_steps
            self._changed.notify_all()

    # The reporting thread

    def _report(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_urgent_work, _REPORT_INTERVAL_S)
                if self._closing.is_set() or self._has_ended or self._error is not None:
                    return
                epoch = self._reporting
                if epoch is None:
                    continue
            while epoch.num_reported < epoch.num_consumed:
                self._report_steps(epoch, epoch.num_reported, epoch.num_consumed)
            if epoch.num_reported == epoch.num_steps and not epoch.is_finished:
                self._finish(epoch)
            with self._changed:
                self._is_flushing = self._is_flushing and epoch.num_reported < epoch.num_consumed
                self._changed.notify_all()

    def _has_urgent_work(self) -> bool:
        epoch = self._reporting
        if self._closing.is_set() or self._has_ended or epoch is None:
            return self._closing.is_set() or self._has_ended
        if epoch.num_consumed == epoch.num_steps:
            return not epoch.is_finished
        num_pending = epoch.num_consumed - epoch.num_reported
        return num_pending > 0 and (self._is_flushing or 4 * epoch.part_rows * num_pending >= _REPORT_BYTES)

    def _report_steps(self, epoch: Epoch, first_step: int, stop: int) -> None:
        stop = min(stop, first_step + max(_REPORT_BYTES // (4 * epoch.part_rows), 1))
        request = pb.ReportLossesRequest(
            member=self._member,
            plan_id=epoch.plan_id,
            first_step=first_step,
            num_steps=stop - first_step,
            losses=column_bytes(epoch.losses[first_step:stop]),
        )
        self._connection.call("ReportLosses", request, give_up=self._closing)
        epoch.num_reported = max(epoch.num_reported, stop)

    def _finish(self, epoch: Epoch) -> None:
        losses = epoch.losses.reshape(-1)
        request = pb.FinishEpochRequest(
            member=self._member,
            epoch=epoch.number,
            plan_id=epoch.plan_id,
            reported_rows=int(np.count_nonzero(~np.isnan(losses))),
            checksum=checksum(losses),
        )
        while True:
            response = self._connection.call("FinishEpoch", request, give_up=self._closing)
            if not response.missing_steps:
                break
            _log.warning("epoch %d: the store lacks some losses: sending them again", epoch.number)
            for missing in response.missing_steps:
                stop = missing.first_step + missing.num_steps
                for step in range(missing.first_step, stop, max(_REPORT_BYTES // (4 * epoch.part_rows), 1)):
                    self._report_steps(epoch, step, stop)
        epoch.is_finished = True

    def _finish_again_if_lost(self, waiting_for: list[int]) -> None:
        """If others wait for this rank although it has finished, the store has lost that: say it again."""
        epoch = self._reporting
        if epoch is not None and epoch.is_finished and self.rank in waiting_for:
            with self._changed:
                epoch.is_finished = False
                self._changed.notify_all()


def _for_whom(ranks: list[int]) -> str:
    return f"for the ranks {ranks} to finish the epoch before" if ranks else "for it to be planned"
