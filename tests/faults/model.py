"""What a server must answer, said as plainly as it can be: design.md and the proto's comments over dictionaries.

Nothing here is concurrent, cut into blocks or done twice. Methods bear the names of RPCs; they return what the answer
holds, or raise Refused. What a server chooses freely (uids, claims, plan ids) has a name of the model's own here.
The algorithm is `evosample.sampling`'s.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evosample.sampling import (
    EpochShape,
    ExperimentSpec,
    Kakurenbo,
    Plan,
    Report,
    Scores,
    Table,
    fold_epoch,
    initial_scores,
    plan_epoch,
    select_mini_batch,
    starting_scores,
)

RETAIN_EPOCHS = 2
MAX_PINS = 16


class Refused(Exception):
    """The code, and the field (INVALID_ARGUMENT, NOT_FOUND) or the reason (all others)."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code, detail)


def _invalid(field_name: str) -> Refused:
    return Refused("INVALID_ARGUMENT", field_name)


def _failed(reason: str) -> Refused:
    return Refused("FAILED_PRECONDITION", reason)


class Position(NamedTuple):
    epoch: int
    step: int


class Ref(NamedTuple):
    """Names an experiment; an empty uid is whichever bears the name."""

    name: str
    uid: str = ""


class Member(NamedTuple):
    """One process's membership of a run."""

    ref: Ref
    generation: int
    rank: int
    claim: str


class RowCounts(NamedTuple):
    visited: int
    non_finite: int
    unreported: int
    trained: int


class Status(NamedTuple):
    """What is shown of an experiment."""

    name: str
    uid: str
    spec: ExperimentSpec
    state: str
    epoch: int
    generation: int
    world_size: int
    finished_ranks: tuple[int, ...]
    visited_rows: int
    non_finite_rows: int
    unreported_rows: int
    trained_rows: int
    retained_epochs: tuple[int, ...]
    pins: dict[str, int]
    num_steps: int


class Joined(NamedTuple):
    generation: int
    claim: str
    position: Position
    unreported_rows: int = 0


class Waits(NamedTuple):
    """The epoch asked for is not planned yet, and nothing is due that would plan it."""


class Ended(NamedTuple):
    """There is no such epoch: the experiment has finished."""


class Streamed(NamedTuple):
    """An epoch's sizes, and a part of some of its steps, one after the other."""

    plan_id: str
    num_steps: int
    step_rows: int
    trained_rows: int
    table_checksum: int
    selecting_interval: int
    num_hidden_steps: int
    learning_rate_factor: float
    streamed_steps: int
    sample_ids: list[int]
    prior_scores: list[float]
    importance_weights: list[float]


class Selected(NamedTuple):
    positions: list[int]
    importance_weights: list[float]
    non_finite_losses: int


class Finished(NamedTuple):
    missing_steps: list[tuple[int, int]]
    waiting_for_ranks: list[int]


class Exported(NamedTuple):
    epoch: int
    scores: list[float]
    sampling_weights: list[float]
    num_visits: list[int]
    staleness: list[int]
    num_chosen: list[int]
    chosen_staleness: list[int]
    columns: dict[str, list[float]]


@dataclass
class Epoch:
    """An epoch that is retained: all that is needed to go through it, or its rest, once more."""

    plan_id: str
    scores: Scores
    """At its start."""
    row_counts: RowCounts
    """Of the epochs before it."""
    table: Table
    shape: EpochShape
    report: Report
    """What will be folded: as in `fold_epoch`, but [num_steps, step_rows]."""


@dataclass
class Run:
    """The latest run of an experiment."""

    run_id: str
    world_size: int
    begun_at: set[Position | None]
    """What may be given as its position: where it began, and nothing."""
    straggler_timeout_ms: int | None
    first_step: int
    """Of the current epoch: what this run does not have to report."""
    claims: dict[int, str] = field(default_factory=dict)
    processes: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Name -> rank and claim, of those processes that have told their names."""
    finished: set[int] = field(default_factory=set)
    recorded: dict[tuple[str, int], NDArray[np.float32]] = field(default_factory=dict)
    """(plan, rank) -> float32 [num_steps, part rows]: all losses that this run's rank has reported."""


class Experiment:
    """One experiment."""

    def __init__(self, uid: str, spec: ExperimentSpec, first: Epoch) -> None:
        self.uid = uid
        self.spec = spec
        self.state = "open"
        self.epoch = 0
        self.epochs = {0: first}
        self.pins: dict[str, int] = {}
        self.generation = 0
        self.run_ids: set[str] = set()
        self.has_imported_scores = False
        self.run = Run("", 0, set(), None, 0)

    @property
    def current(self) -> Epoch:
        return self.epochs[self.epoch]

    @property
    def shape(self) -> EpochShape:
        return self.current.shape

    @property
    def unfinished_ranks(self) -> list[int]:
        return [rank for rank in range(self.run.world_size) if rank not in self.run.finished]

    def num_steps(self, epoch: int) -> int:
        """Steps of an epoch (of one that is not retained, the most that it may have); 0 after the last one."""
        if epoch == self.spec.num_epochs:
            return 0
        return (self.epochs[epoch].shape if epoch in self.epochs else self.spec.shape(epoch)).num_steps

    def can_have(self, world_size: int) -> bool:
        """Whether every rank gets an equal part of each step and of its mini-batch."""
        return (
            world_size > 0 and not self.spec.meta_batch_size % world_size and not self.spec.mini_batch_size % world_size
        )

    def is_current(self, member: Member) -> bool:
        return member.generation == self.generation and self.run.claims.get(member.rank) == member.claim

    def recorded(self, rank: int) -> NDArray[np.float32]:
        """What a rank of the run has reported of the current epoch."""
        shape = (self.shape.num_steps, self.shape.step_rows // self.run.world_size)
        return self.run.recorded.setdefault((self.current.plan_id, rank), np.full(shape, np.nan, np.float32))

    def reported_rows(self, rank: int) -> int:
        return int(np.count_nonzero(~np.isnan(self.recorded(rank))))

    def forget_old_epochs(self) -> None:
        oldest = self.epoch - RETAIN_EPOCHS + 1
        self.epochs = {e: kept for e, kept in self.epochs.items() if e >= oldest or e in self.pins.values()}


def checksum(losses: NDArray[np.float32]) -> int:
    """CRC-32 of a part's losses, as FinishEpochRequest.checksum says."""
    return zlib.crc32((losses.view(np.uint32) ^ np.uint32(0x7FC00000)).tobytes())


class Model:
    """All experiments of one project."""

    def __init__(self) -> None:
        self.experiments: dict[str, Experiment] = {}
        self._counts: dict[str, itertools.count[int]] = {}

    def _new(self, kind: str) -> str:
        return f"{kind}-{next(self._counts.setdefault(kind, itertools.count(1)))}"

    # Experiments

    def create(self, name: str, spec: ExperimentSpec) -> Status:
        if name not in self.experiments:
            first = self._planned(spec, 0, initial_scores(spec.num_samples, spec.policy.columns), RowCounts(0, 0, 0, 0))
            self.experiments[name] = Experiment(self._new("uid"), spec, first)
        experiment = self.experiments[name]
        self.settle(experiment)
        if experiment.spec != spec:
            raise Refused("ALREADY_EXISTS", "SPEC_DIFFERS")
        return self._status(name)

    def get(self, ref: Ref) -> Status:
        self._find(ref)
        return self._status(ref.name)

    def list_experiments(self) -> list[Status]:
        return [self._status(name) for name in sorted(self.experiments)]

    def delete(self, ref: Ref) -> None:
        self._find(ref)
        del self.experiments[ref.name]

    def _find(self, ref: Ref) -> Experiment:
        if ref.name not in self.experiments:
            raise Refused("NOT_FOUND", "ref.name")
        experiment = self.experiments[ref.name]
        if ref.uid not in ("", experiment.uid):
            raise Refused("NOT_FOUND", "ref.uid")
        return experiment

    def _status(self, name: str) -> Status:
        experiment = self.experiments[name]
        return Status(
            name,
            experiment.uid,
            experiment.spec,
            experiment.state,
            experiment.epoch,
            experiment.generation,
            experiment.run.world_size,
            tuple(sorted(experiment.run.finished)),
            *experiment.current.row_counts,
            tuple(sorted(experiment.epochs)),
            experiment.pins.copy(),
            0 if experiment.state == "unplanned" else experiment.num_steps(experiment.epoch),
        )

    # Epochs

    def _planned(self, spec: ExperimentSpec, epoch: int, scores: Scores, row_counts: RowCounts) -> Epoch:
        scores = starting_scores(scores.copy(), spec.num_samples, spec.policy.columns)
        nothing = np.empty(0, np.float32)
        plan = Plan(Table(nothing, nothing, None), EpochShape(0, 0, 0, 1, 0, is_annealing=False))
        if epoch < spec.num_epochs:
            plan = plan_epoch(spec, epoch, scores)
        rows = plan.shape.num_steps, plan.shape.step_rows
        columns = {name: np.zeros(rows, np.float32) for name in spec.policy.reported_columns}
        report = Report(np.full(rows, np.nan, np.float32), np.zeros(rows, np.bool_), columns)
        return Epoch(self._new("plan"), scores, row_counts, *plan, report)

    def settle(self, experiment: Experiment) -> None:
        """Make the turn that is due, if one is: a server does so when it is asked for what comes after it."""
        if experiment.state == "unplanned":  # its table is the one that it had
            experiment.state = "open"
            experiment.forget_old_epochs()
        if experiment.state != "sealed":
            return
        spec, ended = experiment.spec, experiment.current
        columns = {name: column.ravel() for name, column in ended.report.columns.items()}
        report = Report(ended.report.losses.ravel(), ended.report.chosen.ravel(), columns)
        scores = ended.scores.copy()
        counts = fold_epoch(spec, scores, ended.table.sample_ids, report)
        new_counts = (*counts, ended.shape.num_trained)
        row_counts = RowCounts(*(old + new for old, new in zip(ended.row_counts, new_counts, strict=True)))
        experiment.epoch += 1
        following = self._planned(spec, experiment.epoch, scores, row_counts)
        experiment.epochs[experiment.epoch] = following
        experiment.forget_old_epochs()
        experiment.run.finished = set()
        experiment.run.first_step = 0
        experiment.state = "finished" if experiment.epoch == spec.num_epochs else "open"

    # Runs

    def join(
        self,
        ref: Ref,
        run_id: str,
        rank: int,
        world_size: int,
        position: Position | None,
        current_if_not_retained: bool = False,
        straggler_timeout_ms: int | None = None,
        rejoining_as: Member | None = None,
        process_id: str = "",
    ) -> Joined:
        if not ref.uid:
            raise _invalid("ref.uid")
        experiment = self._find(ref)
        self.settle(experiment)
        if not experiment.can_have(world_size):
            raise _invalid("world_size")
        if not 0 <= rank < world_size:
            raise _invalid("rank")
        if experiment.spec.warm_start and not experiment.has_imported_scores:
            raise _failed("FAILED_PRECONDITION")
        run = experiment.run
        if run_id != run.run_id and run_id in experiment.run_ids:
            raise Refused("ABORTED", "SUPERSEDED")
        if position is not None:
            position = self._canonical(experiment, position)
        is_there = self._is_there(experiment, position)
        unreported_rows = 0
        if run_id == run.run_id:
            _, claim = run.processes.get(process_id, (rank, None))
            if claim is not None and claim == run.claims[rank]:
                return Joined(experiment.generation, claim, Position(experiment.epoch, run.first_step))
            if claim is not None or (rejoining_as and run.claims[rank] != rejoining_as.claim):
                raise Refused("ABORTED", "SUPERSEDED")
            if world_size != run.world_size:
                raise _invalid("world_size")
            if straggler_timeout_ms != run.straggler_timeout_ms:
                raise _invalid("straggler_timeout_ms")
            counts = rejoining_as is None and (is_there or not current_if_not_retained)
            if counts and position not in run.begun_at:
                raise _invalid("position")
            run.finished.discard(rank)
        else:
            if position is None and experiment.state == "finished":
                raise _failed("FAILED_PRECONDITION")
            if not is_there and not current_if_not_retained:
                raise _failed("EPOCH_NOT_RETAINED")
            target = self._target(experiment, position if is_there else None)
            self._go_to(experiment, target)
            begun_at = {None, self._canonical(experiment, target)}
            run = experiment.run = Run(run_id, world_size, begun_at, straggler_timeout_ms, target.step)
            experiment.run_ids.add(run_id)
            experiment.generation += 1
            unreported_rows = int(np.isnan(experiment.current.report.losses[: target.step]).sum())
        claim = run.claims[rank] = self._new("claim")
        if process_id:
            run.processes[process_id] = rank, claim
        return Joined(experiment.generation, claim, Position(experiment.epoch, run.first_step), unreported_rows)

    @staticmethod
    def _canonical(experiment: Experiment, position: Position) -> Position:
        """The one form of a position: an epoch's end is the start of the next."""
        if position.epoch > experiment.spec.num_epochs:
            raise _invalid("position.epoch")
        num_steps = experiment.num_steps(position.epoch)
        if position.step > num_steps:
            raise _invalid("position.step")
        is_end = position.step == num_steps and position.epoch < experiment.spec.num_epochs
        return Position(position.epoch + 1, 0) if is_end else position

    @staticmethod
    def _is_there(experiment: Experiment, position: Position | None) -> bool:
        """Whether a run can go to a canonical position: its epoch is retained, or the turn to it is due."""
        return position is None or position.epoch in experiment.epochs or position == (experiment.epoch + 1, 0)

    @staticmethod
    def _target(experiment: Experiment, position: Position | None) -> Position:
        """Where a new run goes to; before a turn that is still due, to the end of the epoch before it."""
        if position is None:
            return Position(experiment.epoch, 0)
        if position.epoch > experiment.epoch:
            return Position(experiment.epoch, experiment.shape.num_steps)
        return position

    @staticmethod
    def _go_to(experiment: Experiment, target: Position) -> None:
        """Drop what came after the epoch, and what was reported at or after the step."""
        if target.epoch < experiment.epoch:
            experiment.epoch = target.epoch
            experiment.state = "unplanned"
            experiment.epochs = {e: kept for e, kept in experiment.epochs.items() if e <= target.epoch}
            experiment.pins = {pin: e for pin, e in experiment.pins.items() if e <= target.epoch}
        losses, chosen, columns = experiment.current.report
        losses[target.step :] = np.nan
        for column in (chosen, *columns.values()):
            column[target.step :] = 0

    def _find_for(self, member: Member) -> Experiment:
        if not member.ref.uid:
            raise _invalid("ref.uid")
        experiment = self._find(member.ref)
        if not experiment.is_current(member):
            raise Refused("ABORTED", "SUPERSEDED")
        return experiment

    # What a rank does

    def stream(self, member: Member, epoch: int, first_step: int = 0, max_steps: int = 0) -> Streamed | Waits | Ended:
        experiment = self._find_for(member)
        if epoch < experiment.epoch:
            raise _failed("EPOCH_CLOSED")
        if epoch > min(experiment.epoch + 1, experiment.spec.num_epochs):
            raise _failed("STORE_BEHIND")
        self.settle(experiment)
        if epoch < experiment.epoch:
            raise _failed("EPOCH_CLOSED")
        if epoch > experiment.epoch:
            return Waits()
        if experiment.state == "finished":
            return Ended()
        shape, table = experiment.shape, experiment.current.table
        if first_step > shape.num_steps:
            raise _invalid("first_step")
        stop = min(first_step + max_steps, shape.num_steps) if max_steps else shape.num_steps
        columns = [column for column in table if column is not None]

        def mine(column: NDArray[Any] | None) -> list[Any]:
            if column is None:
                return []
            steps = column.reshape(shape.num_steps, experiment.run.world_size, -1)
            rows: list[Any] = steps[first_step:stop, member.rank].ravel().tolist()
            return rows

        return Streamed(
            experiment.current.plan_id,
            shape.num_steps,
            shape.step_rows,
            shape.trained_rows,
            zlib.crc32(b"".join(column.tobytes() for column in columns)),
            shape.selecting_interval,
            shape.num_hidden_steps,
            experiment.spec.policy.learning_rate_factor(shape.num_rows, shape.num_hidden_steps * shape.step_rows),
            stop - first_step,
            mine(table.sample_ids),
            mine(table.prior_scores),
            mine(table.importance_weights),
        )

    def report(
        self,
        member: Member,
        plan_id: str,
        first_step: int,
        num_steps: int,
        losses: NDArray[np.float32],
        columns: Mapping[str, NDArray[np.float32]],
        chosen: bytes,
    ) -> int:
        """Returns how many losses were not finite."""
        experiment = self._find_for(member)
        self._check_open(experiment, plan_id)
        if first_step >= experiment.shape.num_steps:
            raise _invalid("first_step")
        if not 1 <= num_steps <= experiment.shape.num_steps - first_step:
            raise _invalid("num_steps")
        part_rows = experiment.shape.step_rows // experiment.run.world_size
        self._check_rows(experiment, num_steps * part_rows, losses, columns)
        if len(chosen) not in (0, num_steps * -(-part_rows // 8)):
            raise _invalid("chosen")
        is_chosen = [False] * (num_steps * part_rows)  # not known is not chosen
        for step in range(num_steps if chosen else 0):
            bits = int.from_bytes(chosen[step * -(-part_rows // 8) :][: -(-part_rows // 8)], "little")
            is_chosen[step * part_rows : (step + 1) * part_rows] = [bool(bits >> row & 1) for row in range(part_rows)]
        return self._record(
            experiment, member.rank, first_step, num_steps, Report(losses, np.array(is_chosen), columns)
        )

    def select(
        self,
        member: Member,
        plan_id: str,
        step: int,
        losses: NDArray[np.float32],
        columns: Mapping[str, NDArray[np.float32]],
    ) -> Selected:
        experiment = self._find_for(member)
        self._check_open(experiment, plan_id)
        shape, table, world_size = experiment.shape, experiment.current.table, experiment.run.world_size
        if step >= shape.num_steps:
            raise _invalid("step")
        self._check_rows(experiment, shape.step_rows // world_size, losses, columns)
        prior_scores, set_weights = (
            None if column is None else column.reshape(shape.num_steps, world_size, -1)[step, member.rank]
            for column in (table.prior_scores, table.importance_weights)
        )
        assert prior_scores is not None
        drawn = select_mini_batch(
            experiment.spec,
            shape,
            epoch=experiment.epoch,
            step=step,
            rank=member.rank,
            world_size=world_size,
            prior_scores=prior_scores,
            losses=losses,
            set_importance_weights=set_weights,
        )
        chosen = np.isin(np.arange(losses.size), drawn.positions)
        num_non_finite = self._record(experiment, member.rank, step, 1, Report(losses, chosen, columns))
        return Selected(drawn.positions.tolist(), drawn.importance_weights.tolist(), num_non_finite)

    @staticmethod
    def _check_rows(
        experiment: Experiment, num_rows: int, losses: NDArray[np.float32], columns: Mapping[str, NDArray[np.float32]]
    ) -> None:
        if set(columns) != set(experiment.spec.policy.reported_columns):
            raise _invalid("columns")
        for name in experiment.spec.policy.reported_columns:
            if columns[name].size != num_rows:
                raise _invalid(f"columns.{name}")
        if losses.size != num_rows or (np.isfinite(losses) & (losses < 0)).any():
            raise _invalid("losses")
        if isinstance(experiment.spec.policy, Kakurenbo):
            for name, values in columns.items():
                usual = values[np.isfinite(values)]
                if ((usual < 0) | (usual > 1)).any() or (name == "correct" and not np.isin(usual, [0, 1]).all()):
                    raise _invalid(name)

    @staticmethod
    def _check_open(experiment: Experiment, plan_id: str) -> None:
        if experiment.state != "open" or plan_id != experiment.current.plan_id:
            raise _failed("EPOCH_CLOSED")

    @staticmethod
    def _record(experiment: Experiment, rank: int, first_step: int, num_steps: int, report: Report) -> int:
        """What belongs to steps before the run's position is recorded, but not folded."""
        recorded = experiment.recorded(rank)[first_step : first_step + num_steps]
        part_rows = recorded.shape[1]
        losses = np.where(np.isfinite(report.losses), report.losses, np.float32(np.inf))
        recorded[:] = losses.reshape(recorded.shape)
        folded = experiment.current.report
        pairs = [(folded.losses, losses), (folded.chosen, report.chosen)]
        pairs += [(folded.columns[name], column) for name, column in report.columns.items()]
        for step in range(max(first_step, experiment.run.first_step), first_step + num_steps):
            row, at = rank * part_rows, (step - first_step) * part_rows
            for whole, part in pairs:
                whole[step, row : row + part_rows] = part[at : at + part_rows]
        return int(np.count_nonzero(~np.isfinite(report.losses)))

    def finish(
        self, member: Member, epoch: int, plan_id: str, reported_rows: int | None = None, crc: int | None = None
    ) -> Finished:
        experiment = self._find_for(member)
        if epoch < experiment.epoch:
            return Finished([], [])
        if epoch > experiment.epoch:
            raise _failed("EPOCH_CLOSED")
        self._check_open(experiment, plan_id)
        recorded, first_step = experiment.recorded(member.rank), experiment.run.first_step
        is_reported = ~np.isnan(recorded)
        if reported_rows not in (None, is_reported.sum()) or crc not in (None, checksum(recorded)):
            wanted = [step for step in range(first_step, len(recorded)) if not is_reported[step].all()]
            return Finished(_ranges(wanted or range(first_step, len(recorded)) or range(len(recorded))), [])
        experiment.run.finished.add(member.rank)
        if not experiment.unfinished_ranks:
            experiment.state = "sealed"
        return Finished([], experiment.unfinished_ranks)

    # What an administrator does

    def export(self, ref: Ref, epoch: int | None = None) -> Exported:
        experiment = self._find(ref)
        self.settle(experiment)
        wanted = experiment.epoch if epoch is None else epoch
        if wanted not in experiment.epochs:
            raise _failed("EPOCH_NOT_RETAINED")
        scores = experiment.epochs[wanted].scores
        return Exported(
            wanted,
            scores.scores.tolist(),
            scores.sampling_weights.tolist(),
            scores.num_visits.tolist(),
            scores.staleness.tolist(),
            scores.num_chosen.tolist(),
            scores.chosen_staleness.tolist(),
            {name: column.tolist() for name, column in scores.columns.items()},
        )

    def force_finish(self, ref: Ref, epoch: int) -> list[int]:
        """Returns the ranks that had not finished."""
        experiment = self._find(ref)
        self.settle(experiment)
        if epoch > experiment.epoch or not experiment.generation:
            raise _failed("FAILED_PRECONDITION")
        if epoch < experiment.epoch or experiment.state == "finished":
            return []
        experiment.state = "sealed"
        return experiment.unfinished_ranks

    def pin(self, ref: Ref, name: str, epoch: int | None) -> None:
        experiment = self._find(ref)
        if epoch is None:
            experiment.pins.pop(name, None)
            return
        if epoch not in experiment.epochs:
            raise _failed("EPOCH_NOT_RETAINED")
        if name not in experiment.pins and len(experiment.pins) == MAX_PINS:
            raise Refused("RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED")
        experiment.pins[name] = epoch

    def import_scores(
        self,
        ref: Ref,
        scores: NDArray[np.float32],
        sampling_weights: NDArray[np.float32],
        num_visits: NDArray[np.uint16],
    ) -> None:
        """What the policy keeps besides is as at any start."""
        experiment = self._find(ref)
        if scores.size != experiment.spec.num_samples:
            raise _invalid("num_samples")
        if experiment.generation:
            raise _failed("FAILED_PRECONDITION")
        for name, values in [("scores", scores), ("sampling_weights", sampling_weights)]:
            if not (np.isfinite(values) & (values >= 0)).all():
                raise _invalid(name)
        start = initial_scores(scores.size, experiment.spec.policy.columns)
        start = start._replace(scores=scores, sampling_weights=sampling_weights, num_visits=num_visits)
        experiment.epochs[0] = self._planned(experiment.spec, 0, start, RowCounts(0, 0, 0, 0))
        experiment.has_imported_scores = True


def _ranges(steps: Any) -> list[tuple[int, int]]:
    """Ascending steps as (first, count) of consecutive ones."""
    ranges: list[tuple[int, int]] = []
    for step in steps:
        if ranges and sum(ranges[-1]) == step:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + 1)
        else:
            ranges.append((step, 1))
    return ranges
