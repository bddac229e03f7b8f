"""One epoch as a rank goes through it: batches of sample ids, and the losses that come back for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from evosample.errors import InvalidArgumentError, UsageError
from evosample.sampling import (
    EpochShape,
    ExperimentSpec,
    InvalidValue,
    MiniBatch,
    recorded_losses,
    select_mini_batch,
    selection_bits,
)
from evosample.v1 import selection_pb2 as pb

_BITS_ROWS = 2**13


class EpochOwner(Protocol):
    """What an epoch needs of its run."""

    spec: ExperimentSpec
    rank: int
    world_size: int
    read_ahead: int

    def next_chunk(self, epoch: Epoch) -> Chunk | None:
        """The next rows of an epoch, once they are here; None if the epoch ends before."""

    def consumed(self, epoch: Epoch, num_non_finite: int) -> None:
        """Note that one more step's losses are in `epoch.losses`."""


class Chunk(NamedTuple):
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
        trains: False in a step whose rows are only scored, without training.
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
        "trains",
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
        self.selects = epoch.shape.step_selects(step)
        self.trains = epoch.shape.step_trains(step)
        self.progress = epoch.progress(step)
        self._epoch = epoch
        self._prior_scores = prior_scores
        self._set_importance_weights = set_importance_weights

    def select(self, losses: Any, **columns: Any) -> MiniBatch:
        """Hand over the losses and draw the rows to back-propagate.

        Where the step does not select these are all of them, and where it does not train none.

        Args:
            losses: [m], one a sample and in their order, >= 0; an array or a tensor. Non-finite ones count as not
                visited, and are chosen only to fill up.
            columns: [m] each, what the experiment's policy needs besides: see its `reported_columns`.

        Returns:
            Positions in this batch (int64, ascending) and the importance weights that multiply their losses (float32).

        Raises:
            InvalidArgumentError: another shape, a negative loss, or other columns. Nothing was recorded.
            UsageError: not this batch's turn. Nothing was recorded.
        """
        return self._epoch.select(self, losses, columns)

    def report(self, losses: Any, **columns: Any) -> None:
        """Hand over the losses without drawing. Arguments and errors as those of `select`."""
        self._epoch.report(self, losses, columns)

    def all(self) -> MiniBatch:
        """The mini-batch of a step that does not select: all rows; where it does not train either, none."""
        if self.selects:
            raise UsageError(f"step {self.step} of epoch {self.epoch} selects: draw its mini-batch with select(losses)")
        return self._epoch.drawn(self, np.zeros(len(self.sample_ids), np.float32))

    def draw_inputs(self) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Prior scores and set-level importance weights, float32 [m] each: what a draw takes besides the losses."""
        return self._prior_scores, self._set_importance_weights


class Epoch:
    """One epoch of a rank's part; iterating it yields what is left of its batches.

    Attributes:
        number: from 0.
        num_steps: steps of the epoch.
        first_step: where this run entered the epoch: 0 unless it resumed in the middle.
        stop: the step before which it ends for this rank: num_steps, unless the others went on without it.
        shape: sizes of the epoch over all ranks.
        step_bytes: size of what is reported of a step.
        learning_rate_factor: what the policy says that the learning rate is to be multiplied by in this epoch.
        is_closed: it has ended without this rank: only what was reported before counts.
        new_share: share of its samples that the epoch before had left out; None where there was none before.
        skipped_ranks: ranks without which the epoch before has ended, at most 100.
        is_uniform: drawn by the client itself while no server answered; its losses are not reported.
    """

    def __init__(
        self, run: EpochOwner, number: int, first_step: int, start: pb.EpochStart, *, is_uniform: bool = False
    ) -> None:
        self.number = number
        self.num_steps = self.stop = start.num_steps
        self.first_step = first_step
        self.is_uniform = is_uniform
        self.shape = EpochShape(
            num_steps=start.num_steps,
            step_rows=start.step_rows,
            trained_rows=start.trained_rows,
            selecting_interval=start.selecting_interval,
            num_hidden_steps=start.num_hidden_steps,
            is_annealing=run.spec.is_annealing(number),
        )
        self.learning_rate_factor = start.learning_rate_factor
        self.new_share = start.new_rows / self.shape.num_rows if start.HasField("new_rows") else None
        self.skipped_ranks = tuple(start.skipped_ranks)
        self.part_rows = start.step_rows // run.world_size
        self.plan_id = start.plan_id
        self.table_checksum = start.table_checksum
        # NaN: not reported. Kept beyond the epoch's end: what the store has lost can be sent again.
        self.losses = np.full((self.num_steps, self.part_rows), np.nan, np.float32)
        self.columns = {name: np.zeros_like(self.losses) for name in run.spec.policy.reported_columns}
        self.chosen = np.zeros(self.losses.shape, np.bool_)
        self.step_bytes = 4 * self.part_rows * (1 + len(self.columns)) + -(-self.part_rows // 8)
        self.num_consumed = first_step
        self.num_reported = first_step
        self.num_received = first_step
        self.is_finished = False
        self.is_closed = False
        self.num_yielded = first_step
        self.chunks: deque[Chunk] = deque()
        self._run = run
        self._steps_before = run.spec.num_steps_before(number)
        self._nominal_steps = run.spec.shape(number).num_steps  # the most, where the policy decides epoch by epoch
        self._total_steps = run.spec.total_steps
        self._rows: Iterator[tuple[Any, ...]] = iter(())
        self._chunk: Chunk | None = None  # whose rows are being yielded
        self._chunk_begins = first_step
        self._bits: list[NDArray[np.uint64]] = []
        self._bits_steps = range(0)

    @property
    def num_bytes(self) -> int:
        """Memory of what is kept to be reported."""
        return sum(values.nbytes for values in (self.losses, self.chosen, *self.columns.values()))

    def close(self) -> None:
        """Forget what was not reported in time: the others have gone on without it."""
        self.is_closed = self.is_finished = True
        self._num_in_time = self.num_reported
        self.losses[self.num_reported :] = np.nan

    @property
    def num_due(self) -> int:
        """The step before which all losses are to be reported."""
        return self._num_in_time if self.is_closed else self.num_consumed

    @property
    def is_complete(self) -> bool:
        """Whether the losses of all its steps were handed over."""
        return self.num_consumed >= self.stop

    def __len__(self) -> int:
        """Steps of the epoch."""
        return self.num_steps

    def __iter__(self) -> Iterator[Batch]:
        while self.num_yielded < self.stop:
            if self.num_yielded - self.num_consumed > self._run.read_ahead:
                raise UsageError(
                    f"the losses of step {self.num_consumed} of epoch {self.number} were not handed over: call "
                    "batch.select(losses) or batch.report(losses) for every batch before taking the next"
                )
            batch = self.next_batch()
            if batch is not None:
                yield batch

    def next_batch(self) -> Batch | None:
        """The next batch, whether or not the ones before had their losses handed over; None at the epoch's end."""
        step = self.num_yielded
        if step >= self.stop:
            return None
        rows = next(self._rows, None)
        if rows is None:
            chunk = self._run.next_chunk(self)
            if chunk is None:
                return None
            self._chunk, self._chunk_begins = chunk, step
            weights = [None] * len(chunk.sample_ids) if chunk.importance_weights is None else chunk.importance_weights
            self._rows = zip(chunk.sample_ids, chunk.prior_scores, weights, strict=True)
            rows = next(self._rows)
        self.num_yielded += 1
        return Batch(self, step, *rows)

    def buffered_ids(self, first_step: int, stop: int) -> NDArray[np.int64]:
        """Sample ids of those steps in [first_step, stop), none of them yielded yet, that are here: [k, part rows]."""
        found = [np.empty((0, self.part_rows), np.int64)]
        begins = self._chunk_begins
        for chunk in (self._chunk, *self.chunks):
            if chunk is not None:
                found.append(chunk.sample_ids[max(first_step - begins, 0) : max(stop - begins, 0)])
                begins += len(chunk.sample_ids)
        return np.concatenate(found)

    def progress(self, step: int) -> float:
        """The share of the whole run's steps that come before `step` of this epoch."""
        return (self._steps_before + step * (self._nominal_steps / self.num_steps)) / self._total_steps

    def select(self, batch: Batch, losses: Any, columns: Mapping[str, Any]) -> MiniBatch:
        """See `Batch.select`."""
        values, num_non_finite, others = self._checked(batch, losses, columns)
        drawn = self.drawn(batch, values)
        self._record(batch, values, num_non_finite, others, drawn.positions)
        return drawn

    def report(self, batch: Batch, losses: Any, columns: Mapping[str, Any]) -> None:
        """See `Batch.report`."""
        checked = self._checked(batch, losses, columns)
        self._record(batch, *checked, slice(None) if batch.trains and not batch.selects else slice(0))

    def drawn(self, batch: Batch, losses: NDArray[np.float32]) -> MiniBatch:
        """A batch's mini-batch."""
        prior_scores, set_importance_weights = batch.draw_inputs()
        return select_mini_batch(
            self._run.spec,
            self.shape,
            epoch=self.number,
            step=batch.step,
            rank=self._run.rank,
            world_size=self._run.world_size,
            prior_scores=prior_scores,
            losses=losses,
            set_importance_weights=set_importance_weights,
            bits=self._bits_of(batch.step) if batch.selects else None,
        )

    def _bits_of(self, step: int) -> NDArray[np.uint64]:
        """What the draw of a step that selects goes by, made for some steps at a time, which takes less time."""
        if step not in self._bits_steps:
            interval = self.shape.selecting_interval
            stop = step + interval * max(_BITS_ROWS // self.part_rows, 1)
            self._bits_steps = range(step, min(stop, self.shape.num_training_steps), interval)
            place = (self._run.rank, self.part_rows)
            self._bits = selection_bits(self._run.spec, self.number, self._bits_steps, *place)
        return self._bits[self._bits_steps.index(step)]

    def _checked(
        self, batch: Batch, losses: Any, columns: Mapping[str, Any]
    ) -> tuple[NDArray[np.float32], int, dict[str, NDArray[np.float32]]]:
        """The losses as they are recorded, how many are not finite, and the other columns."""
        values = _as_floats("losses", losses, self.part_rows)
        if columns.keys() != self.columns.keys():
            raise InvalidArgumentError(
                f"columns: {', '.join(columns) or 'none'} given, but {type(self._run.spec.policy).__name__} needs "
                f"{', '.join(self.columns) or 'none'} besides the losses, as keyword arguments of select and report",
                field="columns",
            )
        with as_invalid_argument():
            recorded, num_non_finite = recorded_losses(values)
            others = {name: _as_floats(name, column, self.part_rows) for name, column in columns.items()}
            if others:
                self._run.spec.policy.check_reported(others)
        if batch.step != self.num_consumed:
            if batch.step < self.num_consumed:
                raise UsageError(f"the losses of step {batch.step} of epoch {self.number} were handed over already")
            raise UsageError(
                f"the losses of step {self.num_consumed} of epoch {self.number} were not handed over: they come "
                f"before those of step {batch.step}"
            )
        return recorded, num_non_finite, others

    def _record(
        self,
        batch: Batch,
        losses: NDArray[np.float32],
        num_non_finite: int,
        columns: Mapping[str, NDArray[np.float32]],
        chosen: slice | NDArray[np.int64],
    ) -> None:
        if not self.is_closed:
            self.chosen[batch.step, chosen] = True
            for name, values in columns.items():
                self.columns[name][batch.step] = values
            self.losses[batch.step] = losses
        self._run.consumed(self, num_non_finite)


class as_invalid_argument:  # noqa: N801  # as those of contextlib, of which one made from a generator takes three times as long
    """The context in which what the checks of `evosample.sampling` find is raised as evosample's own error."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        if isinstance(error, InvalidValue):
            raise InvalidArgumentError(str(error), field=error.field) from error


def _as_floats(field: str, values: Any, num_rows: int) -> NDArray[np.float32]:
    floats: NDArray[np.float32]
    if hasattr(values, "detach"):  # a tensor of PyTorch, which need not be installed
        floats = values.detach().float().cpu().numpy()
    else:
        try:
            floats = np.asarray(values, np.float32)
        except (TypeError, ValueError) as error:
            raise InvalidArgumentError(f"{field}: expected {num_rows} numbers, got {values!r}", field=field) from error
    if floats.shape != (num_rows,):
        raise InvalidArgumentError(
            f"{field} have shape {floats.shape}, expected ({num_rows},): one a sample, in the order of "
            'batch.sample_ids. Compute losses without reduction (in PyTorch: reduction="none"), and average what '
            "belongs to one sample",
            field=field,
        )
    return floats
