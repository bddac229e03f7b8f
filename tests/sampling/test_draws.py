"""The draws. Statistical tests have fixed seeds; with another seed each would fail once in 10,000 runs."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from evosample.sampling import (
    DrawMethod,
    InvalidValue,
    Purpose,
    draw,
    exponentials,
    inclusion_probabilities,
    random_bits,
)

WEIGHTS = np.array([1, 2, 3, 4, 10], np.float32)
FALSE_ALARM_RATE = 1e-4
METHODS: list[DrawMethod] = ["successive", "systematic", "top_k", "with_replacement"]
WITHOUT_REPLACEMENT: list[DrawMethod] = ["successive", "systematic", "top_k"]
UNBIASED: list[DrawMethod] = ["successive", "systematic", "with_replacement"]


def bits_of(num_draws: int, n: int, seed: int = 0) -> NDArray[np.uint64]:
    return random_bits(seed, Purpose.SELECT, 0, 0, 0, num_draws * n).reshape(num_draws, n)


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
    observed = Counter(tuple(map(int, draw("successive", WEIGHTS, k, row).rows)) for row in bits_of(5000, 5, seed=k))
    assert chi_square_p(observed, enumerated(WEIGHTS, k)) > FALSE_ALARM_RATE


def test_inclusion_probabilities_are_those_of_successive_sampling() -> None:
    exact = np.zeros(5)
    for rows, probability in enumerated(WEIGHTS, 3).items():
        exact[list(rows)] += probability
    np.testing.assert_allclose(exact, [0.246, 0.458, 0.625, 0.732, 0.940], atol=5e-4)
    num_races = 20_000
    won = np.zeros(5)
    for row in bits_of(num_races, 5, seed=9):
        won[draw("successive", WEIGHTS, 3, row).rows] += 1
    standard_errors = np.sqrt(exact * (1 - exact) / num_races)
    assert np.abs(won / num_races - exact).max() < stats.norm.isf(FALSE_ALARM_RATE / 10) * standard_errors.max()


@pytest.mark.parametrize("method", UNBIASED)
@pytest.mark.parametrize("k", [1, 3])
def test_dividing_by_the_inclusion_probability_estimates_sums_without_bias(method: DrawMethod, k: int) -> None:
    values = np.array([5.0, -1.0, 2.0, 7.0, 3.0])
    estimates = []
    for row in bits_of(6000, 5, seed=3):
        drawn = draw(method, WEIGHTS, k, row)
        estimates.append((values[drawn.rows] / drawn.inclusion_probabilities).sum())
    z = (np.mean(estimates) - values.sum()) / (np.std(estimates) / np.sqrt(len(estimates)))
    assert abs(z) < stats.norm.isf(FALSE_ALARM_RATE / 2)


@pytest.mark.parametrize(
    ("weights", "k", "expected"),
    [
        ([1, 2, 3, 4, 10], 1, [0.05, 0.1, 0.15, 0.2, 0.5]),
        ([1, 2, 3, 4, 10], 3, [0.2, 0.4, 0.6, 0.8, 1]),  # 10 is certain, and then 4 of the 10 that are left are 0.8
        ([1, 2, 3, 4, 10], 4, [1 / 3, 2 / 3, 1, 1, 1]),
        ([0, 2, 0, 1, 0], 3, [1 / 3, 1, 1 / 3, 1, 1 / 3]),
        ([0, 0, 0, 0], 2, [0.5] * 4),
        ([3, 3, 3, 3], 3, [0.75] * 4),
    ],
)
def test_systematic_draws_have_inclusion_probabilities_in_proportion_to_the_weights(
    weights: list[float], k: int, expected: list[float]
) -> None:
    given = np.array(weights, np.float32)
    np.testing.assert_allclose(inclusion_probabilities(given, k), expected)
    num_draws, drawn = 3000, np.zeros(len(given))
    for row in bits_of(num_draws, len(given), seed=k):
        found = draw("systematic", given, k, row)
        assert len(set(found.rows.tolist())) == k
        np.testing.assert_allclose(found.inclusion_probabilities, np.array(expected)[found.rows])
        drawn[found.rows] += 1
    for count, p in zip(drawn, expected, strict=True):
        assert stats.binomtest(int(count), num_draws, min(p, 1)).pvalue > FALSE_ALARM_RATE / len(given)


def test_a_systematic_draw_of_very_many_has_exactly_so_many() -> None:
    rng = np.random.default_rng(0)
    for scale in (0.1, 1, 3):
        weights = np.exp(rng.normal(0, scale, 30_011)).astype(np.float32)
        for k in (1, 17, 15_000, 30_010):
            found = draw("systematic", weights, k, bits_of(1, len(weights), seed=k)[0])
            assert len(set(found.rows.tolist())) == k
            assert inclusion_probabilities(weights, k).sum() == pytest.approx(k)


def test_draws_with_replacement_are_multinomial() -> None:
    observed: Counter[tuple[int, ...]] = Counter()
    for row in bits_of(5000, 5, seed=1):
        drawn = draw("with_replacement", WEIGHTS, 2, row)
        np.testing.assert_allclose(drawn.inclusion_probabilities, 2 * WEIGHTS[drawn.rows] / 20)
        observed[tuple(map(int, drawn.rows))] += 1
    p = WEIGHTS.astype(float) / 20
    expected: dict[tuple[int, ...], float] = {
        (a, b): p[a] * p[b] * (1 if a == b else 2) for a in range(5) for b in range(a, 5)
    }
    assert chi_square_p(observed, expected) > FALSE_ALARM_RATE


def test_draws_with_replacement_may_be_as_many_as_there_are_rows_and_never_take_a_zero_weight() -> None:
    weights = np.array([0, 2, 0, 1, 0], np.float32)
    for row in [*bits_of(200, 5), np.zeros(5, np.uint64), np.full(5, 2**64 - 1, np.uint64)]:
        drawn = draw("with_replacement", weights, 5, row)
        assert len(drawn.rows) == 5
        assert set(drawn.rows.tolist()) <= {1, 3}
        np.testing.assert_allclose(drawn.inclusion_probabilities, 5 * weights[drawn.rows] / 3)


def test_the_largest_weights_are_drawn_and_of_equal_ones_any() -> None:
    weights = np.array([1, 3, 2, 5, 2, 2], np.float32)
    ties: Counter[tuple[int, ...]] = Counter()
    for row in bits_of(3000, 6):
        rows = set(draw("top_k", weights, 4, row).rows.tolist())
        assert {1, 3} < rows
        ties[tuple(sorted(rows - {1, 3}))] += 1
    assert chi_square_p(ties, dict.fromkeys(itertools.combinations((2, 4, 5), 2), 1 / 3)) > FALSE_ALARM_RATE


@pytest.mark.parametrize("method", ["successive", "systematic"])
def test_positive_weights_win_before_zero_weights_which_fill_up_uniformly(method: DrawMethod) -> None:
    weights = np.array([0, 2, 0, 0, 1, 0], np.float32)
    filled: Counter[tuple[int, ...]] = Counter()
    for row in bits_of(4000, 6):
        drawn = draw(method, weights, 3, row)
        assert {1, 4} <= set(drawn.rows.tolist())
        np.testing.assert_allclose(drawn.inclusion_probabilities, np.where(weights[drawn.rows] > 0, 1, 1 / 4))
        filled[tuple(set(drawn.rows.tolist()) - {1, 4})] += 1
    assert chi_square_p(filled, {(i,): 1 / 4 for i in (0, 2, 3, 5)}) > FALSE_ALARM_RATE


@pytest.mark.parametrize("method", WITHOUT_REPLACEMENT)
def test_as_many_positive_weights_as_places_all_win_for_certain(method: DrawMethod) -> None:
    drawn = draw(method, np.array([0, 2, 0, 1], np.float32), 2, bits_of(1, 4)[0])
    assert drawn.rows.tolist() == [1, 3]
    assert drawn.inclusion_probabilities.tolist() == [1, 1]


@pytest.mark.parametrize("method", ["successive", "top_k"])
def test_all_zero_weights_are_drawn_uniformly(method: DrawMethod) -> None:
    observed: Counter[tuple[int, ...]] = Counter()
    for row in bits_of(4000, 4):
        drawn = draw(method, np.zeros(4, np.float32), 2, row)
        if method == "successive":
            assert drawn.inclusion_probabilities.tolist() == [0.5, 0.5]
        observed[tuple(map(int, drawn.rows))] += 1
    assert chi_square_p(observed, dict.fromkeys(itertools.combinations(range(4), 2), 1 / 6)) > FALSE_ALARM_RATE


def test_all_zero_weights_are_drawn_uniformly_with_replacement() -> None:
    observed: Counter[tuple[int, ...]] = Counter()
    for row in bits_of(4000, 4):
        drawn = draw("with_replacement", np.zeros(4, np.float32), 1, row)
        assert drawn.inclusion_probabilities.tolist() == [0.25]
        observed[tuple(map(int, drawn.rows))] += 1
    assert chi_square_p(observed, {(i,): 1 / 4 for i in range(4)}) > FALSE_ALARM_RATE


@pytest.mark.parametrize("method", WITHOUT_REPLACEMENT)
def test_all_rows_win_where_all_are_wanted(method: DrawMethod) -> None:
    everything = draw(method, WEIGHTS, 5, bits_of(1, 5)[0])
    assert everything.rows.tolist() == [0, 1, 2, 3, 4]
    assert everything.inclusion_probabilities.tolist() == [1] * 5


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_drawn_where_nothing_is_wanted(method: DrawMethod) -> None:
    for weights in (WEIGHTS, WEIGHTS[:0]):
        nothing = draw(method, weights, 0, bits_of(1, 5)[0, : len(weights)])
        assert nothing.rows.size == nothing.inclusion_probabilities.size == 0


@pytest.mark.parametrize("method", METHODS)
def test_winners_come_in_the_order_of_their_rows(method: DrawMethod) -> None:
    weights = np.random.default_rng(0).random(1000).astype(np.float32)
    rows = draw(method, weights, 100, bits_of(1, 1000)[0]).rows
    assert len(rows) == 100
    assert (np.diff(rows) >= (0 if method == "with_replacement" else 1)).all()


@pytest.mark.parametrize("method", METHODS)
def test_weights_at_the_ends_of_what_a_float_holds_are_no_trouble(method: DrawMethod) -> None:
    weights = np.array([3.4e38, 1e-45, 3.4e38, 1, 0, 1e-45, 1e30], np.float32)
    for k in range(1, 7):
        for row in bits_of(20, 7):
            drawn = draw(method, weights, k, row)
            assert len(drawn.rows) == k
            assert (drawn.inclusion_probabilities > 0).all()
            assert np.isfinite(drawn.inclusion_probabilities).all()


def test_weights_that_are_no_numbers_do_not_change_the_number_of_winners() -> None:
    for weights in ([np.nan] * 5 + [1, 1], [np.nan] * 7):
        assert len(draw("successive", np.array(weights, np.float32), 3, bits_of(1, 7)[0]).rows) == 3


def test_equal_keys_do_not_change_the_number_of_winners() -> None:
    drawn = draw("successive", np.ones(6, np.float32), 3, np.zeros(6, np.uint64))
    assert drawn.rows.tolist() == [0, 1, 2]


def test_a_race_is_decided_by_keys_of_full_precision() -> None:
    # Weights so alike that thousands of keys round to the same float32, and so do those at the border.
    bits = np.sort(bits_of(1, 200_000)[0] >> np.uint64(20) | np.uint64(0x5555500000000000))
    weights = np.ones(len(bits), np.float32)
    drawn = draw("successive", weights, 100_001, bits)
    keys = exponentials(bits)
    assert len(np.unique(keys.astype(np.float32))) < len(keys) // 100
    assert (drawn.rows == np.sort(np.argsort(keys, kind="stable")[:100_001])).all()
    tau = np.sort(keys)[100_001]
    np.testing.assert_array_equal(drawn.inclusion_probabilities, -np.expm1(-weights[drawn.rows] * tau))


def test_equal_weights_and_bits_do_not_change_the_number_of_the_largest() -> None:
    assert len(draw("top_k", np.ones(6, np.float32), 3, np.zeros(6, np.uint64)).rows) == 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [-1, 6])
def test_a_number_of_winners_out_of_range_is_refused(method: DrawMethod, k: int) -> None:
    with pytest.raises(InvalidValue, match="from 0 to the number of rows, 5"):
        draw(method, WEIGHTS, k, bits_of(1, 5)[0])


def test_random_numbers_depend_on_nothing_but_their_place() -> None:
    whole = random_bits(5, Purpose.SELECT, 3, 4, 0, 103)
    for first, count in [(0, 1), (1, 9), (37, 66), (100, 3)]:
        assert (random_bits(5, Purpose.SELECT, 3, 4, first, count) == whole[first : first + count]).all()
    others = [(6, Purpose.SELECT, 3, 4), (5, Purpose.PRUNE, 3, 4), (5, Purpose.SELECT, 4, 4), (5, Purpose.SELECT, 3, 5)]
    for seed, purpose, epoch, step in others:
        assert not (random_bits(seed, purpose, epoch, step, 0, 103) == whole).any()


def test_many_random_numbers_are_those_of_their_places_too() -> None:
    whole = np.concatenate([random_bits(5, Purpose.PRUNE, 1, 0, first, 1000) for first in range(0, 200_000, 1000)])
    for first, count in [(0, 200_000), (65_533, 70_000), (1, 131_072), (3, 65_533)]:
        assert (random_bits(5, Purpose.PRUNE, 1, 0, first, count) == whole[first : first + count]).all()


def test_threads_draw_the_same_random_numbers() -> None:
    def drawn(seed: int) -> list[int]:
        return [int(random_bits(seed, Purpose.SELECT, 1, step, 0, 5000)[-1]) for step in range(200)]

    expected = list(map(drawn, range(8)))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(drawn, range(8))) == expected


def test_random_numbers_never_change() -> None:
    # Experiments that are resumed years later, and clients in other languages, rely on these very bits.
    assert random_bits(1, Purpose.SELECT, 2, 3, 0, 2).tolist() == [17224543832666973655, 7201471728553250725]


def test_variates_are_exponential_and_finite() -> None:
    extremes = exponentials(np.array([0, 2**64 - 1], np.uint64))
    assert np.isfinite(extremes).all()
    assert (extremes > 0).all()
    assert stats.kstest(exponentials(bits_of(1, 50_000)[0]), "expon").pvalue > FALSE_ALARM_RATE


@pytest.mark.parametrize("weights", [[-0.0, 1, 0], [0, 1, -0.0], [-0.0, -0.0, 1]])
def test_a_zero_with_a_sign_is_a_zero(weights: list[float]) -> None:
    for row in bits_of(50, 3):
        drawn = draw("successive", np.array(weights, np.float32), 1, row)
        assert weights[drawn.rows[0]] == 1
        assert drawn.inclusion_probabilities.tolist() == [1]
        two = draw("successive", np.array([*weights, 2], np.float32), 1, np.append(row, row[:1]))
        assert [*weights, 2][two.rows[0]] in (1, 2)
