"""Groups of samples, such as classes or domains: floors for what is kept of each, and mixtures of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evosample.sampling.checks import InvalidValue, check_number, check_ratio

MAX_GROUPS = 1_000


class Groups(NamedTuple):
    """Which group each sample belongs to.

    Attributes:
        ids: uint16 [n], from 0.
        reference_losses: float32 [n], what a reference model's losses are; None where they are not needed.
    """

    ids: NDArray[np.uint16]
    reference_losses: NDArray[np.float32] | None = None

    def of_first(self, num_samples: int) -> Groups:
        """Those of the first samples."""
        losses = self.reference_losses
        return Groups(self.ids[:num_samples], None if losses is None else losses[:num_samples])


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Each group's share of what an epoch keeps. A group gets no more than it has; the others share what is left.

    Args:
        weights: a share for each group, in the order of their ids, positive; they are scaled to a sum of 1. Default:
            the groups' shares in the dataset.

    Raises:
        InvalidValue: a weight is not positive.
    """

    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        try:
            weights = np.array(self.weights, np.float64)
        except (TypeError, ValueError):
            weights = np.zeros(1)
        if weights.ndim != 1 or not ((weights >= 1e-9) & (weights <= 1e9)).all():
            raise InvalidValue("mixture.weights", self.weights, "a positive number for each group, 1e-9 to 1e9")
        object.__setattr__(self, "weights", tuple(weights.tolist()))

    def first_weights(self, sizes: NDArray[np.int64]) -> NDArray[np.float64]:
        """The weights in the first epoch, float64 [G], sum 1; `sizes` are int64 [G], samples of each group."""
        weights: NDArray[np.float64] = np.array(self.weights or sizes, np.float64)
        weights /= weights.sum()
        return weights

    def next_weights(self, weights: NDArray[np.float64], excess_losses: NDArray[np.float64]) -> NDArray[np.float64]:
        """The weights after an epoch: here the same.

        Args:
            weights: float64 [G], sum 1: in that epoch.
            excess_losses: float64 [G]: mean of max(loss - reference loss, 0) over the group's samples that had a loss;
                NaN where none had. Such a group keeps its weight in relation to the others together.
        """
        return weights


@dataclass(frozen=True, kw_only=True)
class DoReMi(Mixture):
    """A mixture that goes to where losses exceed those of a reference model the most.

    Every group has one place an epoch at least, so that its losses are known. After each epoch weight_g is multiplied
    by exp(step_size * excess_g), excess_g being the group's mean of max(loss - reference loss, 0); then, scaled to sum
    up to 1, weight_g = (1 - smoothing) * weight_g + smoothing / G.
    (DoReMi does so after each step of a proxy model, whose losses it weights, and samples the groups evenly.)

    Args:
        weights: shares in the first epoch, as in Mixture.
        step_size: how fast it goes, > 0.
        smoothing: share that is spread evenly, in [0, 1].

    Raises:
        InvalidValue: a value is out of range.

    Source: Xie et al., DoReMi, NeurIPS 2023 (arXiv 2305.10429), algorithm 1; the defaults are the paper's.
    """

    step_size: float = 1.0
    smoothing: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("mixture.step_size", self.step_size, 1e-9, 1e6)
        check_ratio("mixture.smoothing", self.smoothing, high_inclusive=True)

    def next_weights(self, weights: NDArray[np.float64], excess_losses: NDArray[np.float64]) -> NDArray[np.float64]:
        known = np.isfinite(excess_losses) & (weights > 0)
        if not known.any():
            return weights
        mean = float(np.average(excess_losses[known], weights=weights[known]))
        with np.errstate(divide="ignore"):
            logits = np.log(weights) + self.step_size * np.where(known, excess_losses, mean)
        scaled = np.exp(logits - logits.max())
        smoothed: NDArray[np.float64] = (1 - self.smoothing) * scaled / scaled.sum() + self.smoothing / len(weights)
        return smoothed


def group_sizes(ids: NDArray[np.uint16], num_groups: int) -> NDArray[np.int64]:
    """Samples of each group, int64 [G]."""
    sizes: NDArray[np.int64] = np.bincount(ids, minlength=num_groups)
    return sizes


def floor_sizes(ids: NDArray[np.uint16], num_groups: int, floor: float) -> NDArray[np.int64]:
    """How many samples of each group an epoch has to keep: ceil(floor * n_g), int64 [G]."""
    sizes: NDArray[np.int64] = np.ceil(floor * group_sizes(ids, num_groups) - 1e-9).astype(np.int64)
    return sizes


def floor_samples(
    ids: NDArray[np.uint16],
    least: NDArray[np.int64],
    goes_first: NDArray[np.bool_],
    weights: NDArray[np.float32],
    bits: NDArray[np.uint64],
) -> NDArray[np.bool_]:
    """The samples that keep groups at their floors: bool [n].

    Of each group so many as it has to keep: those that go first, then by their weights, descending; of equal ones those
    with the smallest bits.

    Args:
        ids: uint16 [n].
        least: int64 [G]: how many of each group, at most its size.
        goes_first: bool [n]: samples that are owed a place anyway, and those without a loss.
        weights: float32 [n].
        bits: uint64 [n], independent random bits.
    """
    order = np.lexsort((bits, -weights, ~goes_first, ids))
    sorted_ids = ids[order].astype(np.int64)
    starts = np.searchsorted(sorted_ids, np.arange(len(least)))
    is_in = np.arange(len(ids)) - starts[sorted_ids] < least[sorted_ids]
    samples = np.zeros(len(ids), np.bool_)
    samples[order[is_in]] = True
    return samples


def shared_out(
    weights: NDArray[np.float64], least: NDArray[np.int64], sizes: NDArray[np.int64], total: int
) -> NDArray[np.int64]:
    """How many of `total` places each group gets: in proportion to its weight, from `least` up to its size.

    Args:
        weights: float64 [G], sum 1. What the others can't take goes to groups of weight 0 as well.
        least, sizes: int64 [G], least <= sizes, sum(least) <= total <= sum(sizes).
    """
    weights = np.maximum(weights, 1e-9)
    low, high = 0.0, float((sizes / weights).max())
    for _ in range(200):  # the shares grow with the scale: halving finds the one at which they sum up
        scale = (low + high) / 2
        if np.clip(scale * weights, least, sizes).sum() < total:
            low = scale
        else:
            high = scale
    shares = np.clip(high * weights, least, sizes)
    places = np.maximum(np.floor(shares + 1e-6).astype(np.int64), least)
    missing = total - int(places.sum())
    while missing:
        by_fraction = np.argsort(places - shares, kind="stable")
        some = by_fraction[places[by_fraction] < sizes[by_fraction]][:missing]
        places[some] += 1
        missing -= len(some)
    return places


def mean_by_group(values: NDArray[np.float32], ids: NDArray[np.uint16], num_groups: int) -> NDArray[np.float64]:
    """Each group's mean, float64 [G]; NaN where there is none."""
    with np.errstate(invalid="ignore"):
        mean: NDArray[np.float64] = np.bincount(ids, values, num_groups) / np.bincount(ids, minlength=num_groups)
    return mean


def weights_within_groups(
    weights: NDArray[np.float32], num_visits: NDArray[np.uint16], ids: NDArray[np.uint16], num_groups: int
) -> NDArray[np.float32]:
    """Sampling weights for draws within groups, float32 [n]: samples without a loss have the mean of their own group's.

    Where none of a group has had a loss they keep what they have.

    Args:
        weights: float32 [n].
        num_visits: uint16 [n].
        ids: uint16 [n], the samples' groups.
    """
    is_visited = num_visits > 0
    means = mean_by_group(weights[is_visited], ids[is_visited], num_groups)[ids]
    found: NDArray[np.float32] = np.where(is_visited | np.isnan(means), weights, means.astype(np.float32))
    return found
