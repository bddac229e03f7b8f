"""Sampling without replacement: the exponential race."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evosample.sampling.checks import InvalidValue


class Draw(NamedTuple):
    """What a race drew.

    Attributes:
        rows: int64 [k], the winners in ascending order.
        inclusion_probabilities: float64 [k], each winner's probability to win, given the others' keys.
    """

    rows: NDArray[np.int64]
    inclusion_probabilities: NDArray[np.float64]


def race(weights: NDArray[np.floating], k: int, exponentials: NDArray[np.float64]) -> Draw:
    """Draw k rows without replacement with probability proportional to their weights.

    key_i = exponentials_i / weights_i; the k smallest keys win. This has the distribution of drawing one by one in
    proportion to the remaining weights (successive sampling, `torch.multinomial`). With tau the (k+1)-th smallest key,
    the conditional inclusion probability is pi_i = 1 - exp(-weights_i * tau), so sum(x_i / pi_i) over the winners is
    an unbiased estimate of the sum of x over all rows. Positive weights win before zero weights; places that they
    leave are filled uniformly from the zero weights.

    Args:
        weights: [n], finite and >= 0.
        k: number of winners, 0 <= k <= n.
        exponentials: float64 [n], independent Exp(1) variates.

    Raises:
        InvalidValue: k is out of range.

    Source: Efraimidis and Spirakis, 2006; Duffield, Lund and Thorup, 2007 (priority sampling, for pi).
    """
    n = len(weights)
    if not 0 <= k <= n:
        raise InvalidValue("k", k, f"an integer from 0 to the number of rows, {n:,}")
    if k == n or k == 0:
        return Draw(np.arange(k), np.ones(k))
    positive = weights > 0
    num_positive = int(np.count_nonzero(positive))
    if num_positive <= k:  # every positive weight wins; ranking the zero weights by their variates is uniform
        num_zero, num_missing = n - num_positive, k - num_positive
        winners = positive.copy()
        winners[~positive] = _smallest(exponentials[~positive], num_missing)[0]
        rows = np.flatnonzero(winners)
        return Draw(rows, np.where(positive[rows], 1.0, num_missing / num_zero))
    with np.errstate(divide="ignore"):  # a zero weight's key is infinite: it never wins here
        keys = exponentials / weights.astype(np.float64)
    winners, tau = _smallest(keys, k)
    rows = np.flatnonzero(winners)
    return Draw(rows, -np.expm1(-weights[rows].astype(np.float64) * tau))


def _smallest(keys: NDArray[np.float64], k: int) -> tuple[NDArray[np.bool_], float]:
    """Mask of the k < n smallest keys (equal ones: the first), and the (k+1)-th smallest."""
    tau = np.partition(keys, k)[k]
    winners = keys < tau
    num_missing = k - int(np.count_nonzero(winners))
    if num_missing:
        winners[np.flatnonzero(keys == tau)[:num_missing]] = True
    return winners, float(tau)
