"""Selection methods: what a policy decides, as pure functions of its settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from evosample.sampling.checks import check_ratio
from evosample.sampling.scores import updated_sampling_weights


class Policy:
    """What a selection method decides. A policy is its settings: a frozen, comparable dataclass without state."""

    # Whether the mini-batch is drawn from losses, so that a selecting step needs a scoring pass over its meta-batch.
    # Where not, the mini-batch is drawn when the epoch is planned, and the rest of the meta-batch is never loaded.
    scores_meta_batch: ClassVar[bool] = False

    # Whether samples without a loss are kept before all others: where weights decide, their starting ones never would.
    keeps_unvisited: ClassVar[bool] = False

    # A policy that has no use for scores keeps ES's all the same: there is something to look at, and to start from.
    beta1: float = 0.2
    beta2: float = 0.9
    prune_ratio: float = 0.0

    def annealing_ends(self, num_epochs: int, *, warm_start: bool) -> tuple[int, int]:
        """How many epochs at the beginning of a run, and how many at its end, train on everything.

        In these there is no pruning, no selection and no scoring pass.
        """
        return 0, 0

    def prune_weights(self, sampling_weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the set level's draw is proportional to: float32 [n]. All zero, as here, makes it uniform."""
        return np.zeros_like(sampling_weights)

    def sampling_weights(self, prior_scores: NDArray[np.float32], losses: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the batch level's draw is proportional to: float32, shaped like `losses`.

        A non-finite loss gets weight 0: training on it would ruin the model, so it is chosen only to fill up.
        """
        with np.errstate(invalid="ignore", over="ignore"):
            weights = updated_sampling_weights(prior_scores, losses, self.beta1)
        return np.where(np.isfinite(weights), weights, np.float32(0))


@dataclass(frozen=True, kw_only=True)
class EvolvedSampling(Policy):
    """Evolved Sampling: ES, with `prune_ratio` > 0 ESWP, with beta1 = beta2 = 0 loss-based sampling.

    w_i = beta1 * s_i + (1 - beta1) * l_i,  s_i = beta2 * s_i + (1 - beta2) * l_i. An epoch keeps (1 - prune_ratio) * n
    samples and a step back-propagates b of its B, both drawn without replacement in proportion to w.

    Args:
        beta1: weight of the score in w, in [0, 1].
        beta2: weight of the past in s, in [0, 1]. Default: 0.9, with pruning 0.8.
        prune_ratio: share r of the dataset that an epoch leaves out, in [0, 1).
        annealing: share of the epochs, in [0, 1), that train on everything at either end of the run: the first
            max(1, ceil(annealing * num_epochs)), but none where scores are imported, and the last
            ceil(annealing * num_epochs).

    Raises:
        InvalidValue: a setting is out of range.

    Source: arXiv 2509.23461, algorithm 1; the defaults are the paper's.
    """

    scores_meta_batch: ClassVar[bool] = True
    keeps_unvisited: ClassVar[bool] = True

    beta1: float = 0.2
    beta2: float = cast(float, None)  # depends on prune_ratio
    prune_ratio: float = 0.0
    annealing: float = 0.05

    def __post_init__(self) -> None:
        if self.beta2 is None:
            object.__setattr__(self, "beta2", 0.8 if self.prune_ratio else 0.9)
        check_ratio("beta1", self.beta1, high_inclusive=True)
        check_ratio("beta2", self.beta2, high_inclusive=True)
        check_ratio("prune_ratio", self.prune_ratio, high_inclusive=False)
        check_ratio("annealing", self.annealing, high_inclusive=False)

    def annealing_ends(self, num_epochs: int, *, warm_start: bool) -> tuple[int, int]:
        share = math.ceil(self.annealing * num_epochs - 1e-9)  # 0.1 * 30 is a little over 3 in floating point
        return 0 if warm_start else max(1, share), share

    def prune_weights(self, sampling_weights: NDArray[np.float32]) -> NDArray[np.float32]:
        return sampling_weights


@dataclass(frozen=True, kw_only=True)
class Uniform(Policy):
    """Train on everything: a shuffled pass over the dataset an epoch. `mini_batch_size` is not used."""

    def annealing_ends(self, num_epochs: int, *, warm_start: bool) -> tuple[int, int]:
        return num_epochs, 0


@dataclass(frozen=True, kw_only=True)
class RandomSubset(Policy):
    """The baseline that any selection has to beat: prune uniformly and train on a uniform b of every B samples.

    Needs no scoring pass. The B - b others are not even loaded: a batch holds the b chosen samples.

    Args:
        prune_ratio: share r of the dataset that an epoch leaves out, in [0, 1).

    Raises:
        InvalidValue: `prune_ratio` is out of range.
    """

    prune_ratio: float = 0.0

    def __post_init__(self) -> None:
        check_ratio("prune_ratio", self.prune_ratio, high_inclusive=False)
