"""The exponential race. Statistical tests have fixed seeds; with another seed each would fail once in 10,000 runs."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from evosample.sampling import InvalidValue, Purpose, exponentials, race, random_bits

WEIGHTS = np.array([1, 2, 3, 4, 10], np.float32)
FALSE_ALARM_RATE = 1e-4


def draws(num_races: int, n: int, seed: int = 0) -> NDArray[np.float64]:
    return exponentials(random_bits(seed, Purpose.SELECT, 0, 0, 0, num_races * n)).reshape(num_races, n)


def enumerated(weights: NDArray[np.float32], k: int) -> dict[tuple[int, ...], float]:
    """The probability of every set of k rows when they are drawn one by one in proportion to what is left."""
    sets: defaultdict[tuple[int, ...], float] = defaultdict(float)
    for order in itertools.permutations(range(len(weights)), k):
        probability, left = 1.0, float(weights.sum())
        for row in order:
            probability *= float(weights[row]) / left
            left -= float(weights[row])
        sets[tuple(sorted(order))] += probability
    return sets


def chi_square_p(observed: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    total = sum(observed.values())
    counts = [observed[outcome] for outcome in expected]
    return float(stats.chisquare(counts, [p * total for p in expected.values()]).pvalue)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_sets_are_drawn_as_one_by_one_without_replacement(k: int) -> None:
    observed = Counter(tuple(map(int, race(WEIGHTS, k, row).rows)) for row in draws(20_000, 5, seed=k))
    assert chi_square_p(observed, enumerated(WEIGHTS, k)) > FALSE_ALARM_RATE


def test_inclusion_probabilities_are_those_of_successive_sampling() -> None:
    exact = np.zeros(5)
    for rows, probability in enumerated(WEIGHTS, 3).items():
        exact[list(rows)] += probability
    np.testing.assert_allclose(exact, [0.246, 0.458, 0.625, 0.732, 0.940], atol=5e-4)
    num_races = 20_000
    won = np.zeros(5)
    for row in draws(num_races, 5, seed=9):
        won[race(WEIGHTS, 3, row).rows] += 1
    standard_errors = np.sqrt(exact * (1 - exact) / num_races)
    assert np.abs(won / num_races - exact).max() < stats.norm.isf(FALSE_ALARM_RATE / 10) * standard_errors.max()


def test_dividing_by_the_inclusion_probability_estimates_sums_without_bias() -> None:
    values = np.array([5.0, -1.0, 2.0, 7.0, 3.0])
    estimates = []
    for row in draws(20_000, 5, seed=3):
        drawn = race(WEIGHTS, 3, row)
        estimates.append((values[drawn.rows] / drawn.inclusion_probabilities).sum())
    z = (np.mean(estimates) - values.sum()) / (np.std(estimates) / np.sqrt(len(estimates)))
    assert abs(z) < stats.norm.isf(FALSE_ALARM_RATE / 2)


def test_positive_weights_win_before_zero_weights_which_fill_up_uniformly() -> None:
    weights = np.array([0, 2, 0, 0, 1, 0], np.float32)
    filled: Counter[tuple[int, ...]] = Counter()
    for row in draws(4000, 6):
        drawn = race(weights, 3, row)
        assert {1, 4} <= set(drawn.rows.tolist())
        np.testing.assert_allclose(drawn.inclusion_probabilities, np.where(weights[drawn.rows] > 0, 1, 1 / 4))
        filled[tuple(set(drawn.rows.tolist()) - {1, 4})] += 1
    assert chi_square_p(filled, {(i,): 1 / 4 for i in (0, 2, 3, 5)}) > FALSE_ALARM_RATE


def test_as_many_positive_weights_as_places_all_win_for_certain() -> None:
    drawn = race(np.array([0, 2, 0, 1], np.float32), 2, draws(1, 4)[0])
    assert drawn.rows.tolist() == [1, 3]
    assert drawn.inclusion_probabilities.tolist() == [1, 1]


def test_all_zero_weights_are_drawn_uniformly() -> None:
    observed: Counter[tuple[int, ...]] = Counter()
    for row in draws(4000, 4):
        drawn = race(np.zeros(4, np.float32), 2, row)
        assert drawn.inclusion_probabilities.tolist() == [0.5, 0.5]
        observed[tuple(map(int, drawn.rows))] += 1
    assert chi_square_p(observed, dict.fromkeys(itertools.combinations(range(4), 2), 1 / 6)) > FALSE_ALARM_RATE


def test_all_rows_win_where_all_are_wanted_and_none_where_none_are() -> None:
    everything, nothing = race(WEIGHTS, 5, draws(1, 5)[0]), race(WEIGHTS, 0, draws(1, 5)[0])
    assert everything.rows.tolist() == [0, 1, 2, 3, 4]
    assert everything.inclusion_probabilities.tolist() == [1] * 5
    assert nothing.rows.size == nothing.inclusion_probabilities.size == 0


def test_winners_come_in_the_order_of_their_rows() -> None:
    weights = np.random.default_rng(0).random(1000).astype(np.float32)
    rows = race(weights, 100, draws(1, 1000)[0]).rows
    assert (np.diff(rows) > 0).all()


def test_equal_keys_do_not_change_the_number_of_winners() -> None:
    drawn = race(np.ones(6, np.float32), 3, np.array([1.0, 2.0, 2.0, 2.0, 2.0, 3.0]))
    assert drawn.rows.tolist() == [0, 1, 2]


@pytest.mark.parametrize("k", [-1, 6])
def test_a_number_of_winners_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(InvalidValue, match="from 0 to the number of rows, 5"):
        race(WEIGHTS, k, draws(1, 5)[0])


def test_random_numbers_depend_on_nothing_but_their_place() -> None:
    whole = random_bits(5, Purpose.SELECT, 3, 4, 0, 103)
    for first, count in [(0, 1), (1, 9), (37, 66), (100, 3)]:
        assert (random_bits(5, Purpose.SELECT, 3, 4, first, count) == whole[first : first + count]).all()
    others = [(6, Purpose.SELECT, 3, 4), (5, Purpose.PRUNE, 3, 4), (5, Purpose.SELECT, 4, 4), (5, Purpose.SELECT, 3, 5)]
    for seed, purpose, epoch, step in others:
        assert not (random_bits(seed, purpose, epoch, step, 0, 103) == whole).any()


def test_random_numbers_never_change() -> None:
    # Experiments that are resumed years later, and clients in other languages, rely on these very bits.
    assert random_bits(1, Purpose.SELECT, 2, 3, 0, 2).tolist() == [17224543832666973655, 7201471728553250725]


def test_variates_are_exponential_and_finite() -> None:
    extremes = exponentials(np.array([0, 2**64 - 1], np.uint64))
    assert np.isfinite(extremes).all()
    assert (extremes > 0).all()
    assert stats.kstest(draws(1, 50_000)[0], "expon").pvalue > FALSE_ALARM_RATE
