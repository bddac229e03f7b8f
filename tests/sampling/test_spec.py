from __future__ import annotations

from typing import Any

import pytest

from evosample.sampling import (
    UCB,
    EvolvedSampling,
    ExperimentSpec,
    InfoBatch,
    InvalidValue,
    Kakurenbo,
    Policy,
    RandomSubset,
    Uniform,
)

GOOD: dict[str, Any] = {"num_samples": 1000, "num_epochs": 10, "meta_batch_size": 100, "mini_batch_size": 20}


def test_a_run_trains_on_everything_at_either_end() -> None:
    def annealing(num_epochs: int, share: float, *, warm_start: bool = False) -> list[int]:
        spec = ExperimentSpec(
            num_samples=100,
            num_epochs=num_epochs,
            meta_batch_size=10,
            mini_batch_size=5,
            policy=EvolvedSampling(annealing=share),
            warm_start=warm_start,
        )
        found = [epoch for epoch in range(num_epochs) if spec.shape(epoch).is_annealing]
        assert spec.num_annealing_epochs == len(found)
        return found

    for num_epochs, expected in [(3, [0, 2]), (10, [0, 9]), (30, [0, 1, 2, 27, 28, 29])]:
        assert annealing(num_epochs, 0.1) == expected
    assert annealing(5, 0) == []
    assert annealing(5, 0, warm_start=True) == []
    assert annealing(30, 0.1, warm_start=True) == [27, 28, 29]


@pytest.mark.parametrize(
    ("policy", "sizes", "expected"),
    [
        (EvolvedSampling(), {"mini_batch_size": 20}, (0.9, 0.75, 0.0)),
        (EvolvedSampling(prune_ratio=0.2), {"meta_batch_size": 20}, (0.9, 0.2, 0.0)),
        (EvolvedSampling(), {"meta_batch_size": 80, "mini_batch_size": 20}, (0.9, 0.0, 0.05)),
        (EvolvedSampling(prune_ratio=0.2), {"meta_batch_size": 80, "mini_batch_size": 20}, (0.8, 0.2, 0.05)),
        (
            EvolvedSampling(beta2=0.5, prune_ratio=0.1, annealing=0.2),
            {"meta_batch_size": 80, "mini_batch_size": 20},
            (0.5, 0.1, 0.2),
        ),
        (EvolvedSampling(beta2=0.5, prune_ratio=0.1, annealing=0.2), {"mini_batch_size": 20}, (0.5, 0.1, 0.2)),
    ],
)
def test_what_is_not_given_follows_from_whether_steps_score(
    policy: EvolvedSampling, sizes: dict[str, Any], expected: tuple[float, float, float]
) -> None:
    filled_in = ExperimentSpec(num_samples=1000, num_epochs=10, policy=policy, **sizes).policy
    assert isinstance(filled_in, EvolvedSampling)
    assert (filled_in.beta2, filled_in.prune_ratio, filled_in.annealing) == expected


def test_who_gives_a_batch_size_alone_gets_a_quarter_of_the_dataset_an_epoch_and_no_scoring_pass() -> None:
    spec = ExperimentSpec(num_samples=1000, num_epochs=8, mini_batch_size=20)
    assert spec == ExperimentSpec(num_samples=1000, num_epochs=8, meta_batch_size=20)
    assert not spec.selects
    shapes = [spec.shape(epoch) for epoch in range(8)]
    assert {(shape.num_steps, shape.num_trained, shape.num_rows) for shape in shapes} == {(12, 240, 240)}


@pytest.mark.parametrize("policy", [EvolvedSampling(), RandomSubset(), UCB(prune_ratio=0.9)])
def test_an_epoch_keeps_a_step_at_least(policy: Policy) -> None:
    spec = ExperimentSpec(num_samples=30, num_epochs=4, mini_batch_size=20, policy=policy)
    assert (spec.num_places, spec.shape(1).num_steps) == (20, 1)


def test_what_a_run_comes_to_is_said_in_words() -> None:
    sizes: dict[str, Any] = {"num_samples": 60_000, "mini_batch_size": 64}
    assert ExperimentSpec(**sizes, num_epochs=10).extent() == (
        "10 epochs, 2,340 steps of 64 samples: as much training as 2.5 ordinary epochs"
    )
    assert ExperimentSpec(**sizes, num_epochs=10, policy=InfoBatch()).extent() == (
        "10 epochs, at most 9,370 steps of 64 samples: as much training as at most 9.99 ordinary epochs"
    )
    scored = ExperimentSpec(**sizes, num_epochs=3, meta_batch_size=256)
    assert scored.extent() == (
        "3 epochs, 702 steps, load 179,712 samples and train on 134,784 of them, which saves about 14% of the compute "
        "of training on all"
    )
    assert scored.compute_saving == pytest.approx((1 - 7 / 12) / 3)


def test_steps_add_up() -> None:
    spec = ExperimentSpec(**GOOD, policy=EvolvedSampling(prune_ratio=0.3))
    assert [spec.shape(e).num_steps for e in range(10)] == [10, *[7] * 8, 10]
    assert [spec.num_steps_before(e) for e in (0, 1, 2, 10)] == [0, 10, 17, 76]
    assert spec.total_steps == 76


@pytest.mark.parametrize("policy", [EvolvedSampling(prune_ratio=0.3), RandomSubset(prune_ratio=0.3), Uniform()])
def test_rows_add_up(policy: Policy) -> None:
    spec = ExperimentSpec(**(GOOD | {"mini_batch_size": 5}), policy=policy)
    for epoch in range(spec.num_epochs + 1):
        shapes = [spec.shape(before) for before in range(epoch)]
        assert spec.num_rows_before(epoch) == sum(shape.num_rows for shape in shapes)
        assert spec.num_trained_before(epoch) == sum(shape.num_trained for shape in shapes)


def test_the_kept_share_is_not_a_victim_of_floating_point() -> None:
    for n in range(10, 2000, 10):
        spec = ExperimentSpec(num_samples=n, num_epochs=3, meta_batch_size=1, policy=EvolvedSampling(prune_ratio=0.7))
        assert spec.num_places == spec.shape(1).num_steps == n * 3 // 10


@pytest.mark.parametrize("policy", [Uniform(), RandomSubset(), InfoBatch(), Kakurenbo(), UCB()])
def test_where_no_mini_batches_are_drawn_a_step_has_the_rows_of_one(policy: Policy) -> None:
    spec = ExperimentSpec(**GOOD, policy=policy)
    assert (spec.meta_batch_size, spec.mini_batch_size) == (20, 20)
    assert (spec.shape(5).step_rows, spec.shape(5).trained_rows, spec.shape(5).selects) == (20, 20, False)


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"num_samples": 0}, "num_samples", "num_samples=0: expected an integer from 1 to"),
        ({"num_samples": 2**60}, "num_samples", "to 1,099,511,627,776"),
        ({"num_samples": 10.5}, "num_samples", "an integer"),
        ({"num_samples": True}, "num_samples", "an integer"),
        ({"num_epochs": -1}, "num_epochs", "from 1 to 1,000,000"),
        ({"meta_batch_size": 0}, "meta_batch_size", "from 1 to"),
        ({"meta_batch_size": 1001}, "meta_batch_size", "at most num_samples, 1,000"),
        ({"mini_batch_size": 0}, "mini_batch_size", "from 1 to"),
        ({"mini_batch_size": 101}, "mini_batch_size", "at most meta_batch_size, 100"),
        ({"seed": -1}, "seed", "from 0 to"),
        ({"seed": 2**64}, "seed", "from 0 to"),
        ({"policy": "es"}, "policy", "EvolvedSampling"),
        ({"importance_weight": "both"}, "importance_weight", "none, unbiased, self_normalized"),
        ({"meta_batch_size": None, "mini_batch_size": None}, "mini_batch_size", "your batch size"),
        ({"meta_batch_size": None, "mini_batch_size": 1001}, "mini_batch_size", "at most num_samples, 1,000"),
        ({"mini_batch_size": 1000, "meta_batch_size": 1000}, "num_samples", "nothing would ever be selected"),
        ({"policy": RandomSubset(prune_ratio=0)}, "policy", "nothing would ever be selected"),
        ({"num_epochs": 2}, "num_epochs", "nothing would ever be selected"),
        ({"policy": EvolvedSampling(annealing=0.5)}, "num_epochs", "nothing would ever be selected"),
        ({"shard_sizes": 1000}, "shard_sizes", "the number of samples of each shard"),
        ({"shard_sizes": [[500], [250, 250]]}, "shard_sizes", "the number of samples of each shard"),
        ({"shard_sizes": (500.0, 500.0)}, "shard_sizes", "integers"),
        ({"shard_sizes": (500, 499)}, "shard_sizes", "2 shards of 499 to 500, in all 999 samples.* num_samples, 1,000"),
        ({"shard_sizes": (1000, 0)}, "shard_sizes", "at least 1"),
        ({"num_samples": 200_000, "shard_sizes": [2] * 100_001}, "shard_sizes", "at most 100,000"),
        ({"shuffle_block_samples": 100}, "shuffle_block_samples", "none without shard_sizes"),
        ({"shard_sizes": (500, 500), "shuffle_block_samples": -1}, "shuffle_block_samples", "from 0 to"),
    ],
)
def test_a_spec_that_cannot_work_is_refused_with_field_value_and_what_is_allowed(
    changes: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(InvalidValue, match=message) as caught:
        ExperimentSpec(**(GOOD | changes))
    assert caught.value.field == field


def test_a_block_is_ten_shards_unless_given() -> None:
    assert ExperimentSpec(**GOOD).shuffle_block_samples == 0
    assert ExperimentSpec(**GOOD, shard_sizes=(10,) * 100).shuffle_block_samples == 100
    assert ExperimentSpec(**GOOD, shard_sizes=(400, 600)).shuffle_block_samples == 1000
    assert ExperimentSpec(**GOOD, shard_sizes=(400, 600), shuffle_block_samples=3).shuffle_block_samples == 3


@pytest.mark.parametrize("field", ["beta1", "beta2", "prune_ratio", "annealing"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf"), "0.5", True])
def test_settings_of_a_policy_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidValue, match=f"{field}=.*: expected a number with 0 <= {field}"):
        EvolvedSampling(**{field: value})


@pytest.mark.parametrize("world_size", [0, 3, 8, 101])
def test_a_world_size_that_does_not_divide_both_batch_sizes_is_refused(world_size: int) -> None:
    with pytest.raises(InvalidValue) as caught:
        ExperimentSpec(**GOOD).check_world_size(world_size)
    assert caught.value.field == "world_size"
