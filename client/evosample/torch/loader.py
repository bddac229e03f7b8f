"""The loader: what a step loads, scores and trains on."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from evosample.client import Experiment
from evosample.epoch import Batch, Epoch, as_invalid_argument
from evosample.errors import DataLossError, EvosampleError, InvalidArgumentError, UsageError
from evosample.run import Run
from evosample.sampling import check_int
from evosample.torch.columns import moved, take_rows, with_own_containers
from evosample.torch.distributed import Job, count_processes, gradient_sync
from evosample.torch.figures import Costs, EpochFigures, Stopwatch
from evosample.wire import Position

_log = logging.getLogger("evosample")

_PIN = "checkpoint"
_NO_MORE = object()
Scored = torch.Tensor | tuple[torch.Tensor, Mapping[str, torch.Tensor]]
"""What scoring a batch gives: losses [m], or these and the columns that the policy needs, [m] each."""

_PLACE_OPTIONS = {"position", "process_id", "rank", "read_ahead", "run_id", "world_size"}
_PLANNED_OPTIONS = {"batch_size", "batch_sampler", "drop_last", "generator", "in_order", "sampler", "shuffle"}


class MetaBatch:
    """The samples of one step as they were loaded; `Loader.micro_batches` says which of them to train on.

    Attributes:
        data: what the dataset's `collate_fn` made of them.
        step: (epoch, step).
    """

    def __init__(self, data: Any, batch: Batch, positions: NDArray[np.int64] | None) -> None:
        self.data = data
        self._batch = batch
        self._positions = positions  # of the samples that were loaded; None: all of them

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MetaBatch:
        """The same on another device."""
        return MetaBatch(moved(self.data, torch.device(device), non_blocking), self._batch, self._positions)

    @property
    def step(self) -> Position:
        return Position(self._batch.epoch, self._batch.step)

    @property
    def num_rows(self) -> int:
        """Samples that were loaded."""
        return len(self._batch.sample_ids) if self._positions is None else len(self._positions)

    @property
    def lacks_samples(self) -> bool:
        """True if some could not be loaded."""
        return self._positions is not None

    @property
    def planned(self) -> Batch:
        """The step as it was planned."""
        return self._batch

    def all_losses(self, losses: torch.Tensor) -> torch.Tensor:
        """Losses of the loaded samples as losses of the planned ones: NaN where a sample is missing."""
        if self._positions is None:
            return losses
        losses = losses if losses.is_floating_point() else losses.float()
        found = torch.full((len(self._batch.sample_ids),), torch.nan, dtype=losses.dtype, device=losses.device)
        found[torch.from_numpy(self._positions).to(losses.device)] = losses
        return found

    def loaded(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
        """Where planned rows are among the loaded ones, and which of them are there (None: all of them)."""
        if self._positions is None:
            return positions, None
        is_there = np.isin(positions, self._positions)
        return np.searchsorted(self._positions, positions[is_there]), is_there


class _Reported(NamedTuple):
    """What came of some rows: their losses, and the columns that the policy needs besides."""

    losses: torch.Tensor
    columns: Mapping[str, torch.Tensor]


@dataclasses.dataclass(slots=True)
class _Step:
    """A step that was yielded, until its last micro-batch's losses came."""

    meta_batch: MetaBatch
    num_rows: int
    num_due: int
    reported: list[_Reported] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True)
class _MicroBatch:
    """What was yielded, until its losses come."""

    step: _Step
    num_rows: int
    importance_weights: torch.Tensor | None
    is_filler: bool


class Loader:
    """Yields the mini-batches of an experiment: a `DataLoader` whose samples the selection server chooses.

    Iterating it goes through one epoch, or through what is left of one that was broken off. Pass the per-sample losses
    of every batch to `mean`, which gives the loss to back-propagate and reports them to the server.

    Where steps score (`meta_batch_size` above `mini_batch_size`, or Kakurenbo) it also needs `model` and `score`: a
    step that selects loads the meta-batch, scores it, and yields the chosen rows. The scoring pass runs without
    gradients in the model's current mode, and leaves the model's buffers (BatchNorm statistics among them) and
    PyTorch's random state as they were.

    Where torch.distributed is initialised, each process gets its part of every step, and all have the same number of
    scoring passes and micro-batches in it. Call the loader in the same way on all of them.

    Args:
        dataset: map-style, with `experiment.spec.num_samples` samples. None in a sample's place says that it can't be
            loaded: the step goes on without it, and its score stays as it is. One with a method `prefetch` and a number
            `prefetch_samples` is told which samples are to come: see `Prefetching`.
        experiment: made by a client.
        model: whose buffers the scoring pass must leave alone; wrapped (DDP, FSDP) as it is trained. Needed where steps
            score, and by `accumulate`.
        score: takes a batch as the dataset's `collate_fn` makes it, returns its losses, [m], one a sample; or these and
            a dict of the columns that the policy needs besides, [m] each. It may use autocast or a cheaper forward
            pass. It may take elements out of the batch, but not change tensors in place: what is trained on are rows of
            the same tensors. Needed where steps score.
        micro_batch_size: for gradient accumulation: score and yield at most so many samples at once. `ends_step` says
            when to step the optimizer. Default: a step is one batch.
        scoring_micro_batch_size: at most so many samples in a scoring pass, which needs less memory than training.
            Default: micro_batch_size.
        device: move batches there before they are scored and chosen from; overlaps with computation if `pin_memory`.
            Default: leave them where the workers put them.
        take: picks rows of a batch: take(batch, positions). Default: `take_rows`.
        predict_saving: where steps select, score a few steps of the first epoch as well, to measure what that is to
            save, and log it with what it does save; see `figures`.
        read_ahead: batches that a trainer may take before it passes the losses of the one that is due to `mean`.
        data_parallel_rank, data_parallel_size: which of how many equal parts of each step to take. Default: what
            torch.distributed says, or everything. Pass them where processes share their data (tensor or pipeline
            parallelism): these have the same rank, and must pass the same losses.
        run_id: names this start of the job; the same on all processes, another for every start. Default: a random one,
            which process 0 broadcasts. Needed where there are several without torch.distributed.
        run_options: what `Experiment.epochs` takes besides, such as {"wait_timeout_s": 600}. Jobs of several processes
            can't have "on_unavailable": "uniform": each would find out at another step that there is no server.
        **options: what `DataLoader` takes besides: collate_fn, num_workers, pin_memory, worker_init_fn ...

    Attributes:
        experiment: as passed.
        model: as passed; may be set anew where it is wrapped later.

    Raises:
        InvalidArgumentError: the dataset does not fit the experiment, or an argument is missing.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        experiment: Experiment,
        *,
        model: torch.nn.Module | None = None,
        score: Callable[[Any], Scored] | None = None,
        micro_batch_size: int | None = None,
        scoring_micro_batch_size: int | None = None,
        device: torch.device | str | None = None,
        take: Callable[[Any, torch.Tensor], Any] | None = None,
        predict_saving: bool = False,
        read_ahead: int = 1,
        data_parallel_rank: int | None = None,
        data_parallel_size: int | None = None,
        run_id: str | None = None,
        run_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(experiment, Experiment):
            raise InvalidArgumentError(
                f"experiment={experiment!r}: expected what client.create_experiment(...) gives", field="experiment"
            )
        _check_dataset(dataset, experiment)
        if not isinstance(model, torch.nn.Module | None):
            raise InvalidArgumentError(f"model={model!r}: expected a torch.nn.Module", field="model")
        if experiment.spec.selects or experiment.spec.policy.hides:
            expected = {
                "score": (score, "a function that takes a batch and returns the loss of each of its samples"),
                "model": (model, "the model, whose buffers scoring must leave as they are"),
            }
            for field, (given, what) in expected.items():
                if given is None:
                    raise InvalidArgumentError(
                        f"{field}=None: {experiment.spec.policy} scores samples that it does not train on; pass {what}",
                        field=field,
                    )
        for option in sorted(_PLANNED_OPTIONS & options.keys()):
            raise InvalidArgumentError(
                f"{option}={options[option]!r}: leave it out. Which samples are loaded, and in what order, is up to "
                "the experiment; your batch size is the mini_batch_size of create_experiment",
                field=option,
            )
        for field, function in (("score", score), ("take", take)):
            if function is not None and not callable(function):
                raise InvalidArgumentError(f"{field}={function!r}: expected a function", field=field)
        for option in sorted(_PLACE_OPTIONS & (run_options or {}).keys()):
            raise InvalidArgumentError(
                f"run_options has {option!r}, which the loader sets: pass data_parallel_rank, data_parallel_size, "
                "run_id or read_ahead to the loader itself, a position to load_state_dict",
                field="run_options",
            )
        with as_invalid_argument():
            check_int("read_ahead", read_ahead, 0, 2**31)
            sizes = {"micro_batch_size": micro_batch_size, "scoring_micro_batch_size": scoring_micro_batch_size}
            for field, size in sizes.items():
                if size is not None:
                    check_int(field, size, 1, 2**31)
            if data_parallel_size is not None:
                check_int("data_parallel_size", data_parallel_size, 1, 2**31)
                check_int("data_parallel_rank", data_parallel_rank, 0, data_parallel_size - 1)
                experiment.spec.check_world_size(data_parallel_size)
        self.experiment = experiment
        self.model = model
        self._score = score
        self._micro_batch_size = micro_batch_size
        self._scoring_micro_batch_size = scoring_micro_batch_size or micro_batch_size
        self._takes_whole_steps = micro_batch_size is None and not experiment.spec.has_set_weights
        self._device = None if device is None else torch.device(device)
        self._take = take
        self._read_ahead = read_ahead
        self._job = Job(data_parallel_rank, data_parallel_size, run_id)
        self._run_options = dict(run_options or {})
        self._run: Run | None = None
        self._position: Position | None = None
        self._epoch: Epoch | None = None
        self._is_exhausted = False
        self._pending: deque[_MicroBatch] = deque()
        self._ends_step = True
        self._epoch_to_pin: int | None = None
        self._predicts_saving = predict_saving and experiment.spec.selects
        self._costs = Costs()
        self._stopwatch = Stopwatch(EpochFigures(0), experiment.spec.shape(0), self._costs)
        self._planned = _PlannedBatches(dataset)
        self._fingerprint: str = getattr(dataset, "fingerprint", "")
        # Workers are seeded from this generator: PyTorch's own would lose a number to every epoch.
        self._generator = torch.Generator()
        collate = _Collate(options.pop("collate_fn", None) or default_collate)
        self._data_loader: DataLoader[Any] = DataLoader(
            dataset, batch_sampler=self._planned, generator=self._generator, collate_fn=collate, **options
        )

    @property
    def position(self) -> Position:
        """The next step to train on; counts the steps whose losses went through `mean`."""
        if self._position is None:
            status = self.experiment.status()
            return Position(status.epoch + (status.state == "sealed"), 0)  # sealed: the next epoch is being planned
        if self._epoch is not None and self._position.step >= self._epoch.stop:
            return Position(self._epoch.number + 1, 0)
        return self._position

    @property
    def progress(self) -> float:
        """The share of the whole run's steps that are done, in [0, 1]: what a learning-rate schedule can go by."""
        spec, position = self.experiment.spec, self.position
        if self._epoch is not None and self._epoch.number == position.epoch:
            return self._epoch.progress(position.step)
        shape = spec.shape(min(position.epoch, spec.num_epochs - 1))  # samples may have been added since
        return (spec.num_steps_before(position.epoch) + min(position.step, shape.num_steps)) / spec.total_steps

    @property
    def learning_rate_factor(self) -> float:
        """What the policy says that the learning rate is to be multiplied by in the current epoch; mostly 1."""
        return 1.0 if self._epoch is None else self._epoch.learning_rate_factor

    @property
    def ends_step(self) -> bool:
        """Whether the losses last passed to `mean` were those of a step's last micro-batch."""
        return self._ends_step

    @property
    def figures(self) -> EpochFigures:
        """How the current epoch goes, or the last one went; also logged (INFO) at each epoch's end."""
        return self._stopwatch.figures

    def state_dict(self) -> dict[str, int | str]:
        """The position, once every loss before it is in the store. Save it with the model; call it on all ranks.

        The server keeps its epoch, beside those that it retains anyway, until the position is asked for again.
        """
        if self._run is not None:
            self._run.flush()
        position = self.position
        self._epoch_to_pin = position.epoch
        experiment = self.experiment
        state: dict[str, int | str] = {"experiment": experiment.name, "uid": experiment.uid}
        if self._fingerprint:
            state["dataset"] = self._fingerprint
        return state | position._asdict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved position. Call it on all ranks."""
        if not isinstance(state, Mapping) or not {"experiment", "epoch", "step"} <= state.keys():
            raise InvalidArgumentError(f"state={state!r}: expected what state_dict() gave", field="state")
        if state["experiment"] != self.experiment.name:
            raise InvalidArgumentError(
                f"the state belongs to experiment {state['experiment']!r}, the loader to {self.experiment.name!r}",
                field="state",
            )
        if state.get("uid", self.experiment.uid) != self.experiment.uid:
            raise InvalidArgumentError(
                f"the experiment {self.experiment.name!r} of this state is not on this server; the one that is has "
                "the same name, but nothing of what was learned. A private server ends with its job: for jobs that go "
                "on use an evosample-server, or connect(data_dir=...). Without it training begins at the start",
                field="state",
            )
        if state.get("dataset", self._fingerprint) != self._fingerprint:
            raise InvalidArgumentError(
                "the state was saved with another dataset, or with the same shards in another order: its sample ids "
                "would stand for other samples",
                field="state",
            )
        self._leave_run()
        self._epoch_to_pin = None
        self._position = Position(int(state["epoch"]), int(state["step"]))

    def mean(self, losses: torch.Tensor, **columns: torch.Tensor) -> torch.Tensor:
        """Hand over the losses of the oldest batch that is due, and get the loss to back-propagate.

        Args:
            losses: [m], one for each sample of the batch, with their graph.
            columns: [m] each, what the policy needs besides (`experiment.spec.policy.reported_columns`). Where a step
                selects, its scoring pass has given them already, and they are not looked at.

        Returns:
            sum(importance_weight * loss) / (rows of the whole mini-batch): a scalar. Without micro-batches that is the
            weighted mean; the gradients of a step's micro-batches add up to it.

        Raises:
            InvalidArgumentError: a shape is not [m], or there are other columns than the policy needs.
            UsageError: no batch is due.
        """
        if not self._pending:
            raise UsageError("mean(losses) was called without a batch: it takes each batch's losses once")
        micro_batch = self._pending[0]
        step = micro_batch.step
        batch = step.meta_batch.planned
        losses = _checked(losses, micro_batch.num_rows)
        ends_step = self._is_last_of_step(micro_batch)
        reported = step.reported
        if not micro_batch.is_filler and not batch.selects:
            found = {name: _checked(column, micro_batch.num_rows, name).detach() for name, column in columns.items()}
            reported = [*reported, _Reported(losses.detach(), found)]
        if not batch.selects and ends_step:
            self._report(step.meta_batch, reported)
        self._ends_step = ends_step
        self._pending.popleft()
        step.reported = reported
        step.num_due -= 1
        if ends_step:
            self._position = Position(batch.epoch, batch.step + 1)
            if self._is_exhausted:  # by a trainer that takes batches ahead
                self._end_epoch()
        if micro_batch.importance_weights is not None:
            losses = losses * micro_batch.importance_weights.to(losses.device)
        elif micro_batch.is_filler:
            losses = losses * 0
        elif len(losses) == step.num_rows:
            return losses.mean()
        return losses.sum() / step.num_rows

    @staticmethod
    def _report(meta_batch: MetaBatch, reported: list[_Reported]) -> None:
        losses, columns = _all(meta_batch, reported)
        meta_batch.planned.report(losses, **columns)

    @staticmethod
    def _is_last_of_step(micro_batch: _MicroBatch) -> bool:
        return micro_batch.step.num_due == 1

    def _end_epoch(self) -> None:
        """Say how it went, if the losses of all its steps are there."""
        if self._epoch is not None and self._position is not None and self._position.step >= self._epoch.stop:
            self._stopwatch.end_epoch()
            _log.info("%s", self.figures)

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Goes around forward and backward pass of each micro-batch: gradients are exchanged with a step's last only.

        with loader.accumulate():
            loader.mean(per_sample(batch)).backward()
        """
        if not self._pending:
            raise UsageError(
                "accumulate() was called without a batch: it goes around a batch's forward and backward pass"
            )
        if self.model is None:
            raise UsageError("accumulate() needs the model, to exchange its gradients: Loader(..., model=model)")
        with gradient_sync(self.model, self._is_last_of_step(self._pending[0])):
            yield

    def __iter__(self) -> Iterator[Any]:
        """The batches that are left of the epoch at `position`. After a `break` it goes on where training stopped."""
        for meta_batch in self.meta_batches():
            yield from self.micro_batches(meta_batch)

    def meta_batches(self) -> Iterator[MetaBatch]:
        """What iterating the loader goes through, one step at a time and not scored yet.

        For trainers that take batches ahead: scoring has to wait until the step before is done. Pass each meta-batch to
        `micro_batches` when its turn comes. When this returns, `position` is where the meta-batches begin.
        """
        epoch = self._next_epoch()
        return iter(()) if epoch is None else self._meta_batches(epoch)

    def _meta_batches(self, epoch: Epoch) -> Iterator[MetaBatch]:
        self._is_exhausted = False
        self._planned.begin(epoch, self.experiment.spec.num_samples)
        self._generator.manual_seed(self._worker_seed(epoch))
        data_batches = iter(self._data_loader)
        try:
            for step in range(epoch.first_step, epoch.num_steps):
                began_s = time.perf_counter()
                data = next(data_batches, _NO_MORE)
                if data is _NO_MORE:
                    if not epoch.is_closed and step < epoch.stop:
                        raise UsageError(
                            f"the DataLoader ended before step {step} of {epoch.num_steps}: does the dataset or its "
                            "collate_fn raise StopIteration?"
                        )
                    break  # the others have gone on without this rank
                self._stopwatch.figures.loading_s += time.perf_counter() - began_s
                yield self._meta_batch(data)
        finally:
            # Left to the garbage collector, workers may be joined at any later time, for seconds and in any thread.
            if self._data_loader.num_workers and not self._data_loader.persistent_workers:
                data_batches._shutdown_workers()  # type: ignore[attr-defined]
        self._is_exhausted = True
        self._stopwatch.end_step()
        self._end_epoch()

    def _worker_seed(self, epoch: Epoch) -> int:
        """Of the workers' random numbers: another on every rank, and wherever an epoch is entered."""
        assert self._run is not None
        entropy = (self.experiment.spec.seed, epoch.number, epoch.first_step, self._run.rank)
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def _meta_batch(self, data: Any) -> MetaBatch:
        batch = self._planned.taken.popleft()
        positions = None
        if isinstance(data, _Incomplete):
            data, missing = data
            positions = np.delete(np.arange(len(batch.sample_ids)), missing.numpy())
            if not self.figures.num_not_loaded:
                _log.warning(
                    "step %d of epoch %d goes on without %d samples that can't be loaded, such as %d",
                    batch.step,
                    batch.epoch,
                    len(missing),
                    batch.sample_ids[missing[0]],
                )
            self.figures.num_not_loaded += len(missing)
        return MetaBatch(data if self._device is None else moved(data, self._device), batch, positions)

    def _next_epoch(self) -> Epoch | None:
        if self._is_exhausted and self._epoch is not None and self.position.epoch == self._epoch.number:
            raise self._losses_missing()
        if self._epoch is not None and self.position != (self._epoch.number + 1, 0):  # it was broken off
            self._leave_run()
        began_s = time.perf_counter()
        if self._run is None:
            if count_processes() > 1 and self._run_options.get("on_unavailable") == "uniform":
                raise InvalidArgumentError(
                    'on_unavailable="uniform": each process of the job would find out at another step that there is no '
                    "server, and they would wait for each other in vain",
                    field="run_options",
                )
            options = self._job.next_run(self.experiment) | {"position": self._position} | self._run_options
            self._run = self.experiment.epochs(**options)
        epoch = next(self._run, None)
        if epoch is None:
            num_epochs = self.experiment.spec.num_epochs
            _log.warning(
                "the experiment's %d epochs are done: there is nothing left to train on. A job that goes on from a "
                "position has fewer of them before it: range(loader.position.epoch, %d)",
                num_epochs,
                num_epochs,
            )
            return None
        self._epoch = epoch
        self._position = Position(epoch.number, epoch.first_step)
        figures = EpochFigures(epoch.number, waiting_s=time.perf_counter() - began_s, new_share=epoch.new_share)
        self._stopwatch = Stopwatch(figures, epoch.shape, self._costs)
        return epoch

    def _losses_missing(self) -> UsageError:
        due = self.position
        return UsageError(
            f"the losses of step {due.step} of epoch {due.epoch} were not handed over: call loader.mean(losses) for "
            "every batch. A trainer that takes several batches ahead needs read_ahead"
        )

    def close(self) -> None:
        """Report what is left, and end persistent workers. Training can go on afterwards, where it was."""
        self._leave_run()
        workers, self._data_loader._iterator = self._data_loader._iterator, None
        if workers is not None:
            workers._shutdown_workers()  # type: ignore[attr-defined]  # else the garbage collector joins them, slowly

    def _leave_run(self) -> None:
        self._pending.clear()
        if self._position is not None:
            self._position = self.position
        self._epoch = None
        if self._run is not None:
            self._run.close()
            self._run = None

    def micro_batches(self, meta_batch: MetaBatch) -> Iterator[Any]:
        """Score a meta-batch if its step needs it, and yield what there is to train on: no batch, one or several.

        Raises:
            UsageError: the losses of an earlier step were not passed to `mean`.
        """
        pending = self._pending
        if len(pending) > self._read_ahead and len({id(each.step) for each in pending}) > self._read_ahead:
            raise self._losses_missing()
        if self._epoch_to_pin is not None:
            self._pin_checkpoint()
        self._stopwatch.end_step()
        batch = meta_batch.planned
        trains_all = batch.trains and not batch.selects
        if self._predicts_saving and not batch.selects and self._costs.want_more and self.figures.num_steps:
            self._measure_scoring(meta_batch)  # not in the first step, which is slower
        self._stopwatch.begin_step(trains_all=trains_all)
        if trains_all and self._takes_whole_steps and not meta_batch.lacks_samples:  # as a rule: nothing is cut
            step = _Step(meta_batch, meta_batch.num_rows, 1)
            self._pending.append(_MicroBatch(step, step.num_rows, None, is_filler=False))
            yield meta_batch.data
            return
        if not trains_all:
            began_s = time.perf_counter()
            losses, columns = _all(meta_batch, self._scored(meta_batch, len(batch.sample_ids)))
            chosen = batch.select(losses, **columns)
            self.figures.scoring_s += time.perf_counter() - began_s
        else:
            chosen = batch.all()
        if not batch.trains:
            self._position = Position(batch.epoch, batch.step + 1)
            return
        rows, is_there = meta_batch.loaded(chosen.positions)
        importance_weights = chosen.importance_weights if is_there is None else chosen.importance_weights[is_there]
        weights = None
        if self.experiment.spec.has_set_weights:
            self._stopwatch.chose(importance_weights)
            weights = torch.from_numpy(importance_weights)
        parts = _parts(rows, len(chosen.positions), self._micro_batch_size)
        step = _Step(meta_batch, max(len(rows), 1), len(parts))
        first = 0
        for positions in parts:
            stop = first + len(positions)
            is_filler = first >= len(rows)
            part_weights = None if weights is None or is_filler else weights[first:stop]
            self._pending.append(_MicroBatch(step, len(positions), part_weights, is_filler))
            first = stop
            yield self._rows(meta_batch, positions)

    def _measure_scoring(self, meta_batch: MetaBatch) -> None:
        """Time scoring passes over all samples of a step, and over as many as a step that selects trains on."""
        spec = self.experiment.spec
        num_scored = len(meta_batch.planned.sample_ids)
        num_trained = num_scored * spec.mini_batch_size // spec.meta_batch_size
        self._costs.score_meta_batch_s.append(_seconds(lambda: self._scored(meta_batch, num_scored)))
        self._costs.score_mini_batch_s.append(_seconds(lambda: self._scored(meta_batch, num_trained)))

    def _pin_checkpoint(self) -> None:
        """At an epoch's end the next one may not be planned yet: it is pinned once a step of it is here."""
        epoch, self._epoch_to_pin = self._epoch_to_pin, None
        if epoch is None or self._run is None or self._run.rank:
            return
        try:
            self.experiment.pin_epoch(_PIN, epoch)
        except EvosampleError as error:
            _log.warning("the last checkpoint can be resumed for as long as its epoch is retained only: %s", error)

    def _rows(self, meta_batch: MetaBatch, positions: NDArray[np.int64]) -> Any:
        num_rows = meta_batch.num_rows
        if len(positions) == num_rows:
            return meta_batch.data
        rows = torch.from_numpy(positions)
        return self._take(meta_batch.data, rows) if self._take else take_rows(meta_batch.data, rows, num_rows)

    def _scored(self, meta_batch: MetaBatch, num_planned: int) -> list[_Reported]:
        """What comes of scoring a meta-batch's first `num_planned` samples, or as many as were loaded."""
        assert self._score is not None
        assert self.model is not None
        rows = np.arange(min(num_planned, meta_batch.num_rows))
        scored = []
        num_left = len(rows)  # what comes after them fills up
        with torch.no_grad(), _undisturbed(self.model):
            for positions in _parts(rows, num_planned, self._scoring_micro_batch_size):
                found = self._score(with_own_containers(self._rows(meta_batch, positions)))
                losses, columns = found if isinstance(found, tuple) else (found, dict[str, torch.Tensor]())
                losses = _checked(losses, len(positions))[:num_left]
                columns = {n: _checked(column, len(positions), n)[:num_left] for n, column in columns.items()}
                num_left -= len(losses)
                scored.append(_Reported(losses, columns))
        return scored


class Prefetching(Protocol):
    """A dataset that is told which samples are to come, in the process of the loader.

    Attributes:
        prefetch_samples: how far ahead it wants to know, in samples of all processes of the job together, where an
            epoch visits all samples; where it visits a share, it is told of that share of them.
    """

    prefetch_samples: int

    def prefetch(self, sample_ids: NDArray[np.int64], num_ahead: int) -> None:
        """Called with the next sample ids of this process, [k], in their order, as soon as they are within that.

        It must not block. Each sample comes once an epoch, but for those of the first step, which is loaded at once.

        Args:
            sample_ids: int64 [k].
            num_ahead: how far ahead it is told, in samples of this process.
        """


class _PlannedBatches:
    """The batch sampler of the DataLoader: the sample ids of an epoch's steps, which it takes ahead of training."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.taken: deque[Batch] = deque()
        self._prefetch: Callable[[NDArray[np.int64], int], None] | None = getattr(dataset, "prefetch", None)
        self._prefetch_samples: int = getattr(dataset, "prefetch_samples", 0)
        self._epoch: Epoch | None = None
        self._num_announced = 0
        self._num_steps_ahead = 0

    def begin(self, epoch: Epoch, num_samples: int) -> None:
        self._epoch = epoch
        self._num_announced = epoch.first_step
        self._num_steps_ahead = self._prefetch_samples * epoch.num_steps // num_samples
        self.taken.clear()

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self._epoch
        assert epoch is not None
        while (batch := epoch.next_batch()) is not None:
            if self._prefetch is not None:
                self._announce(epoch, self._prefetch)
            self.taken.append(batch)
            yield batch.sample_ids.tolist()

    def _announce(self, epoch: Epoch, prefetch: Callable[[NDArray[np.int64], int], None]) -> None:
        first = max(self._num_announced, epoch.num_yielded)
        sample_ids = epoch.buffered_ids(first, epoch.num_yielded + self._num_steps_ahead)
        if len(sample_ids):
            prefetch(sample_ids.reshape(-1), self._num_steps_ahead * epoch.part_rows)
        self._num_announced = first + len(sample_ids)


class _Incomplete(NamedTuple):
    """A step of which a worker could not load some samples: the others, collated.

    Attributes:
        missing: int64, their positions.
    """

    data: Any
    missing: torch.Tensor


class _Collate:
    """A `collate_fn` of the samples that could be loaded: where the dataset gave None the batch is incomplete."""

    def __init__(self, collate_fn: Callable[[Any], Any]) -> None:
        self._collate_fn = collate_fn

    def __call__(self, samples: Any) -> Any:
        if not isinstance(samples, list):  # a dataset whose __getitems__ makes whole batches
            return self._collate_fn(samples)
        loaded = [sample for sample in samples if sample is not None]
        if len(loaded) == len(samples):
            return self._collate_fn(samples)
        if not loaded:
            raise DataLossError(f"none of the {len(samples)} samples of a step could be loaded")
        missing = [position for position, sample in enumerate(samples) if sample is None]
        return _Incomplete(self._collate_fn(loaded), torch.tensor(missing))


def _parts(rows: NDArray[np.int64], num_planned: int, micro_batch_size: int | None) -> list[NDArray[np.int64]]:
    """Rows cut into micro-batches: as many as all ranks have for the rows that were planned, nearly equal in size.

    Where so many rows are missing that there is not one for each, the last ones repeat a row, to fill up.
    """
    num_parts = -(-num_planned // min(micro_batch_size or num_planned, num_planned))
    if num_parts == 1 and len(rows):
        return [rows]
    num_missing = max(num_parts - len(rows), 0)
    filler = np.full(num_missing, rows[0] if len(rows) else 0)
    return np.array_split(np.concatenate([rows, filler]), num_parts)


def _seconds(work: Callable[[], object]) -> float:
    """Seconds that work takes, on a GPU as well."""
    _synchronize()
    began_s = time.perf_counter()
    work()
    _synchronize()
    return time.perf_counter() - began_s


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _all(meta_batch: MetaBatch, reported: list[_Reported]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Losses and columns of a step's planned samples: NaN where a sample is missing."""
    if len(reported) == 1:  # as a rule
        losses, columns = reported[0]
        return meta_batch.all_losses(losses), {name: meta_batch.all_losses(rows) for name, rows in columns.items()}
    losses = meta_batch.all_losses(torch.cat([rows.losses for rows in reported]))
    names = reported[0].columns.keys()
    if any(rows.columns.keys() != names for rows in reported):
        raise InvalidArgumentError("columns: not the same ones in all micro-batches of a step", field="columns")
    return losses, {name: meta_batch.all_losses(torch.cat([rows.columns[name] for rows in reported])) for name in names}


def _checked(values: torch.Tensor, num_rows: int, field: str = "losses") -> torch.Tensor:
    if not isinstance(values, torch.Tensor):
        raise InvalidArgumentError(f"{field}={values!r}: expected a tensor of {num_rows} numbers", field=field)
    if values.shape != (num_rows,):
        raise InvalidArgumentError(
            f"{field} have shape {tuple(values.shape)}, expected ({num_rows},): one a sample of the batch. "
            'Compute losses without reduction (reduction="none"), and average what belongs to one sample. Batches of a '
            "type of your own need the loader's take, which picks their rows",
            field=field,
        )
    return values


def _check_dataset(dataset: Dataset[Any], experiment: Experiment) -> None:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise InvalidArgumentError(
            f"dataset={type(dataset).__name__}: expected a map-style dataset, with __getitem__ and __len__: samples "
            "are loaded by their ids",
            field="dataset",
        )
    num_samples = len(dataset) if hasattr(dataset, "__len__") else experiment.num_samples
    if num_samples not in (experiment.spec.num_samples, experiment.num_samples):
        raise InvalidArgumentError(
            f"dataset has {num_samples:,} samples, experiment {experiment.name!r} was created for "
            f"{experiment.num_samples:,}; if it has grown: experiment.extend_dataset(len(dataset))",
            field="dataset",
        )


@contextlib.contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Put the model's buffers and PyTorch's random state back afterwards."""
    # DDP lets the forward pass that follows one without gradients go by with each process's own buffers.
    syncs_buffers = isinstance(model, DistributedDataParallel) and model.require_forward_param_sync
    saved = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    tensors = [*model.parameters(), *model.buffers()]
    devices = {tensor.device.index for tensor in tensors if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            yield
        finally:
            for buffers, name, buffer, before in saved:
                buffers[name] = buffer  # some modules put another tensor in its place
                buffer.data.copy_(before)  # .data: a graph that holds the buffer must not see it as modified
            if syncs_buffers:
                cast(DistributedDataParallel, model).require_forward_param_sync = True
