"""PyTorch: a loader that yields what there is to train on, over any map-style dataset.

per_sample = lambda batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none")
loader = evosample.torch.Loader(train_set, experiment, model=model, score=per_sample)
for epoch in range(num_epochs):
    for batch in loader:
        loss = loader.mean(per_sample(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from evosample.client import Experiment
from evosample.epoch import Batch, Epoch
from evosample.errors import InvalidArgumentError, UsageError
from evosample.run import Run
from evosample.wire import Position

__all__ = ["Loader", "take_rows"]


_END = object()
_PLANNED_OPTIONS = {"batch_size", "batch_sampler", "drop_last", "generator", "in_order", "sampler", "shuffle"}


@dataclasses.dataclass
class _Step:
    """A step that was yielded, until its last micro-batch's losses came."""

    batch: Batch
    num_rows: int
    num_micro_batches: int
    losses: list[torch.Tensor] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _MicroBatch:
    """What was yielded, until its losses come."""

    step: _Step
    num_rows: int
    importance_weights: torch.Tensor | None


class Loader:
    """Yields the mini-batches of an experiment: a `DataLoader` whose samples the selection server chooses.

    Iterating it goes through one epoch, or through what is left of one that was broken off. In a step that selects it
    loads the meta-batch, scores it with `score`, and yields the chosen rows; in other steps (annealing epochs,
    `Uniform`, `RandomSubset`) it yields all it has loaded. Pass the per-sample losses of everything that it yields to
    `mean`, which gives the loss to back-propagate.

    The scoring pass runs without gradients in the model's current mode, and leaves the model's buffers (BatchNorm
    statistics among them) and PyTorch's random state as they were.

    Args:
        dataset: map-style, with `experiment.spec.num_samples` samples.
        experiment: made by a client.
        model: whose buffers the scoring pass must leave alone.
        score: takes a batch as the dataset's `collate_fn` makes it, returns its losses, [m], one a sample. It may use
            autocast or a cheaper forward pass. Not called in steps that don't select.
        micro_batch_size: for gradient accumulation: score and yield at most so many samples at once. `ends_step` says
            when to step the optimizer. Default: a step is one batch.
        device: move batches there before they are scored and chosen from; overlaps with computation if `pin_memory`.
            Default: leave them where the workers put them.
        take: picks rows of a batch: take(batch, positions). Default: `take_rows`.
        read_ahead: batches that a trainer may take before it passes the losses of the one that is due to `mean`.
        rank, world_size, run_id: as in `Experiment.epochs`.
        run_options: what that takes besides, such as {"on_unavailable": "uniform"}.
        **options: what `DataLoader` takes besides: collate_fn, num_workers, pin_memory, worker_init_fn ...

    Raises:
        InvalidArgumentError: the dataset does not fit the experiment, or an argument is missing.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        experiment: Experiment,
        *,
        model: torch.nn.Module,
        score: Callable[[Any], torch.Tensor] | None = None,
        micro_batch_size: int | None = None,
        device: torch.device | str | None = None,
        take: Callable[[Any, torch.Tensor], Any] | None = None,
        read_ahead: int = 1,
        rank: int = 0,
        world_size: int = 1,
        run_id: str | None = None,
        run_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        _check_dataset(dataset, experiment)
        if score is None and experiment.spec.policy.scores_meta_batch:
            raise InvalidArgumentError(
                f"score=None: {experiment.spec.policy} selects by losses; pass a function that takes a batch and "
                "returns the loss of each of its samples",
                field="score",
            )
        if not isinstance(model, torch.nn.Module):
            raise InvalidArgumentError(f"model={model!r}: expected a torch.nn.Module", field="model")
        if read_ahead < 0:
            raise InvalidArgumentError(f"read_ahead={read_ahead}: expected at least 0", field="read_ahead")
        for option in sorted(_PLANNED_OPTIONS & options.keys()):
            raise InvalidArgumentError(
                f"{option}={options[option]!r}: which samples are loaded and in what order is up to the experiment",
                field=option,
            )
        if micro_batch_size is not None and micro_batch_size < 1:
            raise InvalidArgumentError(
                f"micro_batch_size={micro_batch_size}: expected at least 1", field="micro_batch_size"
            )
        self.experiment = experiment
        self._model = model
        self._score = score
        self._micro_batch_size = micro_batch_size
        self._device = None if device is None else torch.device(device)
        self._take = take
        self._read_ahead = read_ahead
        self._rank = rank
        self._world_size = world_size
        self._run_id = run_id
        self._run_options = dict(run_options or {})
        self._run: Run | None = None
        self._position: Position | None = None
        self._epoch: Epoch | None = None
        self._is_exhausted = False
        self._pending: deque[_MicroBatch] = deque()
        self._ends_step = True
        self._planned = _PlannedBatches()
        # Workers are seeded from this generator: PyTorch's own would lose a number to every epoch.
        self._generator = torch.Generator()
        self._data_loader = DataLoader(dataset, batch_sampler=self._planned, generator=self._generator, **options)

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
        return (spec.num_steps_before(position.epoch) + position.step) / spec.total_steps

    @property
    def ends_step(self) -> bool:
        """Whether the losses last passed to `mean` were those of a step's last micro-batch."""
        return self._ends_step

    def state_dict(self) -> dict[str, int | str]:
        """The position, once every loss before it is in the store. Save it with the model; call it on all ranks."""
        if self._run is not None:
            self._run.flush()
        position = self.position
        experiment = self.experiment
        return {"experiment": experiment.name, "uid": experiment.uid, "epoch": position.epoch, "step": position.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved position. With several ranks, after a new start of the job with a new run_id."""
        if not isinstance(state, Mapping) or not {"experiment", "epoch", "step"} <= state.keys():
            raise InvalidArgumentError(f"state={state!r}: expected what state_dict() gave", field="state")
        if state["experiment"] != self.experiment.name:
            raise InvalidArgumentError(
                f"the state belongs to experiment {state['experiment']!r}, the loader to {self.experiment.name!r}",
                field="state",
            )
        if state.get("uid", self.experiment.uid) != self.experiment.uid:
            raise InvalidArgumentError(
                f"the state belongs to an earlier experiment {self.experiment.name!r}, which was deleted: begin the "
                "new one at its start",
                field="state",
            )
        self._leave_run()
        self._position = Position(int(state["epoch"]), int(state["step"]))

    def mean(self, losses: torch.Tensor) -> torch.Tensor:
        """Hand over the losses of the oldest batch that is due, and get the loss to back-propagate.

        Args:
            losses: [m], one for each sample of the batch, with their graph.

        Returns:
            sum(importance_weight * loss) / (rows of the whole mini-batch): a scalar. Without micro-batches that is the
            weighted mean; the gradients of a step's micro-batches add up to it.

        Raises:
            InvalidArgumentError: the losses' shape is not [m].
            UsageError: no batch is due.
        """
        if not self._pending:
            raise UsageError("mean(losses) was called without a batch: it takes each batch's losses once")
        micro_batch = self._pending[0]
        step = micro_batch.step
        losses = _checked(losses, micro_batch.num_rows)
        ends_step = len(step.losses) + 1 == step.num_micro_batches
        if not step.batch.selects and ends_step:
            step.batch.report(torch.cat([*step.losses, losses.detach()]))
        self._ends_step = ends_step
        self._pending.popleft()
        step.losses.append(losses.detach())
        if ends_step:
            self._position = Position(step.batch.epoch, step.batch.step + 1)
        if micro_batch.importance_weights is not None:
            losses = losses * micro_batch.importance_weights.to(losses.device)
        return losses.sum() / step.num_rows

    def __iter__(self) -> Iterator[Any]:
        """The batches that are left of the epoch at `position`.

        After a `break` or an error it goes on where training stopped; with several ranks that takes a new run_id, and
        so a new loader.
        """
        epoch = self._next_epoch()
        self._is_exhausted = False
        self._planned.begin(epoch)
        self._generator.manual_seed((self.experiment.spec.seed + epoch.number) % 2**63)
        data_batches = iter(self._data_loader)
        try:
            for _ in range(epoch.first_step, epoch.num_steps):
                if len({id(micro_batch.step) for micro_batch in self._pending}) > self._read_ahead:
                    raise self._losses_missing()
                data = next(data_batches, _END)
                if data is _END:  # the others have gone on without this rank
                    break
                if self._device is not None:
                    data = _moved(data, self._device)
                yield from self._micro_batches(self._planned.taken.popleft(), data)
        finally:
            # Left to the garbage collector, workers may be joined at any later time, for seconds and in any thread.
            if self._data_loader.num_workers and not self._data_loader.persistent_workers:
                data_batches._shutdown_workers()  # type: ignore[attr-defined]
        self._is_exhausted = True

    def _next_epoch(self) -> Epoch:
        if self._is_exhausted and self._pending:
            raise self._losses_missing()
        if self._epoch is not None and self.position != (self._epoch.number + 1, 0):  # it was broken off
            self._leave_run()
        if self._run is None:
            self._run = self.experiment.epochs(
                rank=self._rank,
                world_size=self._world_size,
                run_id=self._run_id,
                position=self._position,
                **self._run_options,
            )
            if self._world_size == 1:
                self._run_id = None  # whatever follows, such as going on after a break, is another run
        epoch = next(self._run, None)
        if epoch is None:
            raise UsageError(
                f"the experiment's {self.experiment.spec.num_epochs} epochs are done: there is no next one"
            )
        self._epoch = epoch
        self._position = Position(epoch.number, epoch.first_step)
        return epoch

    def _losses_missing(self) -> UsageError:
        due = self._pending[0].step.batch
        return UsageError(
            f"the losses of step {due.step} of epoch {due.epoch} were not handed over: call loader.mean(losses) for "
            "every batch. A trainer that takes several batches ahead needs read_ahead"
        )

    def _leave_run(self) -> None:
        self._pending.clear()
        if self._position is not None:
            self._position = self.position
        self._epoch = None
        if self._run is not None:
            self._run.close()
            self._run = None

    def _micro_batches(self, batch: Batch, data: Any) -> Iterator[Any]:
        """Score a loaded batch if it selects, and yield what there is to train on."""
        chosen = batch.select(self._scored(batch, data)) if batch.selects else batch.all()
        num_rows = len(chosen.positions)
        size = min(self._micro_batch_size or num_rows, num_rows)
        weights = None
        if self.experiment.spec.importance_weight != "none":
            weights = torch.from_numpy(chosen.importance_weights)
        step = _Step(batch, num_rows, -(-num_rows // size))
        for first in range(0, num_rows, size):
            positions = chosen.positions[first : first + size]
            self._pending.append(
                _MicroBatch(step, len(positions), None if weights is None else weights[first : first + size])
            )
            is_whole = len(positions) == len(batch.sample_ids)
            yield data if is_whole else self._rows(data, torch.from_numpy(positions), batch)

    def _rows(self, data: Any, positions: torch.Tensor, batch: Batch) -> Any:
        return self._take(data, positions) if self._take else take_rows(data, positions, len(batch.sample_ids))

    def _scored(self, batch: Batch, data: Any) -> torch.Tensor:
        """The losses of a meta-batch, [m]."""
        assert self._score is not None
        num_rows = len(batch.sample_ids)
        size = min(self._micro_batch_size or num_rows, num_rows)
        losses = []
        with torch.no_grad(), _undisturbed(self._model):
            for first in range(0, num_rows, size):
                positions = torch.arange(first, min(first + size, num_rows))
                scored = self._score(data if size == num_rows else self._rows(data, positions, batch))
                losses.append(_checked(scored, len(positions)))
        return torch.cat(losses)


class _PlannedBatches:
    """The batch sampler of the DataLoader: the sample ids of an epoch's steps, which it takes ahead of training."""

    def __init__(self) -> None:
        self.taken: deque[Batch] = deque()
        self._epoch: Epoch | None = None

    def begin(self, epoch: Epoch) -> None:
        self._epoch = epoch
        self.taken.clear()

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self._epoch
        assert epoch is not None
        while (batch := epoch.next_batch()) is not None:
            self.taken.append(batch)
            yield batch.sample_ids.tolist()


def _checked(losses: torch.Tensor, num_rows: int) -> torch.Tensor:
    if not isinstance(losses, torch.Tensor):
        raise InvalidArgumentError(f"losses={losses!r}: expected a tensor of {num_rows} losses", field="losses")
    if losses.shape != (num_rows,):
        raise InvalidArgumentError(
            f"losses have shape {tuple(losses.shape)}, expected ({num_rows},): one loss a sample of the batch. "
            'Compute them without reduction (reduction="none"), and average what belongs to one sample',
            field="losses",
        )
    return losses


def _check_dataset(dataset: Dataset[Any], experiment: Experiment) -> None:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise InvalidArgumentError(
            f"dataset={type(dataset).__name__}: expected a map-style dataset, with __getitem__ and __len__: samples "
            "are loaded by their ids",
            field="dataset",
        )
    num_samples = len(dataset) if hasattr(dataset, "__len__") else experiment.spec.num_samples
    if num_samples != experiment.spec.num_samples:
        raise InvalidArgumentError(
            f"dataset has {num_samples:,} samples, experiment {experiment.name!r} was created for "
            f"{experiment.spec.num_samples:,}",
            field="dataset",
        )


@contextlib.contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Put the model's buffers and PyTorch's random state back afterwards."""
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


def take_rows(batch: Any, positions: torch.Tensor, num_rows: int) -> Any:
    """Rows of a collated batch, whatever its nesting.

    Of tensors and arrays it takes rows of the first dimension; scalars and other leaves stay as they are. Mappings,
    dataclasses, named tuples, lists and tuples are gone into, but a list or tuple of `num_rows` elements that are not
    columns themselves (such as the strings that `default_collate` leaves alone) holds one element a sample. A list of
    samples that look like columns, such as n tensors of n rows, needs the loader's `take`.

    Args:
        batch: what a `collate_fn` made.
        positions: int64 [k].
        num_rows: samples in the batch.

    Raises:
        InvalidArgumentError: a tensor or array whose first dimension is not `num_rows`.
    """
    if isinstance(batch, (torch.Tensor, np.ndarray)):
        if not batch.ndim:
            return batch
        if len(batch) != num_rows:
            raise InvalidArgumentError(
                f"the batch has a column of shape {tuple(batch.shape)}, expected {num_rows} rows: pass the loader "
                "take=..., a function that picks the rows of such batches",
                field="take",
            )
        return batch[positions.to(batch.device)] if isinstance(batch, torch.Tensor) else batch[positions.numpy()]
    is_sequence = isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields")
    if is_sequence and len(batch) == num_rows and not _holds_columns(_children(batch), num_rows):
        return type(batch)(batch[position] for position in positions.tolist())
    return _with_children(batch, lambda child: take_rows(child, positions, num_rows))


def _holds_columns(values: Iterable[Any], num_rows: int) -> bool | None:
    """Whether these are columns of a batch rather than `num_rows` samples; None if nothing tells."""
    found = None
    for value in values:
        if isinstance(value, (torch.Tensor, np.ndarray)):
            is_column = len(value) == num_rows if value.ndim else None
        else:
            is_column = _holds_columns(_children(value), num_rows)
            if is_column is None and isinstance(value, (list, tuple)) and len(value) == num_rows:
                is_column = True  # such as strings, one a sample
        if is_column is False:
            return False
        found = found or is_column
    return found


def _children(batch: Any) -> Iterable[Any]:
    if isinstance(batch, Mapping):
        return batch.values()
    if isinstance(batch, (list, tuple)):
        return batch
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    return ()


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if hasattr(batch, "to"):
        return batch.to(device)
    return _with_children(batch, lambda child: _moved(child, device))


def _with_children(batch: Any, function: Callable[[Any], Any]) -> Any:
    """A container made anew with a function applied to its elements; what is no container as it is."""
    if isinstance(batch, Mapping):
        children = {key: function(value) for key, value in batch.items()}
        if not isinstance(batch, MutableMapping):
            return children
        made = copy.copy(batch)  # some mappings can't be made from another, such as defaultdict
        made.update(children)
        return made
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(function, batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map(function, batch))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {field.name: function(getattr(batch, field.name)) for field in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **fields)
    return batch
