"""The scores of an experiment's samples, and how a loss changes them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evosample.sampling.checks import InvalidValue


class Scores(NamedTuple):
    """What is known of every sample at an epoch's start.

    Attributes:
        scores: float32 [n], s: an exponential moving average of the sample's losses.
        sampling_weights: float32 [n], w: what a draw is proportional to.
        num_visits: uint32 [n], how many finite losses the sample has had.
    """

    scores: NDArray[np.float32]
    sampling_weights: NDArray[np.float32]
    num_visits: NDArray[np.uint32]


def check_scores(field: str, values: NDArray[np.float32]) -> None:
    """Raises InvalidValue unless all are finite and >= 0, as scores and sampling weights are."""
    bad = ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        position = int(np.argmax(bad))
        raise InvalidValue(field, float(values[position]), f"finite values >= 0 (this one is at position {position})")


def initial_scores(num_samples: int) -> Scores:
    """s_i = w_i = 1/n, never visited."""
    start = np.float32(1 / num_samples)
    return Scores(np.full(num_samples, start), np.full(num_samples, start), np.zeros(num_samples, np.uint32))


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
        negative = (losses < 0) & (losses > -np.inf)
    if negative.any():
        position = int(np.argmax(negative))
        raise InvalidValue(
            "losses",
            float(losses.flat[position]),
            f"losses >= 0, but the one at position {position} is negative. Sampling weights are proportional to "
            "losses: report each loss minus a constant that no loss can fall below (such as its theoretical minimum)",
        )
