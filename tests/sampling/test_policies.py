"""Policies against plain-loop references, by statistics, and at their edges.

Statistical tests have fixed seeds; with another seed each would fail once in 10,000 runs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from evosample.sampling import (
    UCB,
    Columns,
    DrawMethod,
    EvolvedSampling,
    ExperimentSpec,
    FoldCounts,
    Groups,
    ImportanceWeight,
    InfoBatch,
    InvalidValue,
    Kakurenbo,
    Kept,
    KeptSamples,
    OrderedSGD,
    Plan,
    Policy,
    RandomSubset,
    Report,
    Scores,
    SelectiveBackprop,
    Uniform,
    fold_epoch,
    initial_scores,
    keep_samples,
    part,
    plan_epoch,
    recorded_losses,
    select_mini_batch,
    starting_scores,
)
from sampling.reference import REFERENCES, Experiment

FALSE_ALARM_RATE = 1e-4
NUM_EPOCHS = 10
SET_DRAWS: list[DrawMethod] = ["successive", "systematic", "top_k"]
BATCH_DRAWS: list[DrawMethod] = [*SET_DRAWS, "with_replacement"]

Losses = Callable[[int, NDArray[np.integer]], NDArray[np.float32]]
"""What the model gives in an epoch for sample ids; non-finite where it gives nothing sensible."""


def noisy_losses(epoch: int, ids: NDArray[np.integer]) -> NDArray[np.float32]:
    """Samples of different difficulty that are learned over time; many equal losses, zeros, NaN and infinities."""
    rng = np.random.default_rng(epoch)
    difficulty = np.random.default_rng(99).gamma(1, 1, 1000)
    losses = (difficulty * rng.uniform(0.5, 1.5, 1000) / (1 + 0.2 * epoch)).round(1).astype(np.float32)
    losses[rng.random(1000) < 0.04] = np.nan
    losses[rng.random(1000) < 0.02] = np.inf
    found: NDArray[np.float32] = losses[ids]
    return found


def reports_of(policy: Policy, epoch: int, num_rows: int) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(1000 + epoch)
    columns = {
        "correct": (rng.random(num_rows) < 0.9).astype(np.float32),
        "confidence": rng.uniform(0.5, 1, num_rows).astype(np.float32),
    }
    for column in columns.values():
        column[rng.random(num_rows) < 0.02] = np.nan
    return {name: columns[name] for name in policy.reported_columns}


@dataclasses.dataclass
class Epoch:
    """What one epoch of a followed experiment came to."""

    number: int
    kept: KeptSamples
    plan: Plan
    chosen: list[NDArray[np.int64]]  # positions in their part, by step and rank
    counts: FoldCounts
    scores: Scores  # after it


def follow(
    spec: ExperimentSpec,
    world_size: int = 1,
    losses_of: Losses = noisy_losses,
    lost_rows: float = 0.05,
    *,
    grows_to: Mapping[int, int] = MappingProxyType({}),
) -> Iterator[Epoch]:
    """Run an experiment epoch by epoch, the reference beside it, and compare everything that either decides.

    Args:
        lost_rows: share of an epoch's rows whose losses are never reported.
        grows_to: epoch -> samples that the dataset has from then on.
    """

    def groups_of(spec: ExperimentSpec) -> list[int]:
        return [i % spec.num_groups for i in range(spec.num_samples)] if spec.num_groups else []

    spec.check_world_size(world_size)
    reference: Experiment = REFERENCES[type(spec.policy)](spec, world_size, groups_of(spec))
    scores = initial_scores(spec.num_samples, spec.policy.columns)
    for number in range(spec.num_epochs):
        if number in grows_to:
            spec = dataclasses.replace(spec, num_samples=grows_to[number])
            reference.extend(spec, groups_of(spec))
        groups = Groups(np.array(groups_of(spec), np.uint16)) if spec.num_groups else None
        scores = starting_scores(scores, spec.num_samples, spec.policy.columns)
        reference.weigh_unvisited()
        assert scores.sampling_weights.tolist() == reference.sampling_weights
        kept, plan = keep_samples(spec, number, scores, groups), plan_epoch(spec, number, scores, groups)
        expected = reference.kept(number)
        assert kept.sample_ids.tolist() == expected.ids
        assert kept.hidden_ids.tolist() == expected.hidden
        assert (kept.inclusion_probabilities is None) == (spec.importance_weight == "none")
        if kept.inclusion_probabilities is not None:
            np.testing.assert_allclose(kept.inclusion_probabilities, [expected.probabilities[i] for i in expected.ids])
        expected_ids, expected_weights, num_hidden_steps = reference.table(number, expected)
        (ids, prior_scores, set_weights), shape = plan
        assert ids.tolist() == expected_ids
        assert (shape.num_rows, shape.num_hidden_steps) == (len(ids), num_hidden_steps)
        assert shape == spec.shape(number, len(kept.sample_ids), len(kept.hidden_ids))
        assert prior_scores.tolist() == [reference.scores[i] for i in expected_ids]
        assert (set_weights is None) == (expected_weights is None) == (not spec.has_set_weights)
        if set_weights is not None:
            np.testing.assert_allclose(set_weights, np.array(expected_weights), rtol=2e-7)

        losses = losses_of(number, ids)
        chosen, all_chosen = np.zeros(len(ids), np.bool_), []
        for step, rank in itertools.product(range(shape.num_steps), range(world_size)):
            rows = part(np.arange(len(ids)), shape.step_rows, rank, world_size)[step]
            found = select_mini_batch(
                spec,
                shape,
                epoch=number,
                step=step,
                rank=rank,
                world_size=world_size,
                prior_scores=prior_scores[rows],
                losses=losses[rows],
                set_importance_weights=None if set_weights is None else set_weights[rows],
            )
            if step < shape.num_steps - num_hidden_steps:
                weights = None if expected_weights is None else [expected_weights[row] for row in rows]
                positions, importance_weights = reference.select(
                    number, step, rank, ids[rows].tolist(), list(losses[rows]), weights
                )
                assert found.positions.tolist() == positions
                assert found.importance_weights.dtype == np.float32
                np.testing.assert_allclose(found.importance_weights, importance_weights, rtol=1e-6)
            else:
                assert found.positions.size == found.importance_weights.size == 0
            chosen[rows[found.positions]] = True
            all_chosen.append(found.positions)

        recorded = recorded_losses(losses)[0].copy()
        lost = np.random.default_rng(2000 + number).random(len(ids)) < lost_rows
        recorded[lost], chosen[lost] = np.nan, False
        report = Report(recorded, chosen, reports_of(spec.policy, number, len(ids)))
        counts = fold_epoch(spec, scores, ids, report)
        columns = {name: list(column) for name, column in report.columns.items()}
        assert counts == reference.fold(ids.tolist(), list(recorded), chosen.tolist(), columns)
        assert sum(counts) == len(ids)
        for name, column in [
            ("scores", reference.scores),
            ("sampling_weights", reference.sampling_weights),
            ("num_visits", reference.visits),
            ("staleness", reference.staleness),
            ("num_chosen", reference.chosen),
            ("chosen_staleness", reference.chosen_staleness),
        ]:
            assert getattr(scores, name).tolist() == column, name
        assert {name: column.tolist() for name, column in scores.columns.items()} == reference.own
        yield Epoch(number, kept, plan, all_chosen, counts, scores.copy())


def spec_of(policy: Policy, importance_weight: ImportanceWeight = "none", **changes: Any) -> ExperimentSpec:
    values = {"num_samples": 99, "num_epochs": NUM_EPOCHS, "meta_batch_size": 8, "mini_batch_size": 4, "seed": 7}
    return ExperimentSpec(**(values | changes), policy=policy, importance_weight=importance_weight)


POLICIES: list[Policy] = [
    *[EvolvedSampling(prune_ratio=0.3, set_draw=s, batch_draw=b) for s in SET_DRAWS for b in BATCH_DRAWS],
    EvolvedSampling(),
    EvolvedSampling(beta1=0, beta2=0, prune_ratio=0.6, annealing=0.2),
    EvolvedSampling(beta1=1, beta2=1, annealing=0),
    EvolvedSampling(beta1=0, beta2=0, prune_ratio=0.3, annealing=0),
    Uniform(),
    RandomSubset(),
    RandomSubset(prune_ratio=0.3),
    InfoBatch(),
    InfoBatch(ratio=0.9, delta=0.5),
    Kakurenbo(),
    Kakurenbo(max_ratio=0.7, min_confidence=0.55),
    OrderedSGD(),
    UCB(),
    UCB(prune_ratio=0.6, c=20, alpha=0.3),
    SelectiveBackprop(),
    SelectiveBackprop(begin=0, end=1, selecting_interval=1),
    SelectiveBackprop(begin=0.15, end=0.7, selecting_interval=3),
]


def weightings_of(policy: Policy) -> list[ImportanceWeight]:
    try:
        spec_of(policy, "unbiased")
    except InvalidValue:
        return ["none"]
    return ["none", "unbiased", "self_normalized"]


@pytest.mark.parametrize(
    ("policy", "importance_weight", "world_size"),
    [
        (policy, importance_weight, world_size)
        for policy in POLICIES
        for importance_weight in weightings_of(policy)
        for world_size in {"none": (1, 4), "unbiased": (4,), "self_normalized": (2,)}[importance_weight]
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Policy) else str(value),
)
def test_ten_epochs_are_those_of_a_plain_loop(
    policy: Policy, importance_weight: ImportanceWeight, world_size: int
) -> None:
    epochs = list(follow(spec_of(policy, importance_weight), world_size))
    assert len(epochs) == NUM_EPOCHS
    assert min(np.sum([epoch.counts for epoch in epochs], axis=0)) > 0  # there were rows of all kinds
    if not isinstance(policy, Uniform):
        rows = [len(epoch.kept.sample_ids) for epoch in epochs]
        selecting = [epoch.number for epoch in epochs if any(len(c) < 8 / world_size for c in epoch.chosen)]
        assert min(rows) < 99 or selecting
    if isinstance(policy, Kakurenbo):
        assert sum(epoch.plan.shape.num_hidden_steps > 0 for epoch in epochs) >= 4


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    ("importance_weight", "changes"),
    [
        ("none", {}),
        ("unbiased", {}),
        ("self_normalized", {"num_groups": 4, "group_floor": 0.1}),
        ("none", {"num_groups": 3, "group_floor": 0.15, "policy": EvolvedSampling(set_draw="systematic")}),
        ("none", {"policy": EvolvedSampling(prune_ratio=0.5, annealing=0.1)}),
    ],
)
def test_ten_epochs_without_scoring_are_those_of_a_plain_loop(
    importance_weight: ImportanceWeight, changes: dict[str, Any], world_size: int
) -> None:
    """With losses that are never reported, so that samples get their first one late, and samples that are added."""
    settings = {"policy": EvolvedSampling(), "meta_batch_size": None, "mini_batch_size": 12, **changes}
    spec = spec_of(importance_weight=importance_weight, **settings)
    epochs = list(follow(spec, world_size, lost_rows=0.3, grows_to={3: 140, 6: 200}))
    assert len(epochs) == NUM_EPOCHS
    assert min(np.sum([epoch.counts for epoch in epochs], axis=0)) > 0
    assert all(len(chosen) == 12 / world_size for epoch in epochs for chosen in epoch.chosen)
    first_visits = [np.count_nonzero(epoch.scores.num_visits == 1) for epoch in epochs]
    assert min(first_visits) > 0, "there are first losses in every epoch"


# Statistics of the random draws that a policy makes itself; those of draw() are in test_draws.py.


def visited(policy: Policy, losses: ArrayLike, **columns: ArrayLike) -> Scores:
    """Scores after one finite loss of every sample."""
    finite = np.array(losses, np.float32)
    n = len(finite)
    spec = ExperimentSpec(num_samples=n, num_epochs=4, meta_batch_size=2, mini_batch_size=1, policy=policy)
    reported = {name: np.array(column, np.float32) for name, column in columns.items()}
    report = Report(finite, np.zeros(n, np.bool_), reported)
    scores = initial_scores(n, policy.columns)
    fold_epoch(spec, scores, np.arange(n), report)
    return scores


def kept_sets(policy: Policy, scores: Scores, num_seeds: int) -> Counter[tuple[int, ...]]:
    """Which samples an epoch keeps, by seed."""
    n, sets = len(scores.scores), Counter[tuple[int, ...]]()
    for seed in range(num_seeds):
        spec = spec_of(policy, num_samples=n, meta_batch_size=1, mini_batch_size=1, seed=seed)
        sets[tuple(keep_samples(spec, 1, scores).sample_ids.tolist())] += 1
    return sets


def fits(observed: Counter[tuple[int, ...]], expected: Mapping[Any, float]) -> bool:
    assert set(observed) <= set(expected)
    counts = [observed[outcome] for outcome in expected]
    result = stats.chisquare(counts, np.array(list(expected.values())) * observed.total())
    return bool(result.pvalue > FALSE_ALARM_RATE)


def test_every_easy_sample_is_left_out_by_the_ratio_for_itself_and_no_other_is() -> None:
    policy = InfoBatch(ratio=0.3)
    scores = visited(policy, [0.1, 5, 0.2, 6, 0.3, 3])  # the mean is 2.43
    expected = {}
    for left_out in itertools.product([False, True], repeat=3):
        easy = [i for i, is_out in zip((0, 2, 4), left_out, strict=True) if not is_out]
        expected[tuple(sorted([1, 3, 5, *easy]))] = 0.3 ** sum(left_out) * 0.7 ** (3 - sum(left_out))
    assert fits(kept_sets(policy, scores, 4000), expected)


def test_a_random_subset_is_any_subset() -> None:
    policy = RandomSubset(prune_ratio=0.4)
    sets = kept_sets(policy, visited(policy, [5, 0, 1, 2, 3]), 4000)
    assert fits(sets, dict.fromkeys(itertools.combinations(range(5), 3), 1 / 10))


def test_of_equal_bounds_ucb_keeps_any() -> None:
    policy = UCB(prune_ratio=0.5)
    sets = kept_sets(policy, visited(policy, [5, 1, 1, 1, 1, 0]), 2000)
    assert fits(sets, {(0, a, b): 1 / 6 for a, b in itertools.combinations(range(1, 5), 2)})


def test_of_equal_losses_kakurenbo_hides_any() -> None:
    policy = Kakurenbo(max_ratio=0.4)
    sets = kept_sets(policy, visited(policy, [2, 1, 1, 1, 1], correct=[1] * 5, confidence=[1] * 5), 2000)
    assert fits(
        sets, {tuple(sorted({0, 1, 2, 3, 4} - {a, b})): 1 / 6 for a, b in itertools.combinations(range(1, 5), 2)}
    )


@pytest.mark.parametrize("set_draw", ["successive", "systematic"])
def test_the_set_level_keeps_samples_by_their_sampling_weights(set_draw: DrawMethod) -> None:
    policy = EvolvedSampling(prune_ratio=0.5, beta1=0, set_draw=set_draw)
    weights = [1, 2, 3, 6]
    sets = kept_sets(policy, visited(policy, weights), 4000)
    # For successive draws of two: either first, then the other of what is left; systematic ones are 1/6, 1/3, 1/2, 1.
    pairs = itertools.combinations(range(4), 2)
    expected = {
        (a, b): weights[a] * weights[b] / 12 * (1 / (12 - weights[a]) + 1 / (12 - weights[b])) for a, b in pairs
    }
    assert fits(sets, expected if set_draw == "successive" else {(0, 3): 1 / 6, (1, 3): 1 / 3, (2, 3): 1 / 2})


def chosen_pairs(policy: Policy, losses: list[float], num_steps: int) -> Counter[tuple[int, ...]]:
    """Which two of four rows a step chooses."""
    spec = spec_of(policy, num_samples=4 * num_steps, meta_batch_size=4, mini_batch_size=2)
    pairs = Counter[tuple[int, ...]]()
    for step in range(0, num_steps, policy.selecting_interval):
        found = select_mini_batch(
            spec,
            spec.shape(5),
            epoch=5,
            step=step,
            rank=0,
            world_size=1,
            prior_scores=np.ones(4, np.float32),
            losses=np.array(losses, np.float32),
            set_importance_weights=None,
        )
        pairs[tuple(found.positions.tolist())] += 1
    return pairs


def test_selective_backprop_draws_by_the_rank_of_the_loss() -> None:
    # Ranks 2, 0, 3, 1 of 4, of which 2: the exponent is 1, the weights are rank + 1/2.
    weights = [2.5, 0.5, 3.5, 1.5]
    pairs = itertools.combinations(range(4), 2)
    expected = {(a, b): weights[a] * weights[b] / 8 * (1 / (8 - weights[a]) + 1 / (8 - weights[b])) for a, b in pairs}
    assert fits(chosen_pairs(SelectiveBackprop(), [7, 1, 100, 2], 6000), expected)


def test_of_equal_losses_ordered_sgd_takes_any() -> None:
    found = chosen_pairs(OrderedSGD(), [1, 3, 1, 1], 3000)
    assert fits(found, {(0, 1): 1 / 3, (1, 2): 1 / 3, (1, 3): 1 / 3})


# Importance weights


def first_step_means(
    policy: Policy,
    importance_weight: ImportanceWeight,
    num_seeds: int,
    world_size: int = 2,
    *,
    mini_batch_size: int = 4,
    first_draws: bool = False,
) -> tuple[NDArray[np.float64], float]:
    """Means of importance_weight * loss over mini-batches, one an epoch planned anew; and the dataset's mean loss.

    Args:
        first_draws: instead take the weights that are right with replacement, 1 / (n p) of a first draw at each level.
    """
    n, rows = 40, 12
    rng = np.random.default_rng(5)
    scores = visited(policy, rng.lognormal(0, 1.5, n))
    losses = (rng.gamma(2, 1, n) + 0.1).astype(np.float32)  # unlike the scores: losses in proportion to the weights are
    # estimated exactly by draws of whatever probabilities
    means = []
    for seed in range(num_seeds):
        sizes = {"num_samples": n, "meta_batch_size": rows, "mini_batch_size": mini_batch_size}
        spec = spec_of(policy, importance_weight, **sizes, seed=seed)
        epoch = NUM_EPOCHS // 2
        (ids, prior_scores, set_weights), shape = plan_epoch(spec, epoch, scores)
        assert set_weights is not None
        terms: list[float] = []
        for rank in range(world_size):
            mine = part(np.arange(len(ids)), shape.step_rows, rank, world_size)[0]
            found = select_mini_batch(
                spec,
                shape,
                epoch=epoch,
                step=0,
                rank=rank,
                world_size=world_size,
                prior_scores=prior_scores[mine],
                losses=losses[ids[mine]],
                set_importance_weights=set_weights[mine],
            )
            chosen = mine[found.positions]
            weights = found.importance_weights.astype(np.float64)
            if importance_weight == "none":  # a policy's own: scaled to the dataset by how many are kept
                weights *= len(keep_samples(spec, epoch, scores).sample_ids) / n
            if first_draws:
                weights = np.ones(len(chosen))
                if spec.policy.prune_ratio:
                    p = scores.sampling_weights / scores.sampling_weights.sum(dtype=np.float64)
                    weights /= n * p[ids[chosen]]
                if spec.selects:
                    w = policy.sampling_weights(prior_scores[mine], losses[ids[mine]], len(chosen)).astype(np.float64)
                    weights /= len(mine) * (w / w.sum())[found.positions]
            terms += (weights * losses[ids[chosen]]).tolist()
        means.append(np.mean(terms))
    return np.array(means), float(losses.mean(dtype=np.float64))


def is_unbiased(means: NDArray[np.float64], mean_loss: float) -> bool:
    z = (means.mean() - mean_loss) / (means.std(ddof=1) / np.sqrt(len(means)))
    return bool(abs(z) < stats.norm.isf(FALSE_ALARM_RATE / 2))


WEIGHTED: list[tuple[Policy, ImportanceWeight]] = [
    *[
        (EvolvedSampling(prune_ratio=0.5, beta1=0.8, beta2=0, set_draw=s, batch_draw=b), "unbiased")
        for s in SET_DRAWS[:2]
        for b in ("successive", "systematic", "with_replacement")
    ],
    *[
        (EvolvedSampling(beta1=0.8, beta2=0, batch_draw=b), "unbiased")
        for b in ("successive", "systematic", "with_replacement")
    ],
    (RandomSubset(prune_ratio=0.5), "unbiased"),
    (InfoBatch(), "none"),
    (InfoBatch(ratio=0.4), "unbiased"),
    (SelectiveBackprop(), "unbiased"),
]


@pytest.mark.parametrize(("policy", "importance_weight"), WEIGHTED)
def test_importance_weights_of_both_levels_together_estimate_the_mean_loss_without_bias(
    policy: Policy, importance_weight: ImportanceWeight
) -> None:
    assert is_unbiased(*first_step_means(policy, importance_weight, 1000))


@pytest.mark.parametrize("set_draw", ["successive", "systematic"])
def test_without_scoring_the_weights_of_the_set_level_alone_estimate_the_mean_loss_without_bias(
    set_draw: DrawMethod,
) -> None:
    policy = EvolvedSampling(beta1=0.8, beta2=0, set_draw=set_draw)
    assert is_unbiased(*first_step_means(policy, "unbiased", 1000, mini_batch_size=12))
    assert not is_unbiased(*first_step_means(policy, "unbiased", 1000, mini_batch_size=12, first_draws=True))


@pytest.mark.parametrize("batch_draw", ["successive", "systematic", "with_replacement"])
@pytest.mark.parametrize("set_draw", [None, "successive", "systematic"])
def test_weights_that_are_right_with_replacement_are_biased_for_draws_without(
    set_draw: DrawMethod | None, batch_draw: DrawMethod
) -> None:
    policy = EvolvedSampling(beta1=0.8, beta2=0, batch_draw=batch_draw)
    if set_draw:
        policy = dataclasses.replace(policy, prune_ratio=0.5, set_draw=set_draw)
    with_replacement_only = set_draw is None and batch_draw == "with_replacement"
    assert is_unbiased(*first_step_means(policy, "unbiased", 1000, first_draws=True)) == with_replacement_only


# Edges


def one_nan(epoch: int, ids: NDArray[np.integer]) -> NDArray[np.float32]:
    losses = np.random.default_rng(epoch).gamma(1, 1, 100).astype(np.float32)
    losses[5] = np.nan
    found: NDArray[np.float32] = losses[ids]
    return found


def all_equal(epoch: int, ids: NDArray[np.integer]) -> NDArray[np.float32]:
    return np.full(len(ids), 0.7, np.float32)


def all_zero(epoch: int, ids: NDArray[np.integer]) -> NDArray[np.float32]:
    return np.zeros(len(ids), np.float32)


def largest(epoch: int, ids: NDArray[np.integer]) -> NDArray[np.float32]:
    return np.where(ids % 2, np.float32(0), np.finfo(np.float32).max)


WITHOUT_PRUNING: list[Policy] = [
    *[EvolvedSampling(batch_draw=b) for b in BATCH_DRAWS],
    Uniform(),
    InfoBatch(),
    InfoBatch(ratio=0),
    Kakurenbo(),
    Kakurenbo(max_ratio=0),
    OrderedSGD(),
    SelectiveBackprop(),
]
WITH_PRUNING: list[Policy] = [
    *[EvolvedSampling(prune_ratio=0.3, set_draw=s) for s in SET_DRAWS],
    RandomSubset(),
    RandomSubset(prune_ratio=0.3),
    UCB(),
]


def comes_back(policy: Policy) -> bool:
    """Whether what an epoch leaves out may come back although no step scores it."""
    return isinstance(policy, UCB) or policy.set_draw != "top_k"


EDGES: list[tuple[str, Policy, dict[str, Any]]] = [
    *[("usual sizes", policy, {}) for policy in WITHOUT_PRUNING + WITH_PRUNING],
    *[("n = B", policy, {"num_samples": 8}) for policy in [*WITHOUT_PRUNING, RandomSubset()]],
    *[("b = B", policy, {"mini_batch_size": 8}) for policy in [EvolvedSampling(), *WITH_PRUNING] if comes_back(policy)],
    *[("b = B", policy, {"mini_batch_size": 8}) for policy in WITHOUT_PRUNING if isinstance(policy, Uniform)],
    *[("b = B", policy, {"mini_batch_size": 8}) for policy in WITHOUT_PRUNING if policy.is_adaptive],
]


@pytest.mark.parametrize(
    ("losses_of", "policy", "changes"),
    [
        pytest.param(losses_of, policy, changes, id=f"{losses_of.__name__}, {sizes}, {type(policy).__name__}")
        for losses_of in (one_nan, all_equal, all_zero)
        for sizes, policy, changes in EDGES
    ],
)
def test_no_edge_troubles_a_policy(losses_of: Losses, policy: Policy, changes: dict[str, Any]) -> None:
    spec = spec_of(policy, **({"num_epochs": 5} | changes))
    for epoch in follow(spec, 2, losses_of, lost_rows=0):
        weights, shape = epoch.plan.table.importance_weights, epoch.plan.shape
        assert shape.num_training_steps >= 1
        assert np.isfinite([epoch.scores.scores, epoch.scores.sampling_weights, *epoch.scores.columns.values()]).all()
        assert weights is None or np.isfinite(weights).all()
        selects = policy.batch_level == "scored" and not shape.is_annealing and spec.mini_batch_size < 8
        for step in range(shape.num_training_steps):
            is_selecting = selects and step % policy.selecting_interval == 0
            num_chosen = 4 if is_selecting or shape.step_rows == 4 else 8
            assert sum(len(chosen) for chosen in epoch.chosen[2 * step : 2 * step + 2]) == num_chosen
        assert (
            len(epoch.kept.sample_ids) + len(epoch.kept.hidden_ids) == spec.num_places
            or isinstance(policy, (Uniform, InfoBatch))
            or shape.is_annealing
        )
        if losses_of is one_nan:
            assert epoch.scores.num_visits[5] == 0
            assert epoch.scores.scores[5] == np.float32(1 / spec.num_samples)
            assert 5 in epoch.kept.sample_ids or not policy.keeps_unvisited
            assert epoch.scores.num_chosen[5] == 0 or not isinstance(policy, OrderedSGD)
        elif isinstance(policy, InfoBatch):
            assert len(epoch.kept.sample_ids) == spec.num_samples  # none is under the mean


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("policy", [*WITHOUT_PRUNING, *WITH_PRUNING, UCB(alpha=0), UCB(c=1e6)])
def test_the_largest_losses_leave_scores_finite(policy: Policy) -> None:
    spec, scores = spec_of(policy), initial_scores(99, policy.columns)
    for epoch in range(NUM_EPOCHS):
        ids = plan_epoch(spec, epoch, scores).table.sample_ids
        ones = np.ones(len(ids), np.float32)
        report = Report(largest(epoch, ids), ones > 0, dict.fromkeys(policy.reported_columns, ones))
        counts = fold_epoch(spec, scores, ids, report)
        assert counts.visited == len(ids)
        for column in [scores.scores, scores.sampling_weights, *scores.columns.values()]:
            assert np.isfinite(column).all()
            assert (column >= 0).all()


@pytest.mark.parametrize(
    ("policy", "num_samples"),
    [
        (InfoBatch(ratio=0.99), 40),
        (Kakurenbo(max_ratio=0.9, min_confidence=0), 40),
        (InfoBatch(), 20),
        (Kakurenbo(), 16),
    ],
)
def test_an_epoch_that_would_keep_less_than_a_meta_batch_leaves_nothing_out(policy: Policy, num_samples: int) -> None:
    losses = np.append(np.zeros(num_samples - 1), 1e6)
    columns = {name: np.ones(num_samples) for name in policy.reported_columns}
    scores = visited(policy, losses, **columns)
    spec = spec_of(policy, num_samples=num_samples, meta_batch_size=16, mini_batch_size=16)
    kept, plan = keep_samples(spec, 1, scores), plan_epoch(spec, 1, scores)
    assert kept.sample_ids.tolist() == list(range(num_samples))
    assert kept.hidden_ids.tolist() == []
    assert kept.inclusion_probabilities is None or set(kept.inclusion_probabilities) == {1}
    assert len(plan.table.sample_ids) == num_samples // 16 * 16
    assert plan.table.importance_weights is None or set(plan.table.importance_weights) == {1}


def test_fewer_hidden_samples_than_fill_a_step_are_not_hidden() -> None:
    scores = visited(Kakurenbo(), range(60), correct=[1] * 60, confidence=[1] * 60)
    for size, num_hidden in [(18, 18), (19, 0)]:
        spec = spec_of(Kakurenbo(), num_samples=60, meta_batch_size=size, mini_batch_size=size)
        assert keep_samples(spec, 1, scores).hidden_ids.tolist() == list(range(num_hidden))


# What follows from a policy's settings


@pytest.mark.parametrize(
    ("policy", "cold", "warm"),
    [
        (EvolvedSampling(), [0, 19], [19]),
        (EvolvedSampling(annealing=0.1), [0, 1, 18, 19], [18, 19]),
        (Uniform(), list(range(20)), list(range(20))),
        (RandomSubset(prune_ratio=0.1), [], []),
        (InfoBatch(), [0, 18, 19], [18, 19]),  # from epoch ceil(0.875 * 20) = 18 on
        (InfoBatch(delta=1), [0], []),
        (Kakurenbo(), [0], []),
        (OrderedSGD(), [], []),
        (UCB(), [0], []),
        (SelectiveBackprop(), [*range(10), 18, 19], [*range(10), 18, 19]),
        (SelectiveBackprop(begin=0, end=1), [], []),
    ],
)
def test_epochs_that_train_on_everything(policy: Policy, cold: list[int], warm: list[int]) -> None:
    for warm_start, expected in [(False, cold), (True, warm)]:
        spec = spec_of(policy, num_epochs=20, warm_start=warm_start)
        assert [epoch for epoch in range(20) if spec.is_annealing(epoch)] == expected


def test_kakurenbo_hides_up_to_a_share_that_falls_by_stages() -> None:
    scores = visited(Kakurenbo(), range(100), correct=[1] * 100, confidence=[0.7] * 100)
    spec = spec_of(Kakurenbo(), num_samples=100, num_epochs=100)
    hidden = [len(keep_samples(spec, epoch, scores).hidden_ids) for epoch in range(100)]
    assert hidden == [0] + [30] * 59 + [24] * 20 + [18] * 20


def test_kakurenbo_hides_only_what_was_predicted_right_and_with_confidence() -> None:
    correct, confidence = np.ones(20), np.full(20, 0.7)
    correct[[0, 3]], confidence[[1, 4]] = 0, 0.69
    scores = visited(Kakurenbo(max_ratio=0.5), range(20), correct=correct, confidence=confidence)
    spec = spec_of(Kakurenbo(max_ratio=0.5), num_samples=20, meta_batch_size=4)
    assert keep_samples(spec, 1, scores).hidden_ids.tolist() == [2, 5, 6, 7, 8, 9]


def test_only_hiding_changes_the_learning_rate() -> None:
    assert Kakurenbo().learning_rate_factor(100, 20) == pytest.approx(1 / (1 - 0.2))
    assert Kakurenbo().learning_rate_factor(100, 0) == 1
    assert InfoBatch().learning_rate_factor(100, 0) == 1


def test_a_step_between_selecting_ones_trains_on_all_its_rows() -> None:
    spec = spec_of(SelectiveBackprop(begin=0, end=1, selecting_interval=3), num_samples=60)
    shape = spec.shape(0)  # 7 steps, of which the first, fourth and seventh select
    assert [step for step in range(7) if shape.step_selects(step)] == [0, 3, 6]
    assert shape.num_trained == 3 * 4 + 4 * 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class EveryOther(Policy):
    """Keeps the even rows, for two each, and hides the odd ones."""

    is_adaptive = True
    weighs = True
    hides = True

    def keep(self, columns: Columns, num_places: int, progress: float, bits: NDArray[np.uint64]) -> Kept:
        even = np.arange(0, len(bits), 2)
        return Kept(even, np.ones(len(even)), np.full(len(even), 2.0), hidden=even + 1)


def test_a_policy_of_ones_own_may_weigh_and_hide_and_hidden_rows_weigh_nothing() -> None:
    spec = spec_of(EveryOther(), num_samples=40, mini_batch_size=8)
    (ids, prior_scores, weights), shape = plan_epoch(spec, 3, initial_scores(40))
    assert (shape.num_training_steps, shape.num_hidden_steps) == (2, 2)
    assert weights is not None
    assert weights.tolist() == [2.0] * 16 + [0.0] * 16
    assert (ids % 2).tolist() == [0] * 16 + [1] * 16
    trained = []
    for step in range(4):
        rows = slice(8 * step, 8 * step + 8)
        found = select_mini_batch(
            spec,
            shape,
            epoch=3,
            step=step,
            rank=0,
            world_size=1,
            prior_scores=prior_scores[rows],
            losses=np.ones(8, np.float32),
            set_importance_weights=weights[rows],
        )
        trained.append(found.importance_weights.tolist())
    assert trained == [[2.0] * 8, [2.0] * 8, [], []]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meddler(EvolvedSampling):
    """Changes what it is only to look at."""

    at: str

    def prune_weights(self, columns: Columns) -> NDArray[np.float32]:
        weights = columns["sampling_weights"]
        if self.at == "set":
            weights /= weights.sum()
        return weights

    def sampling_weights(
        self, prior_scores: NDArray[np.float32], losses: NDArray[np.float32], num_chosen: int
    ) -> NDArray[np.float32]:
        losses /= losses.sum()
        return losses


def test_a_policy_can_not_change_what_it_is_given() -> None:
    scores = visited(EvolvedSampling(), [1, 2, 3, 4])
    spec = ExperimentSpec(
        num_samples=4, num_epochs=4, meta_batch_size=2, mini_batch_size=1, policy=Meddler(prune_ratio=0.5, at="set")
    )
    with pytest.raises(ValueError, match="read-only"):
        keep_samples(spec, 1, scores)
    losses = np.ones(2, np.float32)
    with pytest.raises(ValueError, match="read-only"):
        select_mini_batch(
            dataclasses.replace(spec, policy=Meddler(prune_ratio=0.5, at="batch")),
            spec.shape(1),
            epoch=1,
            step=0,
            rank=0,
            world_size=1,
            prior_scores=np.ones(2, np.float32),
            losses=losses,
            set_importance_weights=None,
        )
    losses += 1  # the caller's own can still be changed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forgetful(EvolvedSampling):
    """Forgets a column, and can't be asked about no samples at all."""

    columns: ClassVar[Mapping[str, float]] = {"worst": 0.0}

    def fold(self, before: Columns, losses: NDArray[np.float32], reported: Columns) -> Columns:
        return {**super().fold(before, losses, reported), **({} if losses.max() > 5 else {"worst": losses})}


def test_a_policy_that_forgets_a_column_fails_and_is_not_asked_about_no_samples() -> None:
    spec = ExperimentSpec(num_samples=4, num_epochs=4, meta_batch_size=2, mini_batch_size=1, policy=Forgetful())
    scores = initial_scores(4, Forgetful.columns)
    for losses in ([np.nan, np.nan], [1, 2]):
        fold_epoch(spec, scores, np.arange(2), Report(np.array(losses, np.float32), np.zeros(2, np.bool_), {}))
    assert scores.columns["worst"].tolist() == [1, 2, 0, 0]
    with pytest.raises(KeyError, match="worst"):
        fold_epoch(spec, scores, np.arange(2), Report(np.full(2, 6, np.float32), np.zeros(2, np.bool_), {}))


# What is refused


@pytest.mark.parametrize("importance_weight", ["unbiased", "self_normalized"])
@pytest.mark.parametrize(
    "policy",
    [
        Kakurenbo(),
        UCB(),
        OrderedSGD(),
        EvolvedSampling(batch_draw="top_k"),
        EvolvedSampling(prune_ratio=0.2, set_draw="top_k"),
        EvolvedSampling(prune_ratio=0.2, batch_draw="top_k"),
    ],
)
def test_importance_weights_are_refused_where_the_highest_are_taken(
    policy: Policy, importance_weight: ImportanceWeight
) -> None:
    with pytest.raises(InvalidValue, match=f"expected none: {type(policy).__name__} takes the highest") as caught:
        spec_of(policy, importance_weight)
    assert caught.value.field == "importance_weight"


def test_importance_weights_are_not_refused_for_a_draw_that_never_happens() -> None:
    assert spec_of(EvolvedSampling(set_draw="top_k"), "unbiased").has_set_weights
    highest = EvolvedSampling(prune_ratio=0.2, batch_draw="top_k")
    assert spec_of(highest, "unbiased", mini_batch_size=8).has_set_weights


@pytest.mark.parametrize(
    ("policy", "changes", "field"),
    [
        (OrderedSGD(), {"mini_batch_size": 8}, "policy"),
        (SelectiveBackprop(), {"mini_batch_size": 8}, "policy"),
        (EvolvedSampling(prune_ratio=0), {"mini_batch_size": 8}, "policy"),
        (UCB(prune_ratio=0), {}, "policy"),
        (RandomSubset(prune_ratio=0.2), {"num_samples": 4}, "num_samples"),
        (EvolvedSampling(), {"num_samples": 8, "mini_batch_size": 8}, "num_samples"),
        (UCB(), {"num_epochs": 1}, "num_epochs"),
        (SelectiveBackprop(), {"num_epochs": 1}, "num_epochs"),
        (InfoBatch(), {"num_epochs": 1}, "num_epochs"),
        (InfoBatch(delta=0), {}, "num_epochs"),
        (Kakurenbo(), {"num_epochs": 1}, "num_epochs"),
    ],
)
def test_a_spec_of_which_no_step_would_ever_select_is_refused(
    policy: Policy, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidValue, match="nothing would ever be selected") as caught:
        spec_of(policy, **changes)
    assert caught.value.field == field


def test_where_nothing_is_scored_taking_the_largest_weights_needs_a_bound_on_how_long_a_sample_is_skipped() -> None:
    policy = EvolvedSampling(set_draw="top_k")
    with pytest.raises(InvalidValue, match="would never come back") as caught:
        spec_of(policy, mini_batch_size=8)
    assert caught.value.field == "set_draw"
    assert spec_of(policy, mini_batch_size=8, max_skipped_epochs=20).policy.set_draw == "top_k"
    assert spec_of(policy, mini_batch_size=4).selects


@pytest.mark.parametrize(
    ("policy", "field", "values"),
    [
        (EvolvedSampling, "set_draw", ["with_replacement", "random", None]),
        (EvolvedSampling, "batch_draw", ["race", None]),
        (RandomSubset, "prune_ratio", [-0.1, 1]),
        (InfoBatch, "ratio", [-0.1, 1, math.nan, True]),
        (InfoBatch, "delta", [-0.1, 1.1]),
        (Kakurenbo, "max_ratio", [-0.1, 1]),
        (Kakurenbo, "min_confidence", [-0.1, 1.1]),
        (UCB, "prune_ratio", [-0.1, 1]),
        (UCB, "c", [-1, math.inf, math.nan, "1"]),
        (UCB, "alpha", [-0.1, 1.1]),
        (SelectiveBackprop, "begin", [-0.1, 1]),
        (SelectiveBackprop, "end", [1.1, 0.5, 0.4]),
        (SelectiveBackprop, "selecting_interval", [0, 1.5, True]),
    ],
)
def test_settings_out_of_range_are_refused(policy: type[Policy], field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidValue, match="expected") as caught:
            policy(**{field: value})
        assert caught.value.field == field
