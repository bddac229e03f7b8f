"""Lightning: a data module with which `Trainer.fit` trains on what an experiment selects.

class Classifier(lightning.LightningModule):
    def training_step(self, batch, batch_idx):
        images, labels = batch
        return self.trainer.datamodule.mean(F.cross_entropy(self(images), labels, reduction="none"))

data = evosample.lightning.DataModule(train_set, experiment, val_dataloaders=val_loader)
lightning.Trainer(max_steps=experiment.total_steps).fit(Classifier(), data)
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import Dataset

from evosample.client import Experiment
from evosample.errors import InvalidArgumentError, UsageError
from evosample.torch import Loader, MetaBatch

__all__ = ["DataModule"]

_log = logging.getLogger("evosample")

_LIGHTNINGS_OWN = {
    "device": "Lightning moves the batches",
    "micro_batch_size": "Trainer(accumulate_grad_batches=...) is Lightning's way",
    "model": "it is the one that is passed to fit",
    "read_ahead": "Lightning trains on one batch at a time",
}


class DataModule(LightningDataModule):
    """The training data of `Trainer.fit`: mini-batches that the selection server chooses.

    `training_step` gets the rows to train on, as the dataset's `collate_fn` made them. It passes the loss of each to
    `mean` and returns what it gets. A trainer's epochs are the experiment's, of whatever length; training ends with the
    last. Checkpoints hold the position, so that `fit(..., ckpt_path=...)` goes on in the middle of an epoch.

    Where steps score, each step's samples are moved to the device and scored by the module's method
    `per_sample_losses`. The scoring pass runs as `training_step` does: through the strategy's wrapper (DDP, FSDP), in
    the trainer's precision. Hooks of the module that change batches (`on_after_batch_transfer` ...) come before it, on
    all samples of a step.

    Args:
        dataset: map-style, with `experiment.spec.num_samples` samples. A subclass may pass None, and set `self.dataset`
            in its `setup`.
        experiment: made by a client.
        score: where steps score, the name of the module's method that takes a batch and returns its losses, [m], one a
            sample. It is called without gradients, must change nothing and can't log.
        val_dataloaders: what `fit` would take; Lightning allows them beside a data module no more.
        **options: what `evosample.torch.Loader` takes besides: collate_fn, num_workers, pin_memory, run_options ...

    Attributes:
        dataset: as passed.
        experiment: as passed; `experiment.total_steps` is the number of training steps, for schedulers.

    Raises:
        InvalidArgumentError: an option is up to Lightning.
    """

    def __init__(
        self,
        dataset: Dataset[Any] | None,
        experiment: Experiment,
        *,
        score: str = "per_sample_losses",
        val_dataloaders: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        for option in sorted(_LIGHTNINGS_OWN.keys() & options.keys()):
            raise InvalidArgumentError(f"{option}={options[option]!r}: {_LIGHTNINGS_OWN[option]}", field=option)
        self.experiment = experiment
        self.dataset = dataset
        self._score = score
        self._options = options
        self._loader: Loader | None = None
        self._model: torch.nn.Module | None = None  # of the loader
        self._state: dict[str, Any] | None = None
        if val_dataloaders is not None:  # else it must look as if not overridden: Lightning then doesn't validate
            self.val_dataloader = functools.partial(_given, val_dataloaders)  # type: ignore[method-assign]

    @property
    def loader(self) -> Loader:
        """The loader of the current `fit`, or of the last: its `position`, `progress` and `figures`.

        Raises:
            UsageError: before the first `fit`.
            InvalidArgumentError: the dataset or the options don't fit the experiment.
        """
        if self._loader is None:
            strategy = self._fitting_trainer().strategy
            assert strategy.model is not None
            self._model = strategy.model
            self._loader = self._new_loader(strategy.model)
            if self._state is not None:
                self._loader.load_state_dict(self._state)
        return self._loader

    def _fitting_trainer(self) -> Trainer:
        if self.trainer is None:
            raise UsageError("the data module has no trainer yet: pass it to Trainer.fit")
        return self.trainer

    def _new_loader(self, model: torch.nn.Module) -> Loader:
        trainer, policy = self._fitting_trainer(), self.experiment.spec.policy
        if policy.hides or policy.reported_columns:
            raise InvalidArgumentError(
                f"{type(policy).__name__} has steps that only score, or needs more than losses, and Lightning's loop "
                "has no place for that: train with evosample.torch.Loader",
                field="experiment",
            )
        scores = self.experiment.spec.selects
        if scores and not callable(getattr(trainer.lightning_module, self._score, None)):
            raise InvalidArgumentError(
                f"{type(trainer.lightning_module).__name__} has no method {self._score}(batch): add one that returns "
                "the loss of each sample, [m], or pass score=... with the name of the one that does",
                field="score",
            )
        place = trainer.distributed_sampler_kwargs  # knows of tensor parallelism, where processes share their data
        parts = {"data_parallel_rank": place["rank"], "data_parallel_size": place["num_replicas"]} if place else {}
        assert self.dataset is not None
        return Loader(
            self.dataset,
            self.experiment,
            model=model,
            score=self._scored if scores else None,
            read_ahead=0,
            **parts | self._options,
        )

    def _scored(self, batch: Any) -> torch.Tensor:
        """The losses of a batch, in the way in which `Strategy.training_step` runs a training step."""
        trainer = self._fitting_trainer()
        strategy, module = trainer.strategy, trainer.lightning_module
        losses: torch.Tensor
        with trainer.precision_plugin.train_step_context():
            if strategy.model is None or strategy.model is module:
                losses = getattr(module, self._score)(batch)
            else:
                losses = strategy._forward_redirection(strategy.model, module, self._score, batch)  # type: ignore[assignment]
        return losses

    def mean(self, losses: torch.Tensor) -> torch.Tensor:
        """Hand over the losses of the batch that `training_step` got, [m], and get the loss to return, a scalar.

        See `evosample.torch.Loader.mean`.
        """
        return self.loader.mean(losses)

    def state_dict(self) -> dict[str, Any]:
        """The position, once every loss before it is in the store: Lightning saves it in checkpoints."""
        return dict(self.loader.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved position; called by Lightning, for `validate` and `test` of a checkpoint as well."""
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        self._state = state_dict
        self._loader = None

    def teardown(self, stage: str) -> None:
        """End what training has started; called by Lightning."""
        if stage == TrainerFn.FITTING and self._loader is not None:
            self._loader.close()

    def train_dataloader(self) -> Any:
        """What Lightning takes its training batches from; called by Lightning.

        Raises:
            InvalidArgumentError: the trainer is to train on something else than whole epochs of the experiment, or the
                dataset or an option doesn't fit.
        """
        trainer = self._fitting_trainer()
        _check_limits(trainer)
        self._check_overrides()
        if self._loader is not None and self._model is not trainer.strategy.model:  # another fit: go on from the last
            self._state, self._loader = self.state_dict(), None
        if self._state is not None and self.loader.position.epoch >= self.experiment.spec.num_epochs:
            return []  # a checkpoint of the end: Lightning says that there is nothing to train on
        _warn_of_an_early_end(trainer, self.loader)
        return _Epochs(self)

    def _check_overrides(self) -> None:
        if self.dataset is None:
            raise InvalidArgumentError("dataset=None: pass one, or set self.dataset in setup()", field="dataset")
        for hook in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
            if getattr(type(self), hook) is not getattr(DataModule, hook):
                raise UsageError(
                    f"{type(self).__name__} overrides {hook}, by which samples are scored and selected: put what "
                    "changes batches into the same method of the LightningModule, which is called on all samples of a "
                    "step before that"
                )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        trainer = self._fitting_trainer()
        if isinstance(batch, MetaBatch):
            batch.data = trainer.precision_plugin.convert_input(batch.data)
        return _with_data(batch, lambda data: trainer.lightning_module.on_before_batch_transfer(data, dataloader_idx))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        module = self._fitting_trainer().lightning_module
        return _with_data(batch, lambda data: module.transfer_batch_to_device(data, device, dataloader_idx))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Score and select, now that a step's turn has come; batches of other loops pass through."""
        module = self._fitting_trainer().lightning_module
        batch = _with_data(batch, lambda data: module.on_after_batch_transfer(data, dataloader_idx))
        if not isinstance(batch, MetaBatch):
            return batch
        try:
            (mini_batch,) = self.loader.micro_batches(batch)
        except UsageError as error:
            raise UsageError(
                f"training_step has to call self.trainer.datamodule.mean(losses) once for every batch: {error}"
            ) from error
        return mini_batch


class _Epochs:
    """A trainer's training data: each pass goes through the next epoch, or through what is left of it.

    It has no length. Lightning would take that of the first epoch for all of them.
    """

    def __init__(self, data: DataModule) -> None:
        self._data = data

    def __iter__(self) -> Iterator[MetaBatch]:
        loader = self._data.loader
        yield from loader.meta_batches()
        # Lightning takes one batch ahead, so this comes before the last step: training ends with it, and it is
        # validated and saved as the last step of any other epoch.
        if loader.figures.epoch == loader.experiment.spec.num_epochs - 1:
            self._data.trainer.should_stop = True  # type: ignore[union-attr]


def _with_data(batch: Any, function: Callable[[Any], Any]) -> Any:
    """A batch with a function applied: to the samples, if it is a meta-batch."""
    if not isinstance(batch, MetaBatch):
        return function(batch)
    batch.data = function(batch.data)
    return batch


def _warn_of_an_early_end(trainer: Trainer, loader: Loader) -> None:
    """After a stop in mid-epoch Lightning takes the epoch for a whole one, too."""
    num_left, max_epochs = loader.experiment.spec.num_epochs - loader.position.epoch, trainer.max_epochs
    if max_epochs is not None and 0 <= max_epochs - trainer.current_epoch < num_left:
        _log.warning(
            "Trainer(max_epochs=%d) has %d epochs left, the experiment %d: its last ones are left out. "
            "With Trainer(max_steps=experiment.total_steps) training ends with the experiment",
            max_epochs,
            max_epochs - trainer.current_epoch,
            num_left,
        )


def _given(dataloaders: Any) -> Any:
    return dataloaders


def _check_limits(trainer: Trainer) -> None:
    limit = trainer.limit_train_batches  # overfit_batches sets it, too
    if not trainer.fast_dev_run and (isinstance(limit, int) or limit != 1.0):  # type: ignore[attr-defined]
        raise InvalidArgumentError(
            f"limit_train_batches or overfit_batches is {limit}: a trainer's epochs are those of the experiment, whole "
            "and of different lengths. Limit all training with max_steps, or try it out with fast_dev_run; to overfit, "
            "create an experiment for a few samples",
            field="limit_train_batches",
        )
