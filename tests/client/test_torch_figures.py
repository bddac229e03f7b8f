"""What is made of measured times; here they are given."""

from __future__ import annotations

import time

import numpy as np
import pytest

from evosample.sampling import EvolvedSampling, ExperimentSpec, RandomSubset, SelectiveBackprop
from evosample.torch.figures import Costs, EpochFigures, Stopwatch

SPEC = ExperimentSpec(
    num_samples=1000, num_epochs=10, meta_batch_size=100, mini_batch_size=25, policy=EvolvedSampling(prune_ratio=0.2)
)


def test_a_selecting_step_is_predicted_from_a_forward_pass_and_a_share_of_a_step() -> None:
    costs = Costs(score_meta_batch_s=[1.0, 9.0, 1.0], score_mini_batch_s=[0.3, 0.3], train_meta_batch_s=[3.0, 3.0, 8.0])
    assert costs.full_epoch_s(SPEC) == 10 * 3.0
    assert costs.predicted_s(SPEC, SPEC.shape(0)) == 10 * 3.0
    assert costs.predicted_s(SPEC, SPEC.shape(1)) == pytest.approx(8 * (1.0 + 3.0 * 0.3))


def test_a_random_subset_has_no_scoring_pass() -> None:
    spec = ExperimentSpec(
        num_samples=1000, num_epochs=10, meta_batch_size=100, mini_batch_size=25, policy=RandomSubset()
    )
    costs = Costs(train_meta_batch_s=[4.0])
    assert costs.predicted_s(spec, spec.shape(0)) == pytest.approx(10 * 1.0)


def test_where_every_second_step_selects_the_others_cost_a_full_one() -> None:
    spec = ExperimentSpec(
        num_samples=1000, num_epochs=10, meta_batch_size=100, mini_batch_size=50, policy=SelectiveBackprop()
    )
    costs = Costs(score_meta_batch_s=[1.0], score_mini_batch_s=[0.5], train_meta_batch_s=[3.0])
    assert costs.predicted_s(spec, spec.shape(0)) == pytest.approx(10 * 3.0)
    assert costs.predicted_s(spec, spec.shape(5)) == pytest.approx(5 * 3.0 + 5 * (1.0 + 1.5))


def test_without_measurements_nothing_is_predicted() -> None:
    assert Costs().predicted_s(SPEC, SPEC.shape(1)) is None
    assert Costs().full_epoch_s(SPEC) is None
    assert Costs(train_meta_batch_s=[1.0]).predicted_s(SPEC, SPEC.shape(1)) is None


def test_the_realised_saving_is_that_of_the_steps_without_their_loading() -> None:
    costs = Costs(score_meta_batch_s=[0.02], score_mini_batch_s=[0.005], train_meta_batch_s=[0.08])
    stopwatch = Stopwatch(EpochFigures(1), SPEC, SPEC.shape(1), costs)
    for _ in range(3):
        time.sleep(0.03)
        stopwatch.figures.loading_s += 0.03
        stopwatch.begin_step(trains_all=False)
        time.sleep(0.04)
        stopwatch.end_step()
    stopwatch.end_epoch()
    assert stopwatch.figures.predicted_saving == pytest.approx(1 - 8 * 0.04 / (10 * 0.08))
    # Steps half as long as the full one, and 8 of 10; sleeping may take longer than asked for.
    assert 0.2 < (stopwatch.figures.realised_saving or 0) <= 0.6
    assert stopwatch.figures.seconds >= 0.21


def test_the_effective_sample_share_is_one_for_equal_weights_and_less_for_others() -> None:
    for weights, share in (([2, 2, 2, 2], 1.0), ([1, 0, 0, 0], 0.25)):
        stopwatch = Stopwatch(EpochFigures(1), SPEC, SPEC.shape(1), Costs())
        stopwatch.chose(np.array(weights, np.float32))
        stopwatch.end_epoch()
        assert stopwatch.figures.effective_sample_share == pytest.approx(share)
