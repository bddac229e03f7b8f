"""Groups: floors that hold in every epoch, and mixtures."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from evosample.sampling import (
    UCB,
    DoReMi,
    EvolvedSampling,
    ExperimentSpec,
    Groups,
    InfoBatch,
    InvalidValue,
    Kakurenbo,
    Mixture,
    OrderedSGD,
    Policy,
    RandomSubset,
    Report,
    Scores,
    SelectiveBackprop,
    Uniform,
    check_groups,
    floor_sizes,
    fold_epoch,
    initial_scores,
    keep_samples,
    part,
    plan_epoch,
    select_mini_batch,
    shared_out,
    summarize_groups,
)

N, NUM_EPOCHS, NUM_GROUPS = 1_000, 10, 6
SIZES = [1, 9, 40, 150, 300, 500]  # one group has a single sample
IDS = np.random.default_rng(1).permutation(np.repeat(np.arange(NUM_GROUPS), SIZES)).astype(np.uint16)
GROUPS = Groups(IDS)
POLICIES: list[Policy] = [
    Uniform(),
    RandomSubset(prune_ratio=0.3),
    EvolvedSampling(),
    *[EvolvedSampling(prune_ratio=0.4, set_draw=draw) for draw in ("successive", "systematic", "top_k")],
    InfoBatch(),
    Kakurenbo(max_ratio=0.9),
    OrderedSGD(),
    UCB(prune_ratio=0.5),
    SelectiveBackprop(),
]


def spec_of(policy: Policy, **settings: Any) -> ExperimentSpec:
    sizes = {"num_samples": N, "num_epochs": NUM_EPOCHS, "meta_batch_size": 30, "mini_batch_size": 15}
    return ExperimentSpec(policy=policy, **({"num_groups": NUM_GROUPS} | sizes | settings))


def losses_of(ids: NDArray[Any], epoch: int) -> NDArray[np.float32]:
    """The large groups are hard, the small ones learned at once: what a policy leaves out first."""
    losses = np.random.default_rng(epoch).gamma(2, 1, N).astype(np.float32)
    found: NDArray[np.float32] = np.where(IDS < 4, losses / 1000, losses)[ids].astype(np.float32)
    return found


def after(spec: ExperimentSpec, epoch: int, scores: Scores, ids: NDArray[Any], losses: NDArray[np.float32]) -> Scores:
    columns = {name: np.ones(len(ids), np.float32) for name in spec.policy.reported_columns}
    scores = scores.copy()
    fold_epoch(spec, scores, ids, Report(losses, np.zeros(len(ids), np.bool_), columns))
    return scores


def least_shares(spec: ExperimentSpec, groups: Groups | None) -> NDArray[np.float64]:
    """The least share of each group that an epoch trains on."""
    scores, shares = initial_scores(N, spec.policy.columns), []
    for epoch in range(NUM_EPOCHS):
        table, shape = plan_epoch(spec, epoch, scores, groups)
        assert len(set(table.sample_ids.tolist())) == len(table.sample_ids) == shape.num_rows
        trained = table.sample_ids[: shape.num_training_steps * shape.step_rows]
        shares.append(np.bincount(IDS[trained], minlength=NUM_GROUPS) / SIZES)
        scores = after(spec, epoch, scores, table.sample_ids, losses_of(table.sample_ids, epoch))
    least: NDArray[np.float64] = np.min(shares, axis=0)
    return least


@pytest.mark.parametrize("floor", [0.1, 0.3])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_no_group_falls_under_its_floor_in_any_epoch(policy: Policy, floor: float) -> None:
    for seed in range(5):
        spec = spec_of(policy, group_floor=floor, seed=seed, max_skipped_epochs=3)
        check_groups(spec, GROUPS)
        assert (least_shares(spec, GROUPS) >= floor).all()


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_without_a_floor_some_group_falls_under_it(policy: Policy) -> None:
    assert any((least_shares(spec_of(policy, seed=seed), None) < 0.1).any() for seed in range(40))


def test_a_floor_takes_the_samples_of_the_highest_weights_and_those_first_that_are_owed_a_place() -> None:
    spec = spec_of(EvolvedSampling(prune_ratio=0.6, annealing=0), group_floor=0.1, importance_weight="unbiased")
    spec = dataclasses.replace(spec, max_skipped_epochs=2)
    scores = after(spec, 0, initial_scores(N), np.arange(N), losses_of(np.arange(N), 0))
    scores.staleness[np.flatnonzero(IDS == 3)[:5]] = 2  # 5 of the 15 places
    kept = keep_samples(spec, 1, scores, GROUPS)
    is_floor = kept.is_guarded
    assert is_floor is not None
    floor = kept.sample_ids[is_floor]
    for group, size in enumerate(SIZES):
        ids = np.flatnonzero(group == IDS)
        count = math.ceil(0.1 * size)
        weights = scores.sampling_weights[ids].astype(np.float64) + 1e9 * (scores.staleness[ids] == 2)
        assert set(floor[IDS[floor] == group]) == set(ids[np.argsort(-weights)[:count]])
    assert kept.inclusion_probabilities is not None
    assert (kept.inclusion_probabilities[is_floor] == 1).all()


@pytest.mark.parametrize(
    "policy", [EvolvedSampling(prune_ratio=0.4, beta1=0.8), RandomSubset(prune_ratio=0.6)], ids=str
)
@pytest.mark.parametrize("mixture", [None, Mixture(weights=(1, 1, 5, 5, 5, 9))], ids=["no mixture", "mixture"])
def test_weights_are_unbiased_with_floors_and_mixtures(policy: Policy, mixture: Mixture | None) -> None:
    losses, rng = losses_of(np.arange(N), 0) + IDS, np.random.default_rng(3)
    scores = initial_scores(N)._replace(
        sampling_weights=(rng.lognormal(0, 1, N) * losses).astype(np.float32), num_visits=np.ones(N, np.uint16)
    )
    means, unweighted = [], []
    for seed in range(1500):
        spec = spec_of(
            policy,
            importance_weight="unbiased",
            group_floor=0.1,
            mixture=mixture,
            seed=seed,
            meta_batch_size=90,
            mini_batch_size=45 if policy.batch_level == "scored" else 90,
        )
        weights = None if mixture is None else mixture.first_weights(np.array(SIZES))
        (ids, prior, set_weights), shape = plan_epoch(spec, 5, scores, GROUPS, weights)
        assert set_weights is not None
        rows = part(np.arange(len(ids)), shape.step_rows, 0, 1)[seed % shape.num_steps]
        batch = select_mini_batch(
            spec, shape, epoch=5, step=seed % shape.num_steps, rank=0, world_size=1, prior_scores=prior[rows],
            losses=losses[ids[rows]], set_importance_weights=set_weights[rows],
        )  # fmt: skip
        chosen = losses[ids[rows][batch.positions]]
        means.append((batch.importance_weights * chosen).mean())
        unweighted.append(chosen.mean())
    z = (np.mean(means) - losses.mean()) / stats.sem(means)
    assert abs(z) < 4
    assert abs((np.mean(unweighted) - losses.mean()) / stats.sem(unweighted)) > 10, "the weights have something to do"


def test_a_floor_s_ties_leave_no_trace_in_the_draw() -> None:
    """Half of a group of equal weights is forced in at random: what is left must be drawn as if nothing had been."""
    ids = np.zeros(N, np.uint16)
    losses = np.concatenate([np.ones(N // 2), np.zeros(N // 2)]).astype(np.float32)
    groups = Groups(np.concatenate([ids[: N // 2], ids[N // 2 :] + 1]).astype(np.uint16))
    scores = initial_scores(N)._replace(num_visits=np.ones(N, np.uint16))
    means = []
    for seed in range(300):
        spec = spec_of(
            EvolvedSampling(prune_ratio=0.5),
            num_groups=2,
            group_floor=0.3,
            importance_weight="unbiased",
            seed=seed,
            mini_batch_size=30,
        )
        table = plan_epoch(spec, 5, scores, groups).table
        assert table.importance_weights is not None
        means.append((table.importance_weights * losses[table.sample_ids]).mean())
    assert abs((np.mean(means) - 0.5) / stats.sem(means)) < 4


@pytest.mark.parametrize(
    "policy", [UCB(prune_ratio=0.3), InfoBatch(), EvolvedSampling(prune_ratio=0.3), Uniform()], ids=str
)
def test_what_is_due_does_not_fall_out_of_the_whole_steps(policy: Policy) -> None:
    spec = spec_of(policy, num_samples=N, meta_batch_size=70, max_skipped_epochs=1 if policy == Uniform() else 2)
    scores = initial_scores(N, policy.columns)
    gaps = np.zeros(N, int)
    for epoch in range(NUM_EPOCHS):
        table = plan_epoch(spec, epoch, scores).table
        is_visited = np.isin(np.arange(N), table.sample_ids)
        due = gaps >= spec.max_skipped_epochs
        assert is_visited[due].all() or due.sum() > len(table.sample_ids)
        gaps = np.where(is_visited, 0, gaps + 1)
        scores = after(spec, epoch, scores, table.sample_ids, losses_of(table.sample_ids, epoch))


def test_floors_are_spread_over_the_steps() -> None:
    spec = spec_of(RandomSubset(prune_ratio=0.5), group_floor=0.15, meta_batch_size=100, mini_batch_size=25)
    scores = after(spec, 0, initial_scores(N), np.arange(N), losses_of(np.arange(N), 0))
    table, shape = plan_epoch(spec, 1, scores, GROUPS)
    kept = keep_samples(spec, 1, scores, GROUPS)
    is_floor = kept.is_guarded
    assert is_floor is not None
    shares = np.isin(table.sample_ids, kept.sample_ids[is_floor]).reshape(shape.num_steps, -1).mean(1)
    assert shares.max() < 0.95
    assert abs(shares[: shape.num_steps // 2].mean() - shares[shape.num_steps // 2 :].mean()) < 0.2


def test_a_floor_does_not_change_what_an_adaptive_policy_goes_by() -> None:
    for policy in (InfoBatch(), Kakurenbo()):
        with_floor, without = spec_of(policy, group_floor=0.3), spec_of(policy)
        scores = after(without, 0, initial_scores(N, policy.columns), np.arange(N), losses_of(np.arange(N), 0))
        floored = keep_samples(with_floor, 3, scores, GROUPS)
        is_floor = floored.is_guarded
        plain = keep_samples(without, 3, scores)
        assert is_floor is not None
        assert set(floored.sample_ids) == set(plain.sample_ids) | set(floored.sample_ids[is_floor])
        assert set(floored.hidden_ids) == set(plain.hidden_ids) - set(floored.sample_ids[is_floor])
        if floored.importance_weights is not None:
            assert (floored.importance_weights[is_floor] == 1).all()


def test_a_learned_mixture_goes_on_measuring_every_group() -> None:
    spec = spec_of(RandomSubset(prune_ratio=0.5), mixture=DoReMi(smoothing=0))
    weights = np.array([1e-12, 1e-12, 1e-12, 1e-12, 0.5, 0.5])
    kept = keep_samples(spec, 3, initial_scores(N), GROUPS, weights)
    assert np.bincount(IDS[kept.sample_ids], minlength=NUM_GROUPS).min() == 1
    unknown = DoReMi(smoothing=0).next_weights(np.array([0.2, 0.3, 0.5]), np.array([np.nan, 1.0, 1.0]))
    assert unknown.tolist() == pytest.approx([0.2, 0.3, 0.5])


# Mixtures


WEIGHTS = st.one_of(st.just(0.0), st.floats(0.01, 100))
SIZE = st.integers(0, 50)


@given(st.lists(st.tuples(WEIGHTS, SIZE, SIZE), min_size=1, max_size=8), st.floats(0, 1))
def test_places_are_shared_out_in_proportion_between_bounds(groups: list[tuple[float, int, int]], share: float) -> None:
    weights = np.array([weight for weight, _, _ in groups])
    weights /= max(weights.sum(), 1)
    least = np.array([min(pair) for _, *pair in groups])
    sizes = np.array([max(pair) for _, *pair in groups])
    if not sizes.sum():
        return
    total = int(least.sum() + share * (sizes - least).sum())
    found = shared_out(weights, least, sizes, total)
    assert found.sum() == total
    assert ((least <= found) & (found <= sizes)).all()
    weights = np.maximum(weights, 1e-9)
    scales = [
        ((found[i] - 1) / weights[i], (found[i] + 1) / weights[i]) for i in range(len(groups)) if least[i] < found[i]
    ]
    for i in range(len(groups)):  # nobody could have one more place in exchange for one of another with more by weight
        if found[i] < sizes[i] - 1:
            assert all(low <= (found[i] + 2) / weights[i] for low, _ in scales)


def test_an_epoch_keeps_the_mixture_and_says_which_groups_it_caps() -> None:
    mixture = Mixture(weights=(1, 1, 2, 2, 2, 2))
    spec = spec_of(RandomSubset(prune_ratio=0.5), mixture=mixture, mini_batch_size=30)
    weights = mixture.first_weights(np.array(SIZES))
    kept = keep_samples(spec, 3, initial_scores(N), GROUPS, weights)
    rows = np.bincount(IDS[kept.sample_ids], minlength=NUM_GROUPS)
    assert rows.tolist() == [1, 9, 40, 150, 150, 150]  # the last two share what the others leave
    summaries = summarize_groups(spec, GROUPS, weights, kept.sample_ids, losses_of(kept.sample_ids, 0))
    assert [group.is_capped for group in summaries] == [True, True, True, False, False, False]
    assert [group.num_rows for group in summaries] == rows.tolist()
    assert [group.weight for group in summaries] == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.2, 0.2])
    assert all(math.isnan(group.excess_loss) for group in summaries)


def test_doremi_goes_to_where_the_excess_is() -> None:
    reference = np.random.default_rng(2).gamma(2, 0.7, N).astype(np.float32)
    groups, mixture = Groups(IDS, reference), DoReMi(step_size=0.5, smoothing=0.01)
    spec = spec_of(RandomSubset(prune_ratio=0.5), mixture=mixture)
    weights = mixture.first_weights(np.array(SIZES))
    assert weights.tolist() == [size / N for size in SIZES]
    losses = losses_of(np.arange(N), 0)
    losses[::7] = np.inf
    summaries = summarize_groups(spec, groups, weights, np.arange(N), losses)
    expected = []
    for group, size in enumerate(SIZES):
        excess = [
            max(float(losses[i] - reference[i]), 0.0) for i in range(N) if IDS[i] == group and np.isfinite(losses[i])
        ]
        mean = sum(excess) / len(excess)
        assert summaries[group].excess_loss == pytest.approx(mean)
        expected.append(size / N * math.exp(0.5 * mean))
    expected = [0.99 * value / sum(expected) + 0.01 / NUM_GROUPS for value in expected]
    found = mixture.next_weights(weights, np.array([group.excess_loss for group in summaries]))
    assert found.tolist() == pytest.approx(expected)
    assert Mixture(weights=(1,) * 6).next_weights(weights, np.ones(6)) is weights


def test_an_empty_group_has_no_share_and_no_figures() -> None:
    ids = np.where(IDS == 2, 3, IDS).astype(np.uint16)
    spec = spec_of(RandomSubset(prune_ratio=0.5), mixture=DoReMi(), group_floor=0.2)
    groups = Groups(ids, np.zeros(N, np.float32))
    weights = DoReMi().first_weights(np.bincount(ids))
    assert weights[2] == 0
    table, _ = plan_epoch(spec, 0, initial_scores(N), groups, weights)
    summaries = summarize_groups(spec, groups, weights, table.sample_ids, losses_of(table.sample_ids, 0))
    assert (summaries[2].num_samples, summaries[2].num_rows, summaries[2].weight) == (0, 0, 0)
    assert math.isnan(summaries[2].mean_loss)
    after_it = DoReMi().next_weights(weights, np.array([each.excess_loss for each in summaries]))
    assert np.isfinite(after_it).all()
    assert after_it.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_groups": 0, "group_floor": 0.1}, "groups=None: expected the group of each sample"),
        ({"num_groups": 1_001}, "num_groups=1001: expected groups of ids from 0 to 999"),
        ({"group_floor": 1.0}, "group_floor=1.0: expected a number with 0 <= group_floor < 1"),
        ({"group_floor": 0.6}, "group_floor=0.6: expected at most 0.48, the share of all samples that an epoch visits"),
        ({"mixture": (1, 2)}, "mixture=(1, 2): expected evosample.Mixture"),
        ({"mixture": Mixture(weights=(1, 2))}, "mixture.weights=(1.0, 2.0): expected 6: one for each group"),
        ({"mixture": Mixture(), "policy": EvolvedSampling()}, "expected a policy with prune_ratio > 0"),
        ({"mixture": Mixture(), "policy": InfoBatch()}, "expected a policy with prune_ratio > 0"),
    ],
)
def test_what_can_t_be_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        spec_of(settings.pop("policy", EvolvedSampling(prune_ratio=0.5)), **settings)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Mixture(weights=(1, 0)), "mixture.weights=(1, 0): expected a positive number for each group"),
        (lambda: Mixture(weights=(1e300, 1)), "1e-9 to 1e9"),
        (lambda: Mixture(weights=(1, math.nan)), "a positive number for each group"),
        (lambda: Mixture(weights=("a",)), "a positive number for each group"),  # type: ignore[arg-type]
        (lambda: DoReMi(step_size=0), "mixture.step_size=0: expected a number from"),
        (lambda: DoReMi(smoothing=2), "mixture.smoothing=2: expected a number with"),
    ],
)
def test_a_mixture_that_can_t_be_is_refused(make: Any, said: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        make()
    assert said in str(caught.value)


def test_floors_that_an_epoch_has_no_room_for_are_refused_when_the_groups_are_known() -> None:
    spec = spec_of(EvolvedSampling(prune_ratio=0.5), num_groups=1_000, group_floor=0.1)
    assert floor_sizes(np.arange(N, dtype=np.uint16), 1_000, 0.1).sum() == N  # each rounded up to 1
    with pytest.raises(InvalidValue, match=r"group_floor=0.1: expected less: it needs 1,000 samples an epoch"):
        check_groups(spec, Groups(np.arange(N, dtype=np.uint16)))
    with pytest.raises(InvalidValue, match="groups=6: expected ids below 6"):
        check_groups(spec_of(Uniform()), Groups(np.full(N, 6, np.uint16)))
    with pytest.raises(InvalidValue, match="reference_losses='not all finite'"):
        check_groups(spec_of(Uniform()), Groups(IDS, np.full(N, np.nan, np.float32)))
