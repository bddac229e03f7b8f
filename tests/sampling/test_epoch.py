"""Planning and folding. Statistical tests have fixed seeds; with another seed each would fail once in 10,000 runs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from evosample.sampling import (
    EvolvedSampling,
    ExperimentSpec,
    Purpose,
    RandomSubset,
    Scores,
    fold_epoch,
    initial_scores,
    permutation,
    plan_epoch,
    random_bits,
    select_mini_batch,
    shuffle_by_shard,
)

FALSE_ALARM_RATE = 1e-4


def visited_scores(n: int, seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    return Scores(rng.gamma(2, 1, n).astype(np.float32), rng.gamma(2, 1, n).astype(np.float32), np.ones(n, np.uint32))


def spec(**changes: object) -> ExperimentSpec:
    base = ExperimentSpec(
        num_samples=40,
        num_epochs=5,
        meta_batch_size=8,
        mini_batch_size=2,
        policy=EvolvedSampling(prune_ratio=0.5),
        importance_weight="unbiased",
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def mini_batch_means(weighting: str, num_epochs: int) -> tuple[NDArray[np.float64], float]:
    """Weighted mean losses of mini-batches, one an epoch plan of its own, and the mean loss over the dataset."""
    scores = visited_scores(40)
    losses = np.random.default_rng(5).gamma(2, 1, 40).astype(np.float32)
    means = []
    for seed in range(num_epochs):
        planned = spec(seed=seed)
        table = plan_epoch(planned, 1, scores)
        assert table.importance_weights is not None
        ids, step_losses = table.sample_ids[:8], losses[table.sample_ids[:8]]
        chosen = select_mini_batch(
            planned,
            epoch=1,
            step=0,
            rank=0,
            world_size=1,
            prior_scores=table.prior_scores[:8],
            losses=step_losses,
            set_importance_weights=table.importance_weights[:8],
        )
        weights = chosen.importance_weights.astype(np.float64)
        if weighting == "with replacement":  # 1 / (n p) at both levels, p as of a first draw
            batch_weights = planned.policy.sampling_weights(table.prior_scores[:8], step_losses)
            set_p = scores.sampling_weights / scores.sampling_weights.sum()
            batch_p = batch_weights / batch_weights.sum()
            weights = 1 / (8 * batch_p[chosen.positions]) / (40 * set_p[ids[chosen.positions]])
        means.append((weights * step_losses[chosen.positions]).mean())
    return np.array(means), float(losses.mean())


@pytest.mark.parametrize("weighting", ["unbiased", "with replacement"])
def test_unbiased_weights_of_both_levels_estimate_the_mean_loss_and_weights_for_replacement_do_not(
    weighting: str,
) -> None:
    means, mean_loss = mini_batch_means(weighting, 4000)
    z = (means.mean() - mean_loss) / (means.std() / np.sqrt(len(means)))
    is_unbiased = abs(z) < stats.norm.isf(FALSE_ALARM_RATE / 2)
    assert is_unbiased == (weighting == "unbiased")


def test_self_normalized_weights_have_a_mean_of_one() -> None:
    chosen = select_mini_batch(
        spec(importance_weight="self_normalized"),
        epoch=1,
        step=0,
        rank=0,
        world_size=1,
        prior_scores=np.ones(8, np.float32),
        losses=np.arange(8, dtype=np.float32),
        set_importance_weights=np.linspace(1, 2, 8, dtype=np.float32),
    )
    assert chosen.importance_weights.mean() == pytest.approx(1)
    assert len(set(chosen.importance_weights.tolist())) == 2


def test_a_pruned_epoch_visits_whole_steps_of_distinct_samples() -> None:
    table = plan_epoch(spec(), 1, visited_scores(40))
    assert len(table.sample_ids) == 16  # 20 are kept, 4 of them fill no step
    assert len(set(table.sample_ids.tolist())) == 16
    np.testing.assert_array_equal(table.prior_scores, visited_scores(40).scores[table.sample_ids])


def test_pruning_keeps_samples_in_proportion_to_their_weights() -> None:
    # Of three samples two are kept; the enumeration gives the probability of each pair.
    weights = np.array([1, 2, 5], np.float32)
    scores = Scores(weights, weights, np.ones(3, np.uint32))
    pairs: dict[tuple[int, ...], int] = {(0, 1): 0, (0, 2): 0, (1, 2): 0}
    for seed in range(3000):
        three = ExperimentSpec(
            num_samples=3, num_epochs=3, meta_batch_size=2, policy=EvolvedSampling(prune_ratio=1 / 3), seed=seed
        )
        pairs[tuple(sorted(plan_epoch(three, 1, scores).sample_ids.tolist()))] += 1
    p = weights.astype(float) / 8
    expected = [p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b]) for a, b in pairs]
    assert stats.chisquare(list(pairs.values()), np.array(expected) * 3000).pvalue > FALSE_ALARM_RATE


def test_samples_without_a_loss_are_kept_before_all_others() -> None:
    scores = visited_scores(40)
    scores.num_visits[[3, 17]] = 0
    scores.sampling_weights[[3, 17]] = 1e-9
    kept = np.zeros(40)
    for seed in range(50):
        table = plan_epoch(spec(seed=seed, meta_batch_size=1, mini_batch_size=1), 1, scores)
        assert table.importance_weights is not None
        kept[table.sample_ids] += 1
        forced = np.isin(table.sample_ids, [3, 17])
        np.testing.assert_allclose(table.importance_weights[forced], 20 / 40)
    assert kept[3] == kept[17] == 50
    assert kept.sum() == 50 * 20


def test_where_too_many_samples_have_no_loss_they_share_the_places_uniformly() -> None:
    scores = visited_scores(40)
    scores.num_visits[:30] = 0
    kept = np.zeros(40)
    for seed in range(500):
        kept[plan_epoch(spec(seed=seed, meta_batch_size=1, mini_batch_size=1), 1, scores).sample_ids] += 1
    assert kept[30:].sum() == 0
    assert stats.chisquare(kept[:30]).pvalue > FALSE_ALARM_RATE


def test_a_random_subset_is_uniform_with_weights_of_exactly_one() -> None:
    subset = spec(policy=RandomSubset(prune_ratio=0.5))
    assert subset.shape(1).num_steps == 2
    assert subset.shape(1).step_rows == subset.shape(1).trained_rows == 2
    visits = np.zeros(40)
    scores = visited_scores(40)
    scores.num_visits[:30] = 0  # most samples of a random subset have not been visited: they must not be preferred
    for seed in range(1000):
        table = plan_epoch(dataclasses.replace(subset, seed=seed), 1, scores)
        assert table.importance_weights is not None
        assert set(table.importance_weights.tolist()) == {1.0}
        visits[table.sample_ids] += 1
    assert visits.sum() == 4000
    assert stats.chisquare(visits).pvalue > FALSE_ALARM_RATE


def test_shuffles_are_permutations_and_uniform() -> None:
    counts = np.zeros((6, 6))
    for epoch in range(3000):
        order = permutation(random_bits(0, Purpose.SHUFFLE, epoch, 0, 0, 6))
        counts[np.arange(6), order.astype(int)] += 1
    assert (counts.sum(0) == 3000).all()
    # 5 x 5 of the cells are free
    assert stats.chi2.sf(((counts - 500) ** 2 / 500).sum(), 25) > FALSE_ALARM_RATE


@pytest.mark.parametrize("n", [0, 1, 2, 255, 256, 257])
def test_a_permutation_of_any_length_has_every_index_once(n: int) -> None:
    assert sorted(permutation(random_bits(0, Purpose.SHUFFLE, 0, 0, 0, n)).tolist()) == list(range(n))


SHARD_SIZES = (100, 50, 150, 100, 1, 99, 100, 400)


def sharded(**changes: object) -> ExperimentSpec:
    changes = {"shard_sizes": SHARD_SIZES, "shuffle_block_samples": 200, "num_samples": 1000} | changes
    return spec(**changes)


def test_shards_are_permuted_and_samples_shuffled_in_blocks_of_shards() -> None:
    shards = np.repeat(np.arange(8), SHARD_SIZES)
    orders = set()
    for epoch in range(100):
        order = shuffle_by_shard(sharded(num_epochs=100), epoch, np.arange(1000))
        assert sorted(order) == list(range(1000))
        first_rows = {shard: int(np.argmax(shards[order] == shard)) for shard in range(8)}
        last_rows = {shard: 999 - int(np.argmax(shards[order][::-1] == shard)) for shard in range(8)}
        # Blocks follow each other: shards either share one, or the one's samples all come before the other's.
        for a in range(8):
            together = [b for b in range(8) if first_rows[b] <= last_rows[a] and first_rows[a] <= last_rows[b]]
            begun_before = sum(SHARD_SIZES[b] for b in together) - max(SHARD_SIZES[b] for b in together)
            assert begun_before < 200 or len(together) == 1
        orders.add(tuple(sorted(first_rows, key=lambda shard: first_rows[shard])))
    assert len(orders) > 90


def test_a_block_is_shuffled_uniformly() -> None:
    counts = np.zeros((6, 6))
    one_block = sharded(num_samples=6, shard_sizes=(2, 4), shuffle_block_samples=6, meta_batch_size=3, num_epochs=3000)
    for epoch in range(3000):
        counts[np.arange(6), shuffle_by_shard(one_block, epoch, np.arange(6))] += 1
    assert stats.chi2.sf(((counts - 500) ** 2 / 500).sum(), 25) > FALSE_ALARM_RATE


@pytest.mark.parametrize("policy", [EvolvedSampling(prune_ratio=0.5), RandomSubset(prune_ratio=0.3)])
def test_an_epoch_visits_the_same_samples_however_it_is_shuffled(policy: EvolvedSampling | RandomSubset) -> None:
    scores = visited_scores(1000)
    globally = plan_epoch(sharded(shard_sizes=(), shuffle_block_samples=0, policy=policy), 1, scores)
    by_shard = plan_epoch(sharded(policy=policy), 1, scores)
    assert sorted(globally.sample_ids) == sorted(by_shard.sample_ids)
    assert (by_shard.prior_scores == scores.scores[by_shard.sample_ids]).all()
    assert globally.importance_weights is not None
    assert by_shard.importance_weights is not None
    weight_of = dict(zip(globally.sample_ids, globally.importance_weights, strict=True))
    assert [weight_of[i] for i in by_shard.sample_ids] == by_shard.importance_weights.tolist()


def test_a_shard_of_which_nothing_is_kept_is_no_trouble() -> None:
    order = shuffle_by_shard(sharded(), 0, np.array([5, 7, 980, 999]))
    assert sorted(order) == [0, 1, 2, 3]


def test_folding_changes_what_was_visited_and_counts_the_rest() -> None:
    before = initial_scores(5)
    losses = np.array([2.0, np.nan, np.inf], np.float32)
    folded = ExperimentSpec(num_samples=5, num_epochs=3, meta_batch_size=3, mini_batch_size=1)
    after, counts = fold_epoch(folded, before, np.array([4, 0, 2]), losses)
    assert counts == (1, 1, 1)
    assert after.num_visits.tolist() == [0, 0, 0, 0, 1]
    np.testing.assert_allclose(after.scores, [0.2, 0.2, 0.2, 0.2, 0.9 * 0.2 + 0.1 * 2], rtol=1e-6)
    np.testing.assert_allclose(after.sampling_weights, [0.2, 0.2, 0.2, 0.2, 0.2 * 0.2 + 0.8 * 2], rtol=1e-6)
    assert before.num_visits.sum() == 0


def test_a_loss_that_is_not_finite_is_chosen_only_to_fill_up() -> None:
    losses = np.array([1, np.nan, 2, np.inf, 1, 1, np.nan, 3], np.float32)
    for step in range(20):
        chosen = select_mini_batch(
            spec(mini_batch_size=4),
            epoch=1,
            step=step,
            rank=0,
            world_size=1,
            prior_scores=np.ones(8, np.float32),
            losses=losses,
            set_importance_weights=None,
        )
        assert np.isfinite(losses[chosen.positions]).all()
