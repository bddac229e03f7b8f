"""Planning and folding. Statistical tests have fixed seeds; with another seed each would fail once in 10,000 runs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from evosample.sampling import (
    UCB,
    DrawMethod,
    EvolvedSampling,
    ExperimentSpec,
    InfoBatch,
    Kakurenbo,
    Policy,
    Purpose,
    RandomSubset,
    Report,
    Scores,
    Uniform,
    clipped_losses,
    fold_epoch,
    initial_scores,
    keep_samples,
    mask_of,
    permutation,
    plan_epoch,
    random_bits,
    select_mini_batch,
    shuffle_by_shard,
)

FALSE_ALARM_RATE = 1e-4


def visited_scores(n: int, seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    scores, weights = rng.gamma(2, 1, (2, n)).astype(np.float32)
    return initial_scores(n)._replace(scores=scores, sampling_weights=weights, num_visits=np.ones(n, np.uint16))


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


def test_self_normalized_weights_have_a_mean_of_one() -> None:
    normalized = spec(importance_weight="self_normalized")
    chosen = select_mini_batch(
        normalized,
        normalized.shape(1),
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
    table = plan_epoch(spec(), 1, visited_scores(40)).table
    assert len(table.sample_ids) == 16  # 20 are kept, 4 of them fill no step
    assert len(set(table.sample_ids.tolist())) == 16
    np.testing.assert_array_equal(table.prior_scores, visited_scores(40).scores[table.sample_ids])


def test_pruning_keeps_samples_in_proportion_to_their_weights() -> None:
    # Of three samples two are kept; the enumeration gives the probability of each pair.
    weights = np.array([1, 2, 5], np.float32)
    scores = initial_scores(3)._replace(sampling_weights=weights, num_visits=np.ones(3, np.uint16))
    pairs: dict[tuple[int, ...], int] = {(0, 1): 0, (0, 2): 0, (1, 2): 0}
    for seed in range(3000):
        three = ExperimentSpec(
            num_samples=3, num_epochs=3, meta_batch_size=2, policy=EvolvedSampling(prune_ratio=1 / 3), seed=seed
        )
        pairs[tuple(sorted(plan_epoch(three, 1, scores).table.sample_ids.tolist()))] += 1
    p = weights.astype(float) / 8
    expected = [p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b]) for a, b in pairs]
    assert stats.chisquare(list(pairs.values()), np.array(expected) * 3000).pvalue > FALSE_ALARM_RATE


def test_a_policy_that_keeps_the_unvisited_keeps_them_before_all_others() -> None:
    scores = visited_scores(40)
    scores.num_visits[[3, 17]] = 0
    scores.sampling_weights[[3, 17]] = 0
    bounded = spec(policy=UCB(prune_ratio=0.5), importance_weight="none")
    kept = keep_samples(bounded, 1, scores).sample_ids
    highest = np.argsort(-scores.sampling_weights)[:18]
    assert set(kept.tolist()) == {3, 17, *highest.tolist()}


def test_where_too_many_samples_have_no_loss_they_share_the_places_uniformly() -> None:
    scores = visited_scores(40)
    scores.num_visits[:30] = 0
    kept = np.zeros(40)
    for seed in range(500):
        bounded = spec(policy=UCB(prune_ratio=0.5), importance_weight="none", seed=seed)
        kept[keep_samples(bounded, 1, scores).sample_ids] += 1
    assert kept[30:].sum() == 0
    assert stats.chisquare(kept[:30]).pvalue > FALSE_ALARM_RATE


def test_a_random_subset_is_uniform_with_weights_of_exactly_one() -> None:
    subset = spec(policy=RandomSubset(prune_ratio=0.5))
    assert subset.shape(1).num_steps == 10
    assert subset.shape(1).step_rows == subset.shape(1).trained_rows == 2
    visits = np.zeros(40)
    scores = visited_scores(40)
    scores.num_visits[:30] = 0  # most samples of a random subset have not been visited: they must not be preferred
    for seed in range(1000):
        table = plan_epoch(dataclasses.replace(subset, seed=seed), 1, scores).table
        assert table.importance_weights is not None
        assert set(table.importance_weights.tolist()) == {1.0}
        visits[table.sample_ids] += 1
    assert visits.sum() == 20_000
    # Drawn without replacement, 20 of 40 vary less than a chi-square has it, by the factor (40 - 20) / (40 - 1).
    assert stats.chi2.sf(((visits - 500) ** 2 / 500).sum() * (39 / 20), 39) > FALSE_ALARM_RATE


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


@pytest.mark.parametrize("mask", [2**64 - 1, 0xFF00FFFFFFFFFFFF, 0xFF000FFFFFFFFFFF, 0x00FFFFFFFFFFFFFF, 0])
def test_a_permutation_sorts_by_24_bits(mask: int) -> None:
    bits = random_bits(0, Purpose.SHUFFLE, 0, 0, 0, 70_000) & np.uint64(mask)
    assert (permutation(bits.copy()) == np.argsort(bits >> np.uint64(40), kind="stable")).all()


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


@pytest.mark.parametrize("policy", [EvolvedSampling(prune_ratio=0.5), RandomSubset(prune_ratio=0.3), InfoBatch()])
def test_an_epoch_visits_the_same_samples_however_it_is_shuffled(policy: Policy) -> None:
    scores = visited_scores(1000)
    globally = plan_epoch(sharded(shard_sizes=(), shuffle_block_samples=0, policy=policy), 1, scores).table
    by_shard = plan_epoch(sharded(policy=policy), 1, scores).table
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
    after = initial_scores(5)
    losses = np.array([2.0, np.nan, np.inf], np.float32)
    folded = ExperimentSpec(num_samples=5, num_epochs=3, meta_batch_size=3, mini_batch_size=1)
    report = Report(losses, np.array([True, False, True]), {})
    counts = fold_epoch(folded, after, np.array([4, 0, 2]), report)
    assert counts == (1, 1, 1)
    assert after.num_visits.tolist() == [0, 0, 0, 0, 1]
    assert after.staleness.tolist() == [1, 1, 1, 1, 0]
    assert after.num_chosen.tolist() == [0, 0, 1, 0, 1]
    assert after.chosen_staleness.tolist() == [1, 1, 0, 1, 0]
    np.testing.assert_allclose(after.scores, [0.2, 0.2, 0.2, 0.2, 0.9 * 0.2 + 0.1 * 2], rtol=1e-6)
    np.testing.assert_allclose(after.sampling_weights, [0.2, 0.2, 0.2, 0.2, 0.2 * 0.2 + 0.8 * 2], rtol=1e-6)


def test_a_large_epoch_is_folded_as_small_ones_are() -> None:
    n = 200_000  # several blocks, the last of which is not whole
    folded = ExperimentSpec(num_samples=n, num_epochs=3, meta_batch_size=4, policy=UCB(), loss_clip_quantile=0.9)
    chance = np.random.default_rng(0)
    ids = chance.permutation(n)[: n // 2]
    losses = chance.random(len(ids), np.float32)
    losses[::7], losses[1::7] = np.nan, np.inf
    report = Report(losses, chance.random(len(ids)) < 0.3, {})
    scores = initial_scores(n, UCB().columns)
    scores.staleness[:] = chance.integers(0, 256, n)
    expected = scores.copy()
    counts = fold_epoch(folded, scores, ids, report)
    finite = np.isfinite(losses)
    num_of = [int(np.count_nonzero(mask)) for mask in (finite, losses == np.inf, np.isnan(losses))]
    assert [*counts] == num_of
    visited, chosen = ids[finite], ids[report.chosen]
    before = {"scores": expected.scores[visited]} | {name: rows[visited] for name, rows in expected.columns.items()}
    after = UCB().fold(before, clipped_losses(losses[finite], 0.9), {})
    assert (scores.scores[visited] == after["scores"]).all()
    assert (scores.sampling_weights[visited] == after["sampling_weights"]).all()
    assert (scores.columns["variance"][visited] == after["variance"]).all()
    for name, seen in (("num_visits", visited), ("num_chosen", chosen)):
        assert (getattr(scores, name) == mask_of(n, seen)).all()
    for name, seen in (("staleness", visited), ("chosen_staleness", chosen)):
        aged = np.minimum(getattr(expected, name).astype(int) + 1, 255)
        assert (getattr(scores, name) == np.where(mask_of(n, seen), 0, aged)).all()
    others = ~mask_of(n, visited)
    assert (scores.scores[others] == expected.scores[others]).all()


@pytest.mark.parametrize("name", ["num_visits", "num_chosen"])
def test_visits_and_choices_are_counted_up_to_what_16_bits_hold(name: str) -> None:
    scores = initial_scores(3)
    getattr(scores, name)[:] = 65_534, 65_535, 7
    report = Report(np.ones(3, np.float32), np.ones(3, np.bool_), {})
    fold_epoch(
        ExperimentSpec(num_samples=3, num_epochs=3, meta_batch_size=3, policy=Uniform()), scores, np.arange(3), report
    )
    assert getattr(scores, name).tolist() == [65_535, 65_535, 8]


@pytest.mark.parametrize("batch_draw", ["successive", "systematic", "top_k", "with_replacement"])
@pytest.mark.parametrize("finite", [[1, 2, 1, 1, 3], [0, 0, 0, 0, 0], [0, 2, 0], [0, 0, 0], []])
def test_a_loss_that_is_not_finite_is_chosen_only_to_fill_up(batch_draw: DrawMethod, finite: list[float]) -> None:
    policy = EvolvedSampling(batch_draw=batch_draw)
    losses = np.array([*finite, np.inf, *[np.nan] * (7 - len(finite))], np.float32)
    for seed in range(20):
        selecting = spec(mini_batch_size=4, policy=policy, importance_weight="none", seed=seed)
        chosen = select_mini_batch(
            selecting,
            selecting.shape(1),
            epoch=1,
            step=0,
            rank=0,
            world_size=1,
            prior_scores=np.zeros(8, np.float32),
            losses=losses,
            set_importance_weights=None,
        ).positions
        assert len(chosen) == 4
        if len(finite) >= 4 or (finite and batch_draw == "with_replacement"):
            assert np.isfinite(losses[chosen]).all()
        elif batch_draw != "with_replacement":
            assert set(range(len(finite))) <= set(chosen.tolist())


def test_hidden_samples_are_rows_at_the_end_in_whole_steps_and_fall_out_of_these_uniformly() -> None:
    scores = visited_scores(40)._replace(
        columns={"correct": np.ones(40, np.float32), "confidence": np.ones(40, np.float32)}
    )
    policy = Kakurenbo(max_ratio=0.3)  # 12 are hidden, 4 of them fill no step of 8
    hidden = set(np.argsort(scores.scores)[:12].tolist())
    visits = np.zeros(40)
    for seed in range(500):
        plan = plan_epoch(spec(policy=policy, mini_batch_size=8, importance_weight="none", seed=seed), 1, scores)
        assert (plan.shape.num_steps, plan.shape.num_hidden_steps) == (4, 1)
        trained, scored = plan.table.sample_ids[:24].tolist(), plan.table.sample_ids[24:].tolist()
        assert not hidden & set(trained)
        assert set(scored) < hidden
        assert scored == sorted(scored)
        visits[scored] += 1
    # Drawn without replacement, 8 of 12 vary less than a chi-square has it, by the factor (12 - 8) / (12 - 1).
    frequencies = visits[sorted(hidden)]
    statistic = ((frequencies - 500 * 8 / 12) ** 2).sum() / (500 * 8 / 12) * (11 / 4)
    assert stats.chi2.sf(statistic, 11) > FALSE_ALARM_RATE


@pytest.mark.parametrize(
    "policy", [EvolvedSampling(prune_ratio=0.5), RandomSubset(prune_ratio=0.5), UCB(), InfoBatch()]
)
def test_no_sample_is_skipped_more_often_in_a_row_than_it_may(policy: Policy) -> None:
    n, most = 60, 2
    planned = ExperimentSpec(num_samples=n, num_epochs=40, meta_batch_size=5, policy=policy, max_skipped_epochs=most)
    random = np.random.default_rng(0)
    hardness = random.gamma(0.3, 1, n).astype(np.float32)  # so uneven that some would never come
    scores, skipped = initial_scores(n, policy.columns), np.zeros(n, np.int64)
    longest = []
    for epoch in range(40):
        table, shape = plan_epoch(planned, epoch, scores)
        if not planned.is_annealing(epoch):
            kept = keep_samples(planned, epoch, scores).sample_ids
            assert set(np.flatnonzero(scores.staleness >= most)) <= set(kept.tolist())
        skipped += 1
        skipped[table.sample_ids] = 0
        longest.append(int(skipped.max()))
        report = Report(hardness[table.sample_ids], np.zeros(shape.num_rows, np.bool_), {})
        fold_epoch(planned, scores, table.sample_ids, report)
    # one more where a sample is kept, but falls out of the whole steps
    assert max(longest) <= most + 2
    assert longest.count(most) > 5, "the bound was reached: otherwise the test tests nothing"


def test_losses_above_the_quantile_count_as_that() -> None:
    losses = np.array([5, 1, 2, 9, 3, 4, 8, 6, 7, 100], np.float32)
    np.testing.assert_array_equal(clipped_losses(losses, 0.9), np.minimum(losses, 9))
    np.testing.assert_array_equal(clipped_losses(losses, 0.05), np.ones(10))
    assert clipped_losses(losses, 1) is losses
    planned = spec(num_samples=10, meta_batch_size=10, loss_clip_quantile=0.9, policy=EvolvedSampling(beta2=0))
    report = Report(losses, np.zeros(10, np.bool_), {})
    after = initial_scores(10)
    fold_epoch(planned, after, np.arange(10), report)
    assert after.scores.max() == 9


def test_a_clipped_loss_is_chosen_no_more_often_than_the_quantile() -> None:
    losses = np.array([1, 1, 1, 1, 1, 1, 1, 1, 1, 1000], np.float32)
    chosen = {0.9: 0, 1.0: 0}
    for quantile in chosen:
        for seed in range(300):
            planned = spec(
                num_samples=10,
                meta_batch_size=10,
                mini_batch_size=1,
                loss_clip_quantile=quantile,
                seed=seed,
                policy=EvolvedSampling(beta1=0),
                importance_weight="none",
            )
            drawn = select_mini_batch(
                planned,
                planned.shape(1),
                epoch=1,
                step=0,
                rank=0,
                world_size=1,
                prior_scores=np.ones(10, np.float32),
                losses=losses,
                set_importance_weights=None,
            )
            chosen[quantile] += 9 in drawn.positions
    assert chosen[1.0] > 290
    assert 10 < chosen[0.9] < 60
