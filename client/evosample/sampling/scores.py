"""The scores of an experiment's samples, and how a loss changes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evosample.sampling.checks import InvalidValue
from evosample.sampling.philox import BLOCK_ROWS


class Scores(NamedTuple):
    """What is known of every sample at an epoch's start.

    Attributes:
        scores: float32 [n], s: an exponential moving average of the sample's losses.
        sampling_weights: float32 [n], w: what a draw is proportional to.
        num_visits: uint16 [n], how many finite losses the sample has had, at most 65,535.
        staleness: uint8 [n], epochs that have ended since its last finite loss (or the start), at most 255.
        num_chosen: uint16 [n], how many times it was chosen for back-propagation, at most 65,535.
        chosen_staleness: uint8 [n], epochs that have ended since it was last chosen (or the start), at most 255.
        columns: float32 [n] each, what the policy keeps beside these.
    """

    scores: NDArray[np.float32]
    sampling_weights: NDArray[np.float32]
    num_visits: NDArray[np.uint16]
    staleness: NDArray[np.uint8]
    num_chosen: NDArray[np.uint16]
    chosen_staleness: NDArray[np.uint8]
    columns: Mapping[str, NDArray[np.float32]]

    def copy(self) -> Scores:
        """The same in arrays of their own."""
        fixed: Sequence[NDArray[Any]] = self[:-1]
        return Scores._make(
            [*(values.copy() for values in fixed), {name: values.copy() for name, values in self.columns.items()}]
        )


def check_scores(field: str, values: NDArray[np.float32]) -> None:
    """Raises InvalidValue unless all are finite and >= 0, as scores and sampling weights are."""
    bad = ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        position = int(np.argmax(bad))
        raise InvalidValue(field, float(values[position]), f"finite values >= 0 (this one is at position {position})")


def initial_scores(num_samples: int, columns: Mapping[str, float] = MappingProxyType({})) -> Scores:
    """s_i = w_i = 1/n, never visited; `columns` are a policy's own, with the values they start at."""
    start = np.float32(1 / num_samples)
    return Scores(
        np.full(num_samples, start),
        np.full(num_samples, start),
        np.zeros(num_samples, np.uint16),
        np.zeros(num_samples, np.uint8),
        np.zeros(num_samples, np.uint16),
        np.zeros(num_samples, np.uint8),
        {name: np.full(num_samples, value, np.float32) for name, value in columns.items()},
    )


def starting_scores(scores: Scores, num_samples: int, columns: Mapping[str, float]) -> Scores:
    """The scores that an epoch starts from: of all its samples, with a sampling weight for those that have no loss yet.

    Samples that are added come at the end, as `initial_scores` has them. Samples without a loss get m, the mean
    sampling weight of those with one; before any has one all weights are equal.

    How many samples stay unvisited is therefore bounded. Drawn in proportion to w, a sample is kept with probability
    pi(w) = 1 - exp(-w * tau), where tau is the same for all but for terms that vanish as n grows (see `race`). pi is
    concave, so the mean of pi over the visited samples is at most pi(m) (Jensen's inequality), which is what each
    unvisited sample has: at least the mean over all samples, 1 - r. After E epochs at most n * r^E samples are expected
    to be unvisited. A sample that is added later is expected to wait no longer. (Of what is kept, the rows that fill no
    step are dropped: r is the share that is left out with these. Where groups have floors, samples without a loss fill
    these first.) The guarantee for every sample is `max_skipped_epochs`.

    Args:
        scores: of the first samples; their sampling weights are changed.
        columns: a policy's own, with the values they start at.
    """
    if num_samples > len(scores.scores):
        scores = _extended(scores, num_samples, columns)
    num_visited = int(np.count_nonzero(scores.num_visits))
    if not 0 < num_visited < num_samples:
        return scores
    blocks = [slice(first, first + BLOCK_ROWS) for first in range(0, num_samples, BLOCK_ROWS)]
    weights, is_visited = scores.sampling_weights, scores.num_visits > 0
    total = sum(float(weights[block][is_visited[block]].sum(dtype=np.float64)) for block in blocks)
    for block in blocks:
        np.putmask(weights[block], ~is_visited[block], np.float32(total / num_visited))
    return scores


def _extended(scores: Scores, num_samples: int, columns: Mapping[str, float]) -> Scores:
    added = initial_scores(num_samples, columns)
    for name, values in scores.columns.items():
        added.columns[name][: len(values)] = values
    fixed: zip[tuple[NDArray[Any], NDArray[Any]]] = zip(added[:-1], scores[:-1], strict=True)
    for all_values, values in fixed:
        all_values[: len(values)] = values
    return added


def updated_sampling_weights(
    prior_scores: NDArray[np.float32], losses: NDArray[np.float32], beta1: float
) -> NDArray[np.float32]:
    """w = beta1 * s + (1 - beta1) * l, from the score BEFORE the loss; float32, elementwise (arXiv 2509.23461)."""
    return np.float32(beta1) * prior_scores + np.float32(1 - beta1) * losses


def updated_scores(prior_scores: NDArray[np.float32], losses: NDArray[np.float32], beta2: float) -> NDArray[np.float32]:
    """s' = beta2 * s + (1 - beta2) * l; float32, elementwise (arXiv 2509.23461)."""
    return np.float32(beta2) * prior_scores + np.float32(1 - beta2) * losses


def check_losses(losses: NDArray[np.float32]) -> None:
    """Raises InvalidValue if a finite loss is negative. Non-finite ones pass: they are recorded as not visited."""
    with np.errstate(invalid="ignore"):
        negative = losses < 0
    if np.count_nonzero(negative):
        negative &= losses > -np.inf
    if np.count_nonzero(negative):
        position = int(np.argmax(negative))
        raise InvalidValue(
            "losses",
            float(losses.flat[position]),
            f"losses >= 0, but the one at position {position} is negative. Sampling weights are proportional to "
            "losses: report each loss minus a constant that no loss can fall below (such as its theoretical minimum)",
        )


def clipped_losses(losses: NDArray[np.float32], quantile: float) -> NDArray[np.float32]:
    """Losses, float32 [m] and finite, of which those above the quantile count as that.

    The quantile is the smallest of the losses that at least the share `quantile` of them does not exceed.
    """
    if quantile == 1 or not len(losses):
        return losses
    last = math.ceil(quantile * len(losses) - 1e-9) - 1
    clipped: NDArray[np.float32] = np.minimum(losses, np.partition(losses, last)[last])
    return clipped
