"""What an experiment is: its sizes, its policy and its seed; and what follows from them for every epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

import numpy as np

from evosample.sampling.checks import InvalidValue, check_int, check_ratio
from evosample.sampling.groups import MAX_GROUPS, DoReMi, Groups, Mixture, floor_sizes
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
        num_steps: whole steps; the rows that fill no step are dropped.
        step_rows: rows that a step visits.
        trained_rows: rows of a selecting step that are back-propagated; the other steps train on all rows.
        selecting_interval: every how many steps one selects, beginning with the first.
        num_hidden_steps: the last of the steps, whose rows are only scored.
        is_annealing: nothing is pruned or selected.
    """

    num_steps: int
    step_rows: int
    trained_rows: int
    selecting_interval: int
    num_hidden_steps: int
    is_annealing: bool

    @property
    def num_rows(self) -> int:
        """Rows of the epoch's table."""
        return self.num_steps * self.step_rows

    @property
    def num_training_steps(self) -> int:
        """Steps that train: all but the hidden ones."""
        return self.num_steps - self.num_hidden_steps

    @property
    def num_training_rows(self) -> int:
        """Rows of the steps that train."""
        return self.num_training_steps * self.step_rows

    @property
    def num_selecting_steps(self) -> int:
        """Steps that draw their mini-batch from the losses of a scoring pass."""
        return -(-self.num_training_steps // self.selecting_interval) if self.selects else 0

    @property
    def num_trained(self) -> int:
        """Rows of the epoch that are back-propagated."""
        return self.num_training_rows - self.num_selecting_steps * (self.step_rows - self.trained_rows)

    @property
    def selects(self) -> bool:
        """Whether there are steps that draw their mini-batch from the losses of a scoring pass."""
        return self.trained_rows < self.step_rows

    def step_trains(self, step: int) -> bool:
        """Whether a step trains on some of its rows: all but the hidden ones do."""
        return step < self.num_training_steps

    def step_selects(self, step: int) -> bool:
        """Whether a step draws its mini-batch from the losses of a scoring pass; if not, it trains on all its rows."""
        return self.selects and step % self.selecting_interval == 0 and self.step_trains(step)


@dataclass(frozen=True, kw_only=True)
class ExperimentSpec:
    """Everything that is fixed when an experiment is created. Two servers given equal specs plan equal epochs.

    Args:
        num_samples: n, samples of the dataset; sample ids are 0..n-1.
        num_epochs: epochs of the whole run. An epoch visits what the policy keeps: with the default policy a quarter of
            the dataset.
        mini_batch_size: b, rows that a step back-propagates, over all ranks: your batch size.
        meta_batch_size: B, rows that a step loads and scores, over all ranks, to draw the mini-batch from them.
            Default: b, so that no step scores; so with a policy that draws no mini-batches. Given alone it is b, too.
        policy: the selection method. Default: ES without a scoring pass; with B > b, ES as published.
        importance_weight: "none" (all ones), "unbiased" (mean(importance_weight * loss) over a mini-batch estimates
            the mean loss over the dataset) or "self_normalized" (the same, scaled to a mean of 1 in a mini-batch).
        seed: 0 <= seed < 2**64.
        warm_start: scores will be imported: selection begins with the first epoch.
        max_skipped_epochs: a sample that has had no finite loss in so many epochs in a row is visited, whatever the
            policy would do; from 1 to 254. Where an epoch has no room for all, chance decides. Default, 0: none is.
        num_groups: G, groups that samples belong to, such as classes or domains; ids are 0..G-1. Default, 0: none.
        group_floor: share of each group that every epoch keeps at least, in [0, 1). Default, 0: none.
        mixture: each group's share of what an epoch keeps; it needs pruning. Default: as the policy has it.
        loss_clip_quantile: losses above this quantile count as that, in (0, 1]: of an epoch's losses when they are
            taken into the scores, of a part's losses in the draw of a mini-batch. Wrongly labelled samples often have
            the highest. Default, 1: losses count as they are.
        shard_sizes: samples of each shard of the dataset, whose ids follow each other. Epochs are then shuffled so that
            shards are read nearly one after the other. Default: none, and one shuffle over all samples.
        shuffle_block_samples: over how many samples of the dataset such a shuffle goes, in whole shards; the more, the
            less alike the samples of a batch, and the more shards are read at a time. Default: ten shards of mean size.

    Raises:
        InvalidValue: a value is out of range, an epoch could have no step, or no step would ever select.
    """

    num_samples: int
    num_epochs: int
    mini_batch_size: int = cast(int, None)
    meta_batch_size: int = cast(int, None)
    policy: Policy = EvolvedSampling()
    importance_weight: ImportanceWeight = "none"
    seed: int = 0
    warm_start: bool = False
    max_skipped_epochs: int = 0
    num_groups: int = 0
    group_floor: float = 0.0
    mixture: Mixture | None = None
    loss_clip_quantile: float = 1.0
    shard_sizes: tuple[int, ...] = field(default=(), repr=False)
    shuffle_block_samples: int = cast(int, None)

    def __post_init__(self) -> None:
        check = self._check_int
        check("num_samples", 1, MAX_SAMPLES)
        check("num_epochs", 1, MAX_EPOCHS)
        self._check_batch_sizes()
        check("seed", 0, 2**64 - 1)
        if not isinstance(self.warm_start, bool):
            raise InvalidValue("warm_start", self.warm_start, "True or False")
        check("max_skipped_epochs", 0, 254)
        check_ratio("loss_clip_quantile", self.loss_clip_quantile, high_inclusive=True)
        if not self.loss_clip_quantile:
            raise InvalidValue("loss_clip_quantile", self.loss_clip_quantile, "more than 0: 1 clips nothing")
        if self.importance_weight not in get_args(ImportanceWeight):
            raise InvalidValue(
                "importance_weight", self.importance_weight, f"one of {', '.join(get_args(ImportanceWeight))}"
            )
        self._check_importance_weight()
        self._check_shards()
        self._check_groups()
        self._check_selects()

    def _check_batch_sizes(self) -> None:
        if not isinstance(self.policy, Policy):
            raise InvalidValue("policy", self.policy, "a policy, such as evosample.EvolvedSampling(prune_ratio=0.2)")
        if self.mini_batch_size is None and self.meta_batch_size is None:
            raise InvalidValue("mini_batch_size", None, "your batch size: how many samples a step trains on")
        for name, other in (("mini_batch_size", "meta_batch_size"), ("meta_batch_size", "mini_batch_size")):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self, other))
            self._check_int(name, 1, MAX_META_BATCH_SIZE)
        if self.mini_batch_size > self.meta_batch_size:
            raise InvalidValue(
                "mini_batch_size", self.mini_batch_size, f"at most meta_batch_size, {self.meta_batch_size:,}"
            )
        if self.policy.batch_level != "scored":
            object.__setattr__(self, "meta_batch_size", self.mini_batch_size)
        if self.meta_batch_size > self.num_samples:
            name = "meta_batch_size" if self.selects else "mini_batch_size"
            raise InvalidValue(name, self.meta_batch_size, f"at most num_samples, {self.num_samples:,}")
        object.__setattr__(self, "policy", self.policy.with_defaults(selects=self.selects))

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

    def _check_groups(self) -> None:
        self._check_int("num_groups", 0, 2**32)
        if self.num_groups > MAX_GROUPS:
            raise InvalidValue("num_groups", self.num_groups, f"groups of ids from 0 to {MAX_GROUPS - 1:,} at most")
        check_ratio("group_floor", self.group_floor, high_inclusive=False)
        if not self.num_groups and (self.group_floor or self.mixture):
            raise InvalidValue("groups", None, "the group of each sample, which group_floor and mixture go by")
        if self.group_floor * self.num_samples > self.least_rows:
            raise InvalidValue(
                "group_floor",
                self.group_floor,
                f"at most {self.least_rows / self.num_samples:.4g}, the share of all samples that an epoch visits",
            )
        if self.mixture is None:
            return
        if type(self.mixture) not in (Mixture, DoReMi):
            raise InvalidValue("mixture", self.mixture, "evosample.Mixture(weights=...) or evosample.DoReMi()")
        if self.mixture.weights and len(self.mixture.weights) != self.num_groups:
            raise InvalidValue("mixture.weights", self.mixture.weights, f"{self.num_groups}: one for each group")
        if self.policy.is_adaptive or not self.policy.prune_ratio:
            raise InvalidValue(
                "mixture",
                self.mixture,
                "a policy with prune_ratio > 0, such as RandomSubset(prune_ratio=0.5): where an epoch keeps "
                "everything, each group's share is that of its samples",
            )

    @property
    def least_rows(self) -> int:
        """Rows of the shortest epoch that there can be; of an adaptive policy, which may keep fewer, of the longest."""
        return min(self._shape(is_annealing=True).num_rows, self._shape(is_annealing=False).num_rows)

    def _check_importance_weight(self) -> None:
        policy = self.policy
        draws = [policy.set_draw] * bool(policy.prune_ratio) + [policy.batch_draw] * self.selects
        if self.importance_weight != "none" and (not policy.keeps_at_random or "top_k" in draws):
            raise InvalidValue(
                "importance_weight",
                self.importance_weight,
                f"none: {type(policy).__name__} takes the highest (or lowest) without chance, so what it leaves out "
                "has no inclusion probability, and no weight makes up for it",
            )

    def _check_selects(self) -> None:
        policy = self.policy
        if isinstance(policy, Uniform):
            return
        if not (self.selects or policy.prune_ratio or policy.is_adaptive):
            raise InvalidValue(
                "policy",
                policy,
                "a policy with prune_ratio > 0, or one that draws mini-batches and a meta_batch_size above "
                f"mini_batch_size, {self.mini_batch_size:,} (four times as much is usual): like this nothing would "
                "ever be selected. To train on everything use Uniform()",
            )
        if not self.selects and not policy.is_adaptive and self.num_places == self.num_samples:
            if self.num_samples == self.meta_batch_size:
                raise InvalidValue(
                    "num_samples",
                    self.num_samples,
                    f"more than one step of {self.meta_batch_size:,}: an epoch would always be the whole dataset, and "
                    "nothing would ever be selected. Take a smaller batch size; to train on everything use Uniform()",
                )
            raise InvalidValue(
                "prune_ratio",
                policy.prune_ratio,
                f"a ratio that leaves out one of the {self.num_samples:,} samples at least: nothing would ever be "
                "selected. To train on everything use Uniform()",
            )
        if isinstance(policy, EvolvedSampling) and not self.selects:
            self._check_comes_back(policy)
        if self.num_annealing_epochs == self.num_epochs:
            raise InvalidValue(
                "num_epochs",
                self.num_epochs,
                f"enough epochs that one is not annealing: with {policy} all are, so nothing would ever be selected. "
                "To train on everything use Uniform()",
            )

    def _check_comes_back(self, policy: EvolvedSampling) -> None:
        if policy.set_draw == "top_k" and not self.max_skipped_epochs:
            raise InvalidValue(
                "set_draw",
                policy.set_draw,
                "successive or systematic, or max_skipped_epochs=... as well (20, say): no step scores what an epoch "
                "leaves out, so samples whose weight falls below the highest would never come back",
            )

    @property
    def num_places(self) -> int:
        """How many samples an epoch that is not annealing keeps; an adaptive policy may keep fewer.

        (1 - r) * n; where that would fill no step, one step.
        """
        # floor(r * n), but 0.7 * 10 is a little over or under 7 in floating point
        num_kept = self.num_samples - math.floor(self.policy.prune_ratio * self.num_samples + 1e-9)
        return max(num_kept, self.meta_batch_size)

    @property
    def num_annealing_epochs(self) -> int:
        """How many of the epochs are annealing."""
        return self._num_annealing_before(self.num_epochs)

    def _num_annealing_before(self, epoch: int) -> int:
        first, last = self.policy.annealing_ends(self.num_epochs, warm_start=self.warm_start)
        return min(epoch, first) + max(0, epoch - max(first, self.num_epochs - last))

    def is_annealing(self, epoch: int) -> bool:
        """Whether nothing is pruned or selected in `epoch`."""
        first, last = self.policy.annealing_ends(self.num_epochs, warm_start=self.warm_start)
        return not first <= epoch < self.num_epochs - last

    def shape(self, epoch: int, num_kept: int | None = None, num_hidden: int = 0) -> EpochShape:
        """The sizes of `epoch`, 0 <= epoch < num_epochs.

        Args:
            num_kept, num_hidden: samples that the epoch keeps, and that it only scores. Default: as the spec has it,
                which for an adaptive policy is the most that it may be.
        """
        return self._shape(num_kept, num_hidden, is_annealing=self.is_annealing(epoch))

    def _shape(self, num_kept: int | None = None, num_hidden: int = 0, *, is_annealing: bool) -> EpochShape:
        meta_batch_size = self.meta_batch_size
        if num_kept is None:
            num_kept = self.num_samples if is_annealing else self.num_places
        num_hidden_steps = num_hidden // meta_batch_size
        return EpochShape(
            num_steps=num_kept // meta_batch_size + num_hidden_steps,
            step_rows=meta_batch_size,
            trained_rows=meta_batch_size if is_annealing else self.mini_batch_size,
            selecting_interval=self.policy.selecting_interval,
            num_hidden_steps=num_hidden_steps,
            is_annealing=is_annealing,
        )

    def _shapes_before(self, epoch: int) -> tuple[tuple[int, EpochShape], tuple[int, EpochShape]]:
        """How many of the epochs before `epoch` are annealing, with their shape, and how many are not, with theirs."""
        num_annealing = self._num_annealing_before(epoch)
        return (
            (num_annealing, self._shape(is_annealing=True)),
            (epoch - num_annealing, self._shape(is_annealing=False)),
        )

    def num_steps_before(self, epoch: int) -> int:
        """Steps of the epochs before `epoch`, 0 <= epoch <= num_epochs."""
        return sum(count * shape.num_steps for count, shape in self._shapes_before(epoch))

    def num_rows_before(self, epoch: int) -> int:
        """Rows that the epochs before `epoch` visit, 0 <= epoch <= num_epochs."""
        return sum(count * shape.num_rows for count, shape in self._shapes_before(epoch))

    def num_trained_before(self, epoch: int) -> int:
        """Rows that the epochs before `epoch` back-propagate, 0 <= epoch <= num_epochs."""
        return sum(count * shape.num_trained for count, shape in self._shapes_before(epoch))

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.num_steps_before(self.num_epochs)

    @property
    def compute_saving(self) -> float:
        """Share of the compute of ordinary training that selection saves, at as many rows visited; 0: it saves none.

        A backward pass is taken to cost two forward passes. A step that selects then costs B + 3 b where training on
        its B rows would cost 3 B.
        """
        cost, visited = 0, 0
        for count, shape in self._shapes_before(self.num_epochs):
            num_scored = shape.num_selecting_steps * shape.step_rows
            cost += count * (num_scored + 3 * shape.num_trained)
            visited += count * shape.num_rows
        return max(1 - cost / (3 * visited), 0.0)

    def extent(self) -> str:
        """The size of the whole run in words."""
        num_rows, num_trained = self.num_rows_before(self.num_epochs), self.num_trained_before(self.num_epochs)
        most = "at most " if self.policy.is_adaptive else ""
        said = f"{self.num_epochs:,} epochs, {most}{self.total_steps:,} steps"
        if self.selects:
            return (
                f"{said}, load {num_rows:,} samples and train on {num_trained:,} of them, which saves about "
                f"{self.compute_saving:.0%} of the compute of training on all"
            )
        passes = num_trained / self.num_samples
        return f"{said} of {self.mini_batch_size:,} samples: as much training as {most}{passes:.3g} ordinary epochs"

    @property
    def selects(self) -> bool:
        """Whether there are epochs whose steps draw their mini-batch from the losses of a scoring pass."""
        return self.policy.batch_level == "scored" and self.mini_batch_size < self.meta_batch_size

    @property
    def has_set_weights(self) -> bool:
        """Whether rows have importance weights from the set level."""
        return self.importance_weight != "none" or self.policy.weighs

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


def check_groups(spec: ExperimentSpec, groups: Groups) -> None:
    """Raises InvalidValue unless an experiment can have these groups, and its epochs have room for their floors."""
    highest = int(groups.ids.max(initial=0))
    if highest >= spec.num_groups:
        raise InvalidValue(
            "groups", highest, f"ids below {spec.num_groups}: how many groups there are is fixed at creation"
        )
    if groups.reference_losses is not None and not np.isfinite(groups.reference_losses).all():
        raise InvalidValue("reference_losses", "not all finite", "finite numbers")
    needed = int(floor_sizes(groups.ids, spec.num_groups, spec.group_floor).sum())
    if needed > spec.least_rows:
        raise InvalidValue(
            "group_floor",
            spec.group_floor,
            f"less: it needs {needed:,} samples an epoch, rounded up group by group, and an epoch visits "
            f"{spec.least_rows:,}",
        )
