"""Drawing k of n rows by their weights: four methods, each with its probabilities."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evosample.sampling.checks import InvalidValue
from evosample.sampling.philox import BLOCK_ROWS, exponentials, uniforms

DrawMethod = Literal["successive", "systematic", "top_k", "with_replacement"]


class Draw:
    """What was drawn.

    Attributes:
        rows: int64 [k], ascending; distinct, unless they were drawn with replacement.
        inclusion_probabilities: float64 [k], of each of these: sum(x_i / pi_i) over them is an unbiased estimate of
            the sum of x over all rows. With replacement: how often the row is expected to be drawn, k * p_i. Computed
            when they are first asked for.
    """

    def __init__(self, rows: NDArray[np.int64], probabilities: Callable[[], NDArray[np.float64]]) -> None:
        self.rows = rows
        self._probabilities = probabilities

    @cached_property
    def inclusion_probabilities(self) -> NDArray[np.float64]:
        return self._probabilities()


def draw(method: DrawMethod, weights: NDArray[np.floating], k: int, bits: NDArray[np.uint64]) -> Draw:
    """Draw k rows by one of the methods below.

    Args:
        weights: [n], finite and >= 0; for top_k of either sign.
        k: 0 <= k <= n.
        bits: uint64 [n], independent random bits.

    Raises:
        InvalidValue: k is out of range.
    """
    n = len(weights)
    if not 0 <= k <= n:
        raise InvalidValue("k", k, f"an integer from 0 to the number of rows, {n:,}")
    if method == "with_replacement" and k:
        return with_replacement(weights, k, bits)
    if k in (0, n):
        return Draw(np.arange(k), lambda: np.ones(k))
    match method:
        case "successive":
            return race(weights, k, bits)
        case "systematic":
            return systematic(weights, k, float(uniforms(bits[:1])[0]))
        case "top_k":
            return top_k(weights, k, bits)
    raise InvalidValue("draw", method, "successive, systematic, top_k or with_replacement")


def race(weights: NDArray[np.floating], k: int, bits: NDArray[np.uint64]) -> Draw:
    """`successive`: without replacement, one by one in proportion to the weights that are left.

    key_i = Exp(1) variate / weights_i; the k smallest keys win: the exponential race, which has just that distribution
    (`torch.multinomial`). With tau the (k+1)-th smallest key, the inclusion probability given the others' keys is
    pi_i = 1 - exp(-weights_i * tau). Positive weights win before zero weights; places that they leave are filled
    uniformly from the zero weights.

    Args:
        weights: [n], finite and >= 0.
        k: number of winners, 0 < k < n.
        bits: uint64 [n].

    Source: Efraimidis and Spirakis, 2006; Duffield, Lund and Thorup, 2007 (priority sampling, for pi).
    """
    # They are ranked in float32, which takes half the memory. Rounding keeps their order; among those that round to the
    # value at the border, as a rule few, the float64 ones decide.
    keys = _rounded_keys(weights, bits)
    border = np.partition(keys, k)[k]
    if not border < np.inf:  # such is the key of a zero weight
        positive = weights > 0
        num_missing = k - int(np.count_nonzero(positive))
        if num_missing >= 0:  # every positive weight wins
            return _filled_up(weights, positive, num_missing, bits)
    winners = keys < border
    rows = winners.nonzero()[0]
    num_missing = k - len(rows)

    def at_border() -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        tied = (keys == border).nonzero()[0]
        with np.errstate(divide="ignore"):
            return tied, _keys(weights[tied], bits[tied])

    if num_missing:  # of equal keys the first win
        tied, exact = at_border()
        winners[tied[np.argsort(exact, kind="stable")[:num_missing]]] = True
        rows = winners.nonzero()[0]
    return Draw(rows, lambda: -np.expm1(-weights[rows].astype(np.float64) * np.sort(at_border()[1])[num_missing]))


def _filled_up(
    weights: NDArray[np.floating], positive: NDArray[np.bool_], num_missing: int, bits: NDArray[np.uint64]
) -> Draw:
    """Every positive weight, and of the others, by their variates alone, as many as are missing."""
    others = (~positive).nonzero()[0]
    if num_missing:
        positive[others[race(np.ones(len(others), np.float32), num_missing, bits[others]).rows]] = True
    rows = positive.nonzero()[0]
    return Draw(rows, lambda: np.where(weights[rows] > 0, 1.0, num_missing / len(others)))


def _keys(weights: NDArray[np.floating], bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """What races: float64 [n]; infinite for a zero weight, which so never wins."""
    return exponentials(bits) / (weights + 0)  # a zero may have a sign, and its key would have it, too


def _rounded_keys(weights: NDArray[np.floating], bits: NDArray[np.uint64]) -> NDArray[np.float32]:
    """The same as float32."""
    with np.errstate(divide="ignore", over="ignore"):
        if len(weights) <= BLOCK_ROWS:
            return _keys(weights, bits).astype(np.float32)
        keys = np.empty(len(weights), np.float32)
        for first in range(0, len(weights), BLOCK_ROWS):
            block = slice(first, first + BLOCK_ROWS)
            keys[block] = _keys(weights[block], bits[block])
        return keys


def systematic(weights: NDArray[np.floating], k: int, uniform: float) -> Draw:
    """Without replacement, with inclusion probabilities exactly proportional to the weights as far as they can be.

    pi_i = min(1, c * weights_i) with c such that they sum up to k; zero weights share what places are left. Rows with
    pi_i = 1 are in. Of the others row i is drawn if a number uniform + j, j = 0, 1, ..., falls into its stretch of the
    cumulated pi. Neighbours are seldom drawn together, so an estimate varies less where neighbours are alike.

    Args:
        weights: [n], finite and >= 0.
        k: 0 < k < n.
        uniform: in [0, 1).

    Source: Madow, 1949.
    """
    probabilities = inclusion_probabilities(weights, k)
    drawn = probabilities == 1
    num_left = k - int(np.count_nonzero(drawn))
    others = np.flatnonzero(~drawn)
    if num_left:
        stops = np.cumsum(probabilities[others])
        stops *= num_left / stops[-1]  # to the last bit, so that just so many are drawn
        marks = np.floor(stops - uniform)
        marks[-1] = num_left - 1
        drawn[others[np.diff(marks, prepend=-1) > 0]] = True
    rows = np.flatnonzero(drawn)
    return Draw(rows, lambda: probabilities[rows])


def inclusion_probabilities(weights: NDArray[np.floating], k: int) -> NDArray[np.float64]:
    """pi_i = min(1, c * weights_i), float64 [n], sum k; zero weights share what fewer than k positive ones leave."""
    probabilities = weights.astype(np.float64)
    positive = probabilities > 0
    num_positive = int(np.count_nonzero(positive))
    if num_positive <= k:
        return np.where(positive, 1.0, (k - num_positive) / max(len(weights) - num_positive, 1))
    certain = np.zeros(len(weights), np.bool_)
    while True:
        num_left = k - int(np.count_nonzero(certain))
        scaled = probabilities * (num_left / probabilities[~certain].sum())
        reached = ~certain & (scaled >= 1)
        if not reached.any():
            return np.where(certain, 1.0, scaled)
        certain |= reached


def top_k(weights: NDArray[np.floating], k: int, bits: NDArray[np.uint64]) -> Draw:
    """The k largest weights, 0 < k < n; of equal ones those with the smallest bits. The others have no chance at all.

    So there are no inclusion probabilities to divide by (ones are given): no estimate made from these rows is unbiased.
    """
    threshold = np.partition(weights, len(weights) - k)[len(weights) - k]
    winners = weights > threshold
    tied = np.flatnonzero(weights == threshold)
    num_missing = k - int(np.count_nonzero(winners))
    winners[tied[np.argsort(bits[tied], kind="stable")[:num_missing]]] = True
    return Draw(np.flatnonzero(winners), lambda: np.ones(k))


def with_replacement(weights: NDArray[np.floating], k: int, bits: NDArray[np.uint64]) -> Draw:
    """k independent draws in proportion to the weights (uniformly where all are zero): rows may come several times.

    An estimate divides each draw by k * p_i, p_i = weights_i / sum(weights).

    Args:
        weights: [n], finite and >= 0.
        k: 0 < k <= n.
        bits: uint64 [n]; the first k are used.
    """
    shares = weights.astype(np.float64) if weights.any() else np.ones(len(weights))
    stops = np.cumsum(shares)
    rows = np.sort(np.searchsorted(stops, uniforms(bits[:k]) * stops[-1], side="right"))
    rows = np.minimum(rows, np.searchsorted(stops, stops[-1]))  # the product may round up to the very end
    return Draw(rows, lambda: k * shares[rows] / stops[-1])
