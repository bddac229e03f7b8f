"""The `Trainer` of transformers, on what an experiment selects."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, seed_worker

from evosample.client import Experiment
from evosample.epoch import as_invalid_argument
from evosample.errors import InvalidArgumentError, UsageError
from evosample.huggingface.losses import ModelLosses
from evosample.torch import Loader, MetaBatch

_POSITION_FILE = "evosample.json"
_DEFAULT_NUM_EPOCHS: float = transformers.TrainingArguments.num_train_epochs


class Trainer(transformers.Trainer):
    """A `transformers.Trainer` that trains on what an experiment selects, for as many epochs as that has.

    A step of the trainer is one of the experiment: it back-propagates the mini-batch in micro-batches of
    `args.per_device_train_batch_size`, whose gradients add up; where steps score, it loads and scores the meta-batch
    first. Evaluation, prediction, callbacks, logs and checkpoints are those of the plain trainer. The loss logged is
    the mean over the chosen rows, and they alone are counted as `num_input_tokens_seen`.

    `args.max_steps`, `num_train_epochs` and `gradient_accumulation_steps` follow from the experiment and are filled in,
    in a copy: schedules go by `experiment.total_steps`, and epochs may have different numbers of steps. A checkpoint
    holds the position as well, and the server keeps the epoch of the latest one: `train` goes on bit by bit with
    `resume_from_checkpoint`.

    Where processes share the work (torchrun, `accelerate launch`; DDP or FSDP), each takes its part of every step.

    Args:
        model, args: as of the plain trainer.
        experiment: made by a client; has as many samples as `train_dataset`, which must be map-style.
        per_sample_losses: takes the model as it is trained (wrapped, in training mode) and inputs on its device, and
            returns their losses, [m], one a sample, with their graph. Used for training (and, without gradients, for
            scoring), where the plain trainer uses `compute_loss`: that is left to evaluation. Default: the losses that
            the model's own loss is the mean of, see `evosample.huggingface.losses.ModelLosses`.
        loader_options: what `evosample.torch.Loader` takes besides, such as {"predict_saving": True}.
        **options: what the plain trainer takes besides.

    Attributes:
        experiment: what it was made with.
        loader: the loader of the training that runs, or ran last: its position, progress and figures.

    Raises:
        InvalidArgumentError: an argument contradicts the experiment, or asks for what it decides.
    """

    loader: Loader
    loss_is_scaled_for_ga = True  # Loader.mean divides by the rows of the whole mini-batch

    def __init__(
        self,
        model: Any = None,
        args: transformers.TrainingArguments | None = None,
        *,
        experiment: Experiment,
        per_sample_losses: Callable[[Any, Any], torch.Tensor] | None = None,
        loader_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        args = copy.copy(args) if args is not None else transformers.TrainingArguments("tmp_trainer")
        self.experiment = experiment
        self._loader_options = dict(loader_options or {})
        _check_arguments(args, experiment)
        if type(self).compute_loss is not Trainer.compute_loss:
            raise InvalidArgumentError(
                f"{type(self).__name__} overrides compute_loss, which gives one number a batch: selection needs the "
                "loss of each sample. Pass per_sample_losses=..., a function of (model, inputs) that returns them, [m]",
                field="per_sample_losses",
            )
        if per_sample_losses is None and (args.label_smoothing_factor or options.get("compute_loss_func")):
            raise InvalidArgumentError(
                "label_smoothing_factor and compute_loss_func change a batch's loss, and are for evaluation: pass also "
                "per_sample_losses=..., a function of (model, inputs) that returns the loss of each sample, [m]",
                field="per_sample_losses",
            )
        spec = experiment.spec
        args.max_steps, args.num_train_epochs = spec.total_steps, spec.num_epochs
        args.ignore_data_skip = True  # the loader begins where training stopped
        args.gradient_accumulation_steps = _num_micro_batches(args, spec.meta_batch_size)
        super().__init__(model, args, **options)
        is_known = type(self.model).__module__.startswith("transformers.")  # to do without labels
        config = getattr(self.model, "config", None)
        self._per_sample_losses = per_sample_losses or ModelLosses(
            keeps_labels=not is_known or bool(getattr(config, "is_encoder_decoder", False))
        )

    # Loading and scoring

    def get_train_dataloader(self) -> Any:
        """A new `evosample.torch.Loader` of the training set: each process loads its part, nothing shards it again."""
        if self.train_dataset is None:
            raise InvalidArgumentError("train_dataset=None: training needs one", field="train_dataset")
        args = self.args
        options: dict[str, Any] = {
            "collate_fn": self._get_collator_with_removed_columns(self.data_collator, description="training"),
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory,
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "multiprocessing_context": args.dataloader_multiprocessing_context,
            "worker_init_fn": functools.partial(
                seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
            ),
        }
        return Loader(
            self.train_dataset,
            self.experiment,
            model=cast(torch.nn.Module, self.model),
            score=self._score,
            micro_batch_size=args.train_batch_size,
            read_ahead=0,
            **(options | self._loader_options),
        )

    def _score(self, inputs: Any) -> torch.Tensor:
        with self.compute_loss_context_manager():
            return self._per_sample_losses(self.model_wrapped, self._prepare_inputs(inputs))

    def get_batch_samples(
        self, epoch_iterator: Iterator[MetaBatch], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """The micro-batches of the next step, once it is scored; none if the epoch ends before."""
        meta_batch = next(epoch_iterator, None)
        if meta_batch is None:
            return [], None
        self.model_wrapped.train()  # it may come from an evaluation, and is scored as it is trained
        if callable(switch := getattr(self.optimizer, "train", None)):
            switch()
        if meta_batch.planned.selects:  # a forward pass is a third of what floating_point_ops counts
            self.current_flos += self.floating_point_ops(meta_batch.data) // 3
        return list(self.loader.micro_batches(meta_batch.to(device))), None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """In training the loss to back-propagate; with `return_outputs`, as in evaluation, the model's own."""
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        return self.loader.mean(self._per_sample_losses(model, inputs))

    # Epochs, whose steps and micro-batches the experiment decides

    def set_initial_training_values(
        self, args: transformers.TrainingArguments, dataloader: Any
    ) -> tuple[int, int, int, int, int, int | None, int]:
        """What the training loop needs to know; the numbers of an epoch hold for the longest ones."""
        self.loader = dataloader
        spec = self.experiment.spec
        shapes = [spec.shape(epoch) for epoch in range(spec.num_epochs)]
        num_steps = max(shape.num_steps for shape in shapes)
        num_trained = sum(shape.num_steps * shape.trained_rows for shape in shapes)
        steps_in_epoch = num_steps * args.gradient_accumulation_steps
        batch_size = self.get_total_train_batch_size(args)
        return spec.num_epochs, num_steps, spec.num_samples, num_trained, batch_size, steps_in_epoch, spec.total_steps

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None:
            self.loader.load_state_dict(_saved_position(Path(resume_from_checkpoint)))
        elif any(position := self.loader.position):
            raise UsageError(
                f"training is to begin, but experiment {self.experiment.name!r} stands at epoch {position.epoch}: pass "
                "train(resume_from_checkpoint=...), or make an experiment of another name"
            )
        return self.loader.position.epoch, 0

    def _run_epoch(self, *, epoch: int, **values: Any) -> None:  # type: ignore[override]
        if self.loader.position.epoch > epoch:  # resumed with on_missing_epoch="current"
            return
        self.loader.model = self.model_wrapped  # which it was not yet when the loader was made
        meta_batches = self.loader.meta_batches()
        begin = self.loader.position
        shape = self.experiment.spec.shape(begin.epoch)
        self.args.gradient_accumulation_steps = _num_micro_batches(self.args, shape.trained_rows)
        is_first = epoch == values["epochs_trained"]
        from_epoch = begin.epoch + begin.step / shape.num_steps
        super()._run_epoch(  # type: ignore[no-untyped-call]
            **values
            | {
                "epoch": from_epoch,
                "train_dataloader": meta_batches,
                "steps_in_epoch": shape.num_steps * self.args.gradient_accumulation_steps,
                "num_update_steps_per_epoch": shape.num_steps - begin.step,
                # Where these say so, the random state of the checkpoint is loaded.
                "epochs_trained": from_epoch if is_first else None,
                "steps_trained_in_current_epoch": 0,
            }
        )
        has_broken_off = self.control.should_epoch_stop and not self.control.should_training_stop
        if has_broken_off and self.loader.position.epoch == begin.epoch:
            raise UsageError(
                f"a callback has set should_epoch_stop before the end of epoch {begin.epoch}: the epochs of an "
                "experiment are gone through to their end. Use should_training_stop"
            )
        end = self.loader.position
        if end.epoch == begin.epoch and not self.control.should_training_stop:
            status = self.experiment.status()
            if status.epoch == end.epoch and end.step < status.num_steps:
                raise UsageError(
                    f"epoch {end.epoch} has {status.num_steps} steps, more than at the beginning: samples were "
                    "added. Start the job again, from its last checkpoint"
                )

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        position = self.loader.state_dict()  # every loss of this process is in the store
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _POSITION_FILE).write_text(json.dumps(position))
        super()._save_checkpoint(model, trial)


def _check_arguments(args: transformers.TrainingArguments, experiment: Experiment) -> None:
    spec = experiment.spec
    if spec.policy.is_adaptive or spec.policy.reported_columns:
        raise InvalidArgumentError(
            f"{type(spec.policy).__name__} decides epoch by epoch how many steps there are, or needs more than losses, "
            "and the trainer has no place for that: train with evosample.torch.Loader",
            field="experiment",
        )
    with as_invalid_argument():
        spec.check_world_size(args.world_size)
    num_micro_batches = _num_micro_batches(args, spec.meta_batch_size)
    by_experiment = f"it is up to experiment {experiment.name!r}"
    accumulated = (
        f"meta_batch_size {spec.meta_batch_size:,} on {args.world_size} processes makes {num_micro_batches} "
        f"micro-batches of per_device_train_batch_size {args.per_device_train_batch_size}. Leave it out"
    )
    checks: list[tuple[str, bool, str]] = [
        ("max_steps", args.max_steps in (-1, spec.total_steps), f"{by_experiment}, which has {spec.total_steps:,}"),
        (
            "num_train_epochs",
            args.num_train_epochs in (_DEFAULT_NUM_EPOCHS, spec.num_epochs),
            f"{by_experiment}, which has {spec.num_epochs:,}. Leave it out",
        ),
        ("gradient_accumulation_steps", args.gradient_accumulation_steps in (1, num_micro_batches), accumulated),
        ("train_sampling_strategy", args.train_sampling_strategy == "random", f"{by_experiment}. Leave it out"),
        ("dataloader_in_order", args.dataloader_in_order, "steps are loaded in their order. Leave it out"),
        (
            "auto_find_batch_size",
            not args.auto_find_batch_size,
            "a step that was begun can't be begun again. Try per_device_train_batch_size out before",
        ),
        ("n_gpu", args.n_gpu <= 1, "one process takes one device. Start one for each, with torchrun"),
        ("deepspeed", not args.deepspeed, "it wants equally many micro-batches in all steps. Use DDP or FSDP"),
        ("parallelism_config", not args.parallelism_config, "processes must not share samples. Use DDP or FSDP"),
    ]
    for field, is_right, why in checks:
        if not is_right:
            raise InvalidArgumentError(f"{field}={getattr(args, field)!r}: {why}", field=field)


def _num_micro_batches(args: transformers.TrainingArguments, num_rows: int) -> int:
    """Of a step that trains on `num_rows` rows over all processes."""
    step_rows: int = args.world_size * args.train_batch_size
    return math.ceil(num_rows / step_rows)


def _saved_position(checkpoint: Path) -> dict[str, Any]:
    try:
        position: dict[str, Any] = json.loads((checkpoint / _POSITION_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise InvalidArgumentError(
            f"resume_from_checkpoint={str(checkpoint)!r}: its {_POSITION_FILE}, which holds the position in the "
            "experiment, is missing or damaged: expected a checkpoint that evosample.huggingface.Trainer has saved",
            field="resume_from_checkpoint",
        ) from error
    return position
