"""What an experiment is: its sizes, its policy and its seed; and what follows from them for every epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

import numpy as np

from evosample.sampling.checks import InvalidValue, check_int
from evosample.sampling.policies import EvolvedSampling, Policy, Uniform

MAX_SAMPLES = 2**40
MAX_EPOCHS = 1_000_000
# One step of one rank must fit a message: at most 20 bytes a row, and gRPC takes 4 MiB by default.
MAX_META_BATCH_SIZE = 2**17
MAX_SHARDS = 100_000
_BLOCK_SHARDS = 10

ImportanceWeight = Literal["none", "unbiased", "self_normalized"]


@dataclass(frozen=True)
class EpochShape:
    """The sizes of one epoch, over all ranks.

    Attributes:
        num_kept: samples that the set level keeps, k.
        num_steps: steps of the epoch; the rows that fill no step are dropped.
        step_rows: rows that a step visits.
        trained_rows: rows of a step that are back-propagated.
        is_annealing: nothing is pruned or selected.
    """

    num_kept: int
    num_steps: int
    step_rows: int
    trained_rows: int
    is_annealing: bool

    @property
    def num_rows(self) -> int:
        """Rows of the epoch's table."""
        return self.num_steps * self.step_rows

    @property
    def selects(self) -> bool:
        """Whether a step draws its mini-batch from the losses of a scoring pass."""
        return self.trained_rows < self.step_rows


@dataclass(frozen=True, kw_only=True)
class ExperimentSpec:
    """Everything that is fixed when an experiment is created. Two servers given equal specs plan equal epochs.

    Args:
        num_samples: n, samples of the dataset; sample ids are 0..n-1.
        num_epochs: epochs of the whole run.
        meta_batch_size: B, rows that a step loads, over all ranks.
        mini_batch_size: b, rows of them that are back-propagated, over all ranks. Default: all of them.
        policy: the selection method. Default: ES.
        importance_weight: "none" (all ones), "unbiased" (mean(importance_weight * loss) over a mini-batch estimates
            the mean loss over the dataset) or "self_normalized" (the same, scaled to a mean of 1 in a mini-batch).
        seed: 0 <= seed < 2**64.
        warm_start: scores will be imported: selection begins with the first epoch.
        shard_sizes: samples of each shard of the dataset, whose ids follow each other. Epochs are then shuffled so that
            shards are read nearly one after the other. Default: none, and one shuffle over all samples.
        shuffle_block_samples: over how many samples of the dataset such a shuffle goes, in whole shards; the more, the
            less alike the samples of a batch, and the more shards are read at a time. Default: ten shards of mean size.

    Raises:
        InvalidValue: a value is out of range, an epoch could have no step, or no step would ever select.
    """

    num_samples: int
    num_epochs: int
    meta_batch_size: int
    mini_batch_size: int = cast(int, None)
    policy: Policy = EvolvedSampling()
    importance_weight: ImportanceWeight = "none"
    seed: int = 0
    warm_start: bool = False
    shard_sizes: tuple[int, ...] = field(default=(), repr=False)
    shuffle_block_samples: int = cast(int, None)

    def __post_init__(self) -> None:
        check = self._check_int
        check("num_samples", 1, MAX_SAMPLES)
        check("num_epochs", 1, MAX_EPOCHS)
        check("meta_batch_size", 1, MAX_META_BATCH_SIZE)
        if self.mini_batch_size is None:
            object.__setattr__(self, "mini_batch_size", self.meta_batch_size)
        check("mini_batch_size", 1, MAX_META_BATCH_SIZE)
        check("seed", 0, 2**64 - 1)
        if not isinstance(self.policy, Policy):
            raise InvalidValue("policy", self.policy, "a policy, such as evosample.EvolvedSampling(prune_ratio=0.2)")
        if not isinstance(self.warm_start, bool):
            raise InvalidValue("warm_start", self.warm_start, "True or False")
        if self.importance_weight not in get_args(ImportanceWeight):
            raise InvalidValue(
                "importance_weight", self.importance_weight, f"one of {', '.join(get_args(ImportanceWeight))}"
            )
        if self.mini_batch_size > self.meta_batch_size:
            raise InvalidValue(
                "mini_batch_size", self.mini_batch_size, f"at most meta_batch_size, {self.meta_batch_size:,}"
            )
        if self.meta_batch_size > self.num_samples:
            raise InvalidValue("meta_batch_size", self.meta_batch_size, f"at most num_samples, {self.num_samples:,}")
        if self._num_kept < self.meta_batch_size:
            raise InvalidValue(
                "prune_ratio",
                self.policy.prune_ratio,
                f"a ratio that keeps at least one meta-batch of {self.meta_batch_size:,} samples an epoch; "
                f"this one keeps {self._num_kept:,} of {self.num_samples:,}",
            )
        self._check_shards()
        self._check_selects()

    def _check_int(self, name: str, low: int, high: int) -> None:
        object.__setattr__(self, name, check_int(name, getattr(self, name), low, high))

    def _check_shards(self) -> None:
        try:
            sizes = np.asarray(self.shard_sizes)
        except ValueError:  # nested
            sizes = np.empty(())
        if sizes.ndim != 1 or (sizes.size and sizes.dtype.kind not in "iu"):
            raise InvalidValue("shard_sizes", self.shard_sizes, "the number of samples of each shard, integers")
        if len(sizes) > MAX_SHARDS:
            raise InvalidValue(
                "shard_sizes", f"{len(sizes):,} shards", f"at most {MAX_SHARDS:,}: let several neighbours count as one"
            )
        if sizes.size and (sizes.min() < 1 or sizes.sum() != self.num_samples):
            raise InvalidValue(
                "shard_sizes",
                f"{len(sizes):,} shards of {sizes.min():,} to {sizes.max():,}, in all {sizes.sum():,} samples",
                f"shards of at least 1 and in all num_samples, {self.num_samples:,}, samples",
            )
        block = self.shuffle_block_samples or 0  # as a message says it
        if block and not sizes.size:
            raise InvalidValue("shuffle_block_samples", block, "none without shard_sizes: it goes by whole shards")
        if sizes.size and not block:
            block = min(math.ceil(_BLOCK_SHARDS * self.num_samples / len(sizes)), self.num_samples)
        object.__setattr__(self, "shard_sizes", tuple(sizes.tolist()))
        object.__setattr__(self, "shuffle_block_samples", block)
        self._check_int("shuffle_block_samples", 0, MAX_SAMPLES)

    def _check_selects(self) -> None:
        if isinstance(self.policy, Uniform):
            return
        if self.mini_batch_size == self.meta_batch_size and not self.policy.prune_ratio:
            raise InvalidValue(
                "mini_batch_size",
                self.mini_batch_size,
                f"less than meta_batch_size, {self.meta_batch_size:,} (a quarter is usual), or a policy with "
                "prune_ratio > 0: otherwise nothing would ever be selected. To train on everything use Uniform()",
            )
        if self.num_annealing_epochs == self.num_epochs:
            raise InvalidValue(
                "num_epochs",
                self.num_epochs,
                "enough epochs that one is not annealing (without a warm start the first is, and by default the last): "
                "otherwise nothing would ever be selected. To train on everything use Uniform()",
            )

    @property
    def _num_kept(self) -> int:
        # floor(r * n), but 0.7 * 10 is a little over or under 7 in floating point
        return self.num_samples - math.floor(self.policy.prune_ratio * self.num_samples + 1e-9)

    @property
    def num_annealing_epochs(self) -> int:
        """How many of the epochs are annealing."""
        return self._num_annealing_before(self.num_epochs)

    def _num_annealing_before(self, epoch: int) -> int:
        first, last = self.policy.annealing_ends(self.num_epochs, warm_start=self.warm_start)
        return min(epoch, first) + max(0, epoch - max(first, self.num_epochs - last))

    def shape(self, epoch: int) -> EpochShape:
        """The sizes of `epoch`, 0 <= epoch < num_epochs."""
        if self._num_annealing_before(epoch + 1) > self._num_annealing_before(epoch):
            return self._shape(self.num_samples, self.meta_batch_size, self.meta_batch_size, is_annealing=True)
        step_rows = self.meta_batch_size if self.policy.scores_meta_batch else self.mini_batch_size
        return self._shape(self._num_kept, step_rows, self.mini_batch_size, is_annealing=False)

    def _shape(self, num_kept: int, step_rows: int, trained_rows: int, *, is_annealing: bool) -> EpochShape:
        return EpochShape(num_kept, num_kept // self.meta_batch_size, step_rows, trained_rows, is_annealing)

    def num_steps_before(self, epoch: int) -> int:
        """Steps of the epochs before `epoch`, 0 <= epoch <= num_epochs."""
        num_annealing = self._num_annealing_before(epoch)
        full = self.num_samples // self.meta_batch_size
        return num_annealing * full + (epoch - num_annealing) * (self._num_kept // self.meta_batch_size)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.num_steps_before(self.num_epochs)

    @property
    def selects(self) -> bool:
        """Whether there are epochs whose steps draw their mini-batch from the losses of a scoring pass."""
        return self.policy.scores_meta_batch and self.mini_batch_size < self.meta_batch_size

    def check_world_size(self, world_size: int) -> int:
        """`world_size` as an int; raises InvalidValue unless every rank gets an equal share of B and of b."""
        world_size = check_int("world_size", world_size, 1, self.meta_batch_size)
        if self.meta_batch_size % world_size or self.mini_batch_size % world_size:
            raise InvalidValue(
                "world_size",
                world_size,
                f"a divisor of meta_batch_size, {self.meta_batch_size:,}, and of mini_batch_size, "
                f"{self.mini_batch_size:,}: every rank takes an equal part of each step",
            )
        return world_size
