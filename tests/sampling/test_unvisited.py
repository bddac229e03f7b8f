"""Samples without a loss: how they are drawn, and how many are left. Without a scoring pass nothing else looks at them.

Statistical tests have fixed seeds; with another seed each would fail once in 10,000 runs.
"""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from evosample.sampling import (
    EvolvedSampling,
    ExperimentSpec,
    Groups,
    Mixture,
    Policy,
    Report,
    Scores,
    fold_epoch,
    initial_scores,
    keep_samples,
    plan_epoch,
    starting_scores,
)

FALSE_ALARM_RATE = 1e-4
Z = stats.norm.isf(FALSE_ALARM_RATE)


def with_losses(n: int, losses: dict[int, float]) -> Scores:
    """The scores that an epoch starts from when some samples have had a loss (and beta1 is 0, so that it is w)."""
    scores = initial_scores(n)
    spec = ExperimentSpec(num_samples=n, num_epochs=4, mini_batch_size=1, policy=EvolvedSampling(beta1=0))
    report = Report(np.array([*losses.values()], np.float32), np.ones(len(losses), np.bool_), {})
    fold_epoch(spec, scores, np.array([*losses]), report)
    return starting_scores(scores, n, {})


def test_before_any_sample_has_a_loss_all_weigh_the_same() -> None:
    assert set(starting_scores(initial_scores(10), 10, {}).sampling_weights.tolist()) == {np.float32(0.1)}


def test_samples_without_a_loss_have_the_mean_weight_of_the_others_whatever_that_is() -> None:
    assert with_losses(5, {0: 1, 3: 5}).sampling_weights.tolist() == [1, 3, 3, 5, 3]
    assert with_losses(3, {1: 0}).sampling_weights.tolist() == [0, 0, 0]
    most = float(np.finfo(np.float32).max)
    assert with_losses(4, {0: most, 1: most}).sampling_weights.tolist() == [most] * 4


def test_the_weights_of_samples_without_a_loss_follow_those_of_the_others_and_nothing_else_changes() -> None:
    scores = with_losses(4, {0: 1, 1: 3})
    spec = ExperimentSpec(num_samples=4, num_epochs=4, mini_batch_size=1, policy=EvolvedSampling(beta1=0))
    fold_epoch(spec, scores, np.array([1]), Report(np.array([9], np.float32), np.ones(1, np.bool_), {}))
    before = scores.copy()
    after = starting_scores(scores, 6, {})
    assert after.sampling_weights.tolist() == [1, 9, 5, 5, 5, 5]
    again = starting_scores(after.copy(), 6, {})
    for name in ("scores", "num_visits", "staleness", "num_chosen", "chosen_staleness"):
        assert getattr(after, name)[:4].tolist() == getattr(before, name).tolist()
        assert getattr(again, name).tolist() == getattr(after, name).tolist()
    assert again.sampling_weights.tolist() == after.sampling_weights.tolist()
    assert after.num_visits[4:].tolist() == [0, 0]


def test_samples_without_a_loss_are_drawn_as_if_they_had_the_mean_one() -> None:
    # Two of four are kept; the third has had no loss. The enumeration gives the probability of each pair.
    scores, weights = with_losses(4, {0: 1, 1: 2, 3: 6}), [1, 2, 3, 6]
    pairs = Counter[tuple[int, ...]]()
    for seed in range(4000):
        policy = EvolvedSampling(prune_ratio=0.5, beta1=0)
        spec = ExperimentSpec(num_samples=4, num_epochs=4, mini_batch_size=1, policy=policy, seed=seed)
        pairs[tuple(keep_samples(spec, 1, scores).sample_ids.tolist())] += 1
    expected = {
        (a, b): weights[a] * weights[b] / 12 * (1 / (12 - weights[a]) + 1 / (12 - weights[b]))
        for a, b in itertools.combinations(range(4), 2)
    }
    assert set(pairs) == set(expected)
    counts = [pairs[pair] for pair in expected]
    assert stats.chisquare(counts, np.array(list(expected.values())) * 4000).pvalue > FALSE_ALARM_RATE


def never_visited(n: int, losses: NDArray[np.float32], *, policy: Policy, added_in: int = 0) -> list[tuple[int, int]]:
    """After each of 10 epochs: of the first half of the samples, and of the others, how many have had no loss.

    The second half is added before the epoch `added_in`.
    """
    found = []
    scores = initial_scores(n // 2 if added_in else n)
    for epoch in range(10):
        num_samples = n // 2 if epoch < added_in else n
        spec = ExperimentSpec(num_samples=num_samples, num_epochs=10, mini_batch_size=20, policy=policy)
        scores = starting_scores(scores, num_samples, {})
        ids = plan_epoch(spec, epoch, scores).table.sample_ids
        fold_epoch(spec, scores, ids, Report(losses[ids], np.ones(len(ids), np.bool_), {}))
        unvisited = scores.num_visits == 0
        found.append((int(unvisited[: n // 2].sum()), int(unvisited[n // 2 :].sum())))
    return found


@pytest.mark.parametrize("n", [1_000, 100_000, 1_000_000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_of_those_never_visited_a_share_is_left_that_falls_by_the_prune_ratio_at_least(n: int, spread: float) -> None:
    losses = np.random.default_rng(0).lognormal(0, spread, n).astype(np.float32)
    for epoch, left in enumerate(never_visited(n, losses, policy=EvolvedSampling())):
        bound = n * 0.75 ** (epoch + 1)
        assert sum(left) < bound + Z * np.sqrt(bound)
        if not spread:  # all weigh the same, and the bound is met
            assert sum(left) > bound - Z * np.sqrt(bound)
    if spread == 3:  # the more uneven the weights are, the more often is the mean drawn: in some seven of ten draws
        assert sum(left) < 1e-3 * n


@pytest.mark.parametrize("n", [2_000, 1_000_000])
def test_samples_that_come_late_wait_no_longer(n: int) -> None:
    losses = np.random.default_rng(0).lognormal(0, 1, n).astype(np.float32)
    left = never_visited(n, losses, policy=EvolvedSampling(), added_in=5)
    for epoch in range(5, 10):
        bound = n // 2 * 0.75 ** (epoch - 4)
        assert left[epoch][1] < bound + Z * np.sqrt(bound)


@pytest.mark.parametrize("mixture", [None, Mixture(weights=(1, 1, 1, 1))])
def test_floors_and_mixtures_leave_no_more_of_a_group_whose_losses_are_high(mixture: Mixture | None) -> None:
    """Within a hard group, samples without a loss would otherwise rank below all that had one."""
    n, rng = 4_000, np.random.default_rng(0)
    groups = Groups((np.arange(n) % 4).astype(np.uint16))
    losses = (rng.lognormal(0, 0.3, n) * np.where(groups.ids == 0, 5, 0.5)).astype(np.float32)
    scores = initial_scores(n)
    for epoch in range(10):
        spec = ExperimentSpec(
            num_samples=n,
            num_epochs=10,
            mini_batch_size=20,
            num_groups=4,
            group_floor=0.2 if mixture is None else 0.0,
            mixture=mixture,
        )
        scores = starting_scores(scores, n, {})
        shares = None if mixture is None else mixture.first_weights(np.full(4, n // 4))
        ids = plan_epoch(spec, epoch, scores, groups, shares).table.sample_ids
        fold_epoch(spec, scores, ids, Report(losses[ids], np.ones(len(ids), np.bool_), {}))
        left = np.bincount(groups.ids[scores.num_visits == 0], minlength=4)
        bound = n / 4 * 0.755 ** (epoch + 1)  # 20 of 1,000 may fall out of the whole steps
        assert (left < bound + Z * np.sqrt(bound)).all()
