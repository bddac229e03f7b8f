"""Selection methods: what a policy decides, as pure functions of its settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from evosample.sampling.checks import InvalidValue, check_int, check_number, check_ratio
from evosample.sampling.draws import DrawMethod, draw
from evosample.sampling.philox import uniforms
from evosample.sampling.scores import updated_sampling_weights, updated_scores

BatchLevel = Literal["all", "scored"]

Columns = Mapping[str, NDArray[np.float32]]
"""Named float32 columns of some samples, each [m]: "scores", "sampling_weights", and a policy's own."""

_MOST = np.finfo(np.float32).max
_NO_ROWS = np.empty(0, np.int64)

DEFAULT_PRUNE_RATIO = 0.75
"""Of EvolvedSampling without a scoring pass and of RandomSubset: an epoch draws a quarter of the dataset."""


class Kept:
    """What a policy keeps of m samples.

    Attributes:
        rows: int64 [k], ascending.
        inclusion_probabilities: float64 [k]; given as such, or as a function that computes them: where an experiment
            has no importance weights they are not asked for.
        importance_weights: float64 [k], the policy's own; None: all ones. They count with importance_weight="none".
        hidden: int64 [h], ascending: rows that are not kept but scored, without training, at the epoch's end.
    """

    def __init__(
        self,
        rows: NDArray[np.int64],
        inclusion_probabilities: NDArray[np.float64] | Callable[[], NDArray[np.float64]],
        importance_weights: NDArray[np.float64] | None = None,
        hidden: NDArray[np.int64] = _NO_ROWS,
    ) -> None:
        self.rows = rows
        self.importance_weights = importance_weights
        self.hidden = hidden
        self._probabilities = inclusion_probabilities

    @cached_property
    def inclusion_probabilities(self) -> NDArray[np.float64]:
        return self._probabilities() if callable(self._probabilities) else self._probabilities


class Policy:
    """A selection method: everything that it may decide. A policy is its settings, a frozen dataclass without state.

    A method of your own is a subclass: a dataclass(frozen=True, kw_only=True) whose fields are numbers, strings and
    bools and checked in `__post_init__` (raise InvalidValue). What it does not override leaves nothing out, with ES's
    scores to look at. All methods are pure: randomness is what they are given.
    """

    # What is kept of each sample beside its score and its sampling weight: float32 columns, with the value they start
    # at.
    columns: ClassVar[Mapping[str, float]] = {}
    # What clients report beside the loss: float32 columns, one value a row.
    reported_columns: ClassVar[tuple[str, ...]] = ()
    # What a step trains on: "all" of its rows; "scored": where the meta-batch is larger than the mini-batch, rows that
    # are drawn from the losses of a scoring pass.
    batch_level: ClassVar[BatchLevel] = "all"
    # Whether samples without a loss are kept before all others. (Otherwise their sampling weight is the mean of the
    # others': see `starting_scores`.)
    keeps_unvisited: ClassVar[bool] = False
    # Whether `keep` may keep other numbers of samples than (1 - prune_ratio) * n, so that steps are known epoch by
    # epoch.
    is_adaptive: ClassVar[bool] = False
    # Whether `keep` may hide samples, which are scored without training at the epoch's end.
    hides: ClassVar[bool] = False
    # Whether what is kept has inclusion probabilities, so that importance weights can be unbiased.
    keeps_at_random: ClassVar[bool] = True
    # Whether `keep` gives importance weights of its own.
    weighs: ClassVar[bool] = False
    # Every how many steps one selects; the others train on all rows of their meta-batch.
    selecting_interval: int = 1
    # How the set level and the batch level draw.
    set_draw: DrawMethod = "successive"
    batch_draw: DrawMethod = "successive"
    # ES's weights of the past. A policy that has no use for scores keeps these: there is something to look at, and to
    # start from.
    beta1: float = 0.2
    beta2: float = 0.9
    # Share of the dataset that an epoch leaves out.
    prune_ratio: float = 0.0

    def with_defaults(self, *, selects: bool) -> Policy:
        """The same policy with the settings filled in whose defaults depend on whether steps select.

        Args:
            selects: whether mini-batches are drawn from the losses of a scoring pass.
        """
        return self

    def annealing_ends(self, num_epochs: int, *, warm_start: bool) -> tuple[int, int]:
        """How many epochs at the beginning of a run, and how many at its end, train on everything.

        In these there is no pruning, no selection and no scoring pass.
        """
        return 0, 0

    def check_reported(self, reported: Columns) -> None:
        """Raises InvalidValue where a reported column has what it can't have; what is not finite is let through."""

    def fold(self, before: Columns, losses: NDArray[np.float32], reported: Columns) -> Columns:
        """The columns of m visited samples after their losses: "scores", "sampling_weights", and the policy's own.

        Called for some of an epoch's samples at a time: what becomes of one is not to depend on the others.

        Args:
            before: as they were, float32 [m] each.
            losses: float32 [m], finite and >= 0.
            reported: the `reported_columns`, float32 [m] each.
        """
        return {
            "scores": updated_scores(before["scores"], losses, self.beta2),
            "sampling_weights": updated_sampling_weights(before["scores"], losses, self.beta1),
        }

    def last_losses(self, columns: Columns) -> NDArray[np.float32]:
        """The losses that visited samples had last, told from what `fold` has made of them: float32 [m].

        NaN where that can't be told: for a policy with a `fold` of its own that keeps no column "last_loss", and for
        beta1 and beta2 that are (nearly) equal, but 0.
        """
        if "last_loss" in columns:
            return columns["last_loss"]
        scores, weights = columns["scores"].astype(np.float64), columns["sampling_weights"].astype(np.float64)
        if type(self).fold is not Policy.fold:
            return np.full(len(scores), np.nan, np.float32)
        if not self.beta1:
            return columns["sampling_weights"]
        if abs(self.beta2 - self.beta1) < 1e-3:  # float32 does not tell it any more
            return np.full(len(scores), np.nan, np.float32)
        # w = beta1 * s0 + (1 - beta1) * l and s = beta2 * s0 + (1 - beta2) * l, without the score s0 before
        losses = (self.beta2 * weights - self.beta1 * scores) / (self.beta2 - self.beta1)
        return np.maximum(losses, 0).astype(np.float32)

    def keep(self, columns: Columns, num_places: int, progress: float, bits: NDArray[np.uint64]) -> Kept:
        """The set level: which of m samples an epoch keeps.

        Args:
            columns: float32 [m] each: what is kept of the samples.
            num_places: how many to keep, 0 <= num_places <= m, for a policy that is not adaptive.
            progress: the share of the run's epochs that have ended.
            bits: uint64 [m], independent random bits.
        """
        drawn = draw(self.set_draw, self.prune_weights(columns), num_places, bits)
        return Kept(drawn.rows, lambda: drawn.inclusion_probabilities)

    def prune_weights(self, columns: Columns) -> NDArray[np.float32]:
        """What the set level's draw is proportional to: float32 [m]. All zero, as here, makes it uniform."""
        return np.zeros_like(columns["scores"])

    def sampling_weights(
        self, prior_scores: NDArray[np.float32], losses: NDArray[np.float32], num_chosen: int
    ) -> NDArray[np.float32]:
        """What the batch level's draw is proportional to, for a part's m rows with a finite loss: float32 [m], >= 0.

        Args:
            prior_scores: float32 [m], scores at the epoch's start.
            losses: float32 [m], finite and >= 0.
            num_chosen: how many of the part's rows will be drawn.
        """
        with np.errstate(over="ignore"):
            return np.minimum(updated_sampling_weights(prior_scores, losses, self.beta1), _MOST)

    def learning_rate_factor(self, num_samples: int, num_hidden: int) -> float:
        """By what the learning rate is to be multiplied in an epoch that hides so many of the samples."""
        return 1.0


class _ByLatestLoss(Policy):
    """A policy whose scores and sampling weights are the samples' latest losses."""

    beta1 = 0.0
    beta2 = 0.0


@dataclass(frozen=True, kw_only=True)
class EvolvedSampling(Policy):
    """Evolved Sampling: samples are drawn in proportion to averages of their losses.

    w_i = beta1 * s_i + (1 - beta1) * l_i,  s_i = beta2 * s_i + (1 - beta2) * l_i. An epoch keeps (1 - prune_ratio) * n
    samples, drawn without replacement in proportion to w.

    Where the mini-batch is the meta-batch (the default), that is all: a step trains on all its rows, and none scores.
    Where it is smaller, a step scores the B samples of its meta-batch in a forward pass and back-propagates b of them,
    drawn in proportion to w as well: ES as published, with `prune_ratio` > 0 ESWP, with beta1 = beta2 = 0 loss-based
    sampling. Settings that are not given are None until an `ExperimentSpec` fills them in.

    A sample without a loss has the mean weight of the others, so it is drawn at least as often as the average sample:
    after E epochs a share of at most prune_ratio^E is expected to be unvisited (`starting_scores` derives it).

    Args:
        beta1: weight of the score in w, in [0, 1].
        beta2: weight of the past in s, in [0, 1]. Default: 0.9; where steps score and epochs are pruned, 0.8.
        prune_ratio: share r of the dataset that an epoch leaves out, in [0, 1); an epoch keeps one step at least.
            Default: 0.75; where steps score, 0.
        annealing: share of the epochs, in [0, 1), that train on everything at either end of the run: the first
            ceil(annealing * num_epochs), but none where scores are imported, and as many at the end. Default: 0; where
            steps score, 0.05.
        set_draw: how an epoch's samples are drawn: "successive", "systematic" or "top_k".
        batch_draw: how a mini-batch is drawn: one of these or "with_replacement".

    Raises:
        InvalidValue: a setting is out of range.

    Source: arXiv 2509.23461, algorithm 1; the defaults where steps score are the paper's.
    """

    batch_level: ClassVar[BatchLevel] = "scored"

    beta1: float = 0.2
    # None until `with_defaults` fills them in: they depend on whether steps score.
    beta2: float = cast(float, None)
    prune_ratio: float = cast(float, None)
    annealing: float = cast(float, None)
    set_draw: DrawMethod = "successive"
    batch_draw: DrawMethod = "successive"

    def __post_init__(self) -> None:
        check_ratio("beta1", self.beta1, high_inclusive=True)
        for name, high_inclusive in (("beta2", True), ("prune_ratio", False), ("annealing", False)):
            if (value := getattr(self, name)) is not None:
                check_ratio(name, value, high_inclusive=high_inclusive)
        methods = get_args(DrawMethod)
        if self.batch_draw not in methods:
            raise InvalidValue("batch_draw", self.batch_draw, f"one of {', '.join(methods)}")
        if self.set_draw not in methods or self.set_draw == "with_replacement":  # an epoch visits a sample at most once
            raise InvalidValue("set_draw", self.set_draw, "one of successive, systematic, top_k")

    def with_defaults(self, *, selects: bool) -> EvolvedSampling:
        prune_ratio = (0.0 if selects else DEFAULT_PRUNE_RATIO) if self.prune_ratio is None else self.prune_ratio
        return replace(
            self,
            beta2=(0.8 if selects and prune_ratio else 0.9) if self.beta2 is None else self.beta2,
            prune_ratio=prune_ratio,
            annealing=(0.05 if selects else 0.0) if self.annealing is None else self.annealing,
        )

    def annealing_ends(self, num_epochs: int, *, warm_start: bool) -> tuple[int, int]:
        share = _num_epochs(self.annealing, num_epochs)
        return 0 if warm_start else share, share

    def prune_weights(self, columns: Columns) -> NDArray[np.float32]:
        return columns["sampling_weights"]


@dataclass(frozen=True, kw_only=True)
class Uniform(Policy):
    """Train on everything: a shuffled pass over the dataset an epoch."""

    def annealing_ends(self, num_epochs: int, *, warm_start: bool) -> tuple[int, int]:
        return num_epochs, 0


@dataclass(frozen=True, kw_only=True)
class RandomSubset(Policy):
    """The baseline that any selection has to beat: EvolvedSampling without a scoring pass, all samples equally likely.

    Args:
        prune_ratio: share r of the dataset that an epoch leaves out, in [0, 1); an epoch keeps one step at least.

    Raises:
        InvalidValue: `prune_ratio` is out of range.
    """

    prune_ratio: float = DEFAULT_PRUNE_RATIO

    def __post_init__(self) -> None:
        check_ratio("prune_ratio", self.prune_ratio, high_inclusive=False)


@dataclass(frozen=True, kw_only=True)
class InfoBatch(_ByLatestLoss):
    """InfoBatch: leaves out easy samples at random, and lets those of them that it keeps count for the others.

    A sample is easy whose latest loss lies under the mean of the latest losses of all samples that have one. Each easy
    sample is left out with probability `ratio`, and has the importance weight 1 / (1 - ratio) if it is kept (with
    importance_weight="unbiased" that is scaled to estimate the mean loss over the dataset). No step scores. From the
    epoch ceil(delta * num_epochs) on nothing is left out.

    Args:
        ratio: probability r that an easy sample is left out, in [0, 1).
        delta: share of the epochs that may leave samples out, in [0, 1].

    Raises:
        InvalidValue: a setting is out of range.

    Source: Qin et al., InfoBatch, ICLR 2024 (arXiv 2303.04947), equations 2 and 3; the defaults are the paper's.
    """

    keeps_unvisited: ClassVar[bool] = True
    is_adaptive: ClassVar[bool] = True
    weighs: ClassVar[bool] = True

    ratio: float = 0.5
    delta: float = 0.875

    def __post_init__(self) -> None:
        check_ratio("ratio", self.ratio, high_inclusive=False)
        check_ratio("delta", self.delta, high_inclusive=True)

    def annealing_ends(self, num_epochs: int, *, warm_start: bool) -> tuple[int, int]:
        return 0 if warm_start else 1, num_epochs - _num_epochs(self.delta, num_epochs)

    def keep(self, columns: Columns, num_places: int, progress: float, bits: NDArray[np.uint64]) -> Kept:
        losses = columns["scores"]
        mean = np.float32(losses.mean(dtype=np.float64)) if len(losses) else np.float32(0)  # equal losses: their value
        easy = losses < mean
        rows = np.flatnonzero(~easy | (uniforms(bits) >= self.ratio))
        probabilities = np.where(easy[rows], 1 - self.ratio, 1.0)
        return Kept(rows, probabilities, 1 / probabilities)


@dataclass(frozen=True, kw_only=True)
class Kakurenbo(_ByLatestLoss):
    """KAKURENBO: hides what is learned already. Hidden samples are scored at the epoch's end, and not trained on.

    Of the F_e * n samples with the lowest latest losses, n those that have one, an epoch hides the ones that were also
    predicted right, with a confidence of at least `min_confidence`. F_e is `max_ratio` times 1, 1, 0.8, 0.6, by steps
    at 30, 60 and 80 % of the epochs. The learning rate is to be multiplied by 1 / (1 - hidden share):
    `epoch.learning_rate_factor`. Clients report for each row "correct" (1 or 0) and "confidence", the probability that
    the model gives to its prediction.

    Args:
        max_ratio: share F of the dataset that is hidden at most, in [0, 1).
        min_confidence: in [0, 1].

    Raises:
        InvalidValue: a setting is out of range.

    Source: Thao Nguyen et al., KAKURENBO, NeurIPS 2023 (arXiv 2310.10102), algorithm 1; the defaults are the paper's.
    """

    columns: ClassVar[Mapping[str, float]] = {"correct": 0.0, "confidence": 0.0}
    reported_columns: ClassVar[tuple[str, ...]] = ("correct", "confidence")
    keeps_unvisited: ClassVar[bool] = True
    is_adaptive: ClassVar[bool] = True
    hides: ClassVar[bool] = True
    keeps_at_random: ClassVar[bool] = False
    _STAGES: ClassVar[tuple[tuple[float, float], ...]] = ((0.8, 0.6), (0.6, 0.8), (0.0, 1.0))

    max_ratio: float = 0.3
    min_confidence: float = 0.7

    def __post_init__(self) -> None:
        check_ratio("max_ratio", self.max_ratio, high_inclusive=False)
        check_ratio("min_confidence", self.min_confidence, high_inclusive=True)

    def annealing_ends(self, num_epochs: int, *, warm_start: bool) -> tuple[int, int]:
        return 0 if warm_start else 1, 0

    def check_reported(self, reported: Columns) -> None:
        for name, allowed in (("correct", "1 where the prediction is right, and 0"), ("confidence", "probabilities")):
            values = reported[name][np.isfinite(reported[name])]
            is_wrong = (values < 0) | (values > 1) | ((name == "correct") & (values != np.round(values)))
            if is_wrong.any():
                raise InvalidValue(name, float(values[np.argmax(is_wrong)]), f"{allowed}; no logits or losses")

    def fold(self, before: Columns, losses: NDArray[np.float32], reported: Columns) -> Columns:
        return {**super().fold(before, losses, reported), **reported}

    def last_losses(self, columns: Columns) -> NDArray[np.float32]:
        return columns["scores"]

    def keep(self, columns: Columns, num_places: int, progress: float, bits: NDArray[np.uint64]) -> Kept:
        num_samples = len(columns["scores"])
        stage = next(factor for begin, factor in self._STAGES if progress >= begin - 1e-9)
        num_lowest = math.floor(self.max_ratio * stage * num_samples + 1e-9)
        hidden = np.zeros(num_samples, np.bool_)
        if num_lowest:
            hidden[draw("top_k", -columns["scores"], num_lowest, bits).rows] = True
        hidden &= (columns["correct"] > 0) & (columns["confidence"] >= np.float32(self.min_confidence))
        rows = np.flatnonzero(~hidden)
        return Kept(rows, np.ones(len(rows)), hidden=np.flatnonzero(hidden))

    def learning_rate_factor(self, num_samples: int, num_hidden: int) -> float:
        return num_samples / (num_samples - num_hidden)


@dataclass(frozen=True, kw_only=True)
class OrderedSGD(_ByLatestLoss):
    """Ordered SGD: a step back-propagates the `mini_batch_size` rows of its meta-batch with the highest losses.

    With several ranks each takes the highest of its own part of the step.

    Source: Kawaguchi and Lu, Ordered SGD, AISTATS 2020 (arXiv 1907.04371), algorithm 1: top q of s, q = b, s = B.
    """

    batch_level: ClassVar[BatchLevel] = "scored"
    batch_draw = "top_k"


@dataclass(frozen=True, kw_only=True)
class UCB(Policy):
    """Dynamic pruning by an upper confidence bound: an epoch keeps the samples of the highest mean + c * variance.

    Both are exponential moving averages over a sample's losses:
    variance = (1 - alpha) * variance + alpha * (l - mean)^2, then mean = (1 - alpha) * mean + alpha * l.
    No step scores.

    Args:
        prune_ratio: share r of the dataset that an epoch leaves out, in [0, 1); an epoch keeps one step at least.
        c: weight of the variance, >= 0.
        alpha: weight of the newest loss, in [0, 1].

    Raises:
        InvalidValue: a setting is out of range.

    Source: Raju, Daruwalla and Lipasti, 2021 (arXiv 2111.12621), section 3.2.
    """

    columns: ClassVar[Mapping[str, float]] = {"variance": 0.0, "last_loss": 0.0}
    keeps_unvisited: ClassVar[bool] = True
    keeps_at_random: ClassVar[bool] = False
    set_draw = "top_k"

    prune_ratio: float = 0.3
    c: float = 1.0
    alpha: float = 0.8

    def __post_init__(self) -> None:
        check_ratio("prune_ratio", self.prune_ratio, high_inclusive=False)
        check_number("c", self.c, 0, 1e6)
        check_ratio("alpha", self.alpha, high_inclusive=True)

    def annealing_ends(self, num_epochs: int, *, warm_start: bool) -> tuple[int, int]:
        return 0 if warm_start else 1, 0

    def fold(self, before: Columns, losses: NDArray[np.float32], reported: Columns) -> Columns:
        alpha, mean = np.float32(self.alpha), before["scores"]
        with np.errstate(over="ignore"):
            deviation = np.minimum((losses - mean) ** 2, _MOST)
            variance = np.minimum((1 - alpha) * before["variance"] + alpha * deviation, _MOST)
            mean = (1 - alpha) * mean + alpha * losses
            bound = np.minimum(mean + np.float32(self.c) * variance, _MOST)
        return {"scores": mean, "sampling_weights": bound, "variance": variance, "last_loss": losses}

    def prune_weights(self, columns: Columns) -> NDArray[np.float32]:
        return columns["sampling_weights"]


@dataclass(frozen=True, kw_only=True)
class SelectiveBackprop(_ByLatestLoss):
    """Selective Backprop by ranks: a selecting step draws b of its B rows, the more likely the higher their loss ranks.

    The weight of a row is ((rank + 1/2) / B)^(B / b - 1), ranks from 0 for the lowest loss. Only epochs from `begin` to
    `end` of the run select, and of their steps every `selecting_interval`-th; all other steps train on everything.
    With several ranks each ranks its own part of the step. The paper's way is to keep half: mini_batch_size =
    meta_batch_size / 2.

    Args:
        begin: share of the epochs before selection begins, in [0, 1).
        end: share of the epochs before it ends, in [0, 1].
        selecting_interval: every how many steps one selects, from 1.

    Raises:
        InvalidValue: a setting is out of range.

    Source: Jiang et al., Selective-Backprop, 2019 (arXiv 1910.00762); the defaults are those of MosaicML's Composer.
    """

    batch_level: ClassVar[BatchLevel] = "scored"

    begin: float = 0.5
    end: float = 0.9
    selecting_interval: int = 2

    def __post_init__(self) -> None:
        check_ratio("begin", self.begin, high_inclusive=False)
        check_ratio("end", self.end, high_inclusive=True)
        if self.end <= self.begin:
            raise InvalidValue("end", self.end, f"more than begin, {self.begin}")
        check_int("selecting_interval", self.selecting_interval, 1, 1_000_000)

    def annealing_ends(self, num_epochs: int, *, warm_start: bool) -> tuple[int, int]:
        return _num_epochs(self.begin, num_epochs), num_epochs - _num_epochs(self.end, num_epochs)

    def sampling_weights(
        self, prior_scores: NDArray[np.float32], losses: NDArray[np.float32], num_chosen: int
    ) -> NDArray[np.float32]:
        ranks = np.empty(len(losses), np.float64)
        ranks[np.argsort(losses, kind="stable")] = np.arange(len(losses))
        return (((ranks + 0.5) / len(losses)) ** (len(losses) / num_chosen - 1)).astype(np.float32)


def _num_epochs(share: float, num_epochs: int) -> int:
    return math.ceil(share * num_epochs - 1e-9)  # 0.1 * 30 is a little over 3 in floating point
