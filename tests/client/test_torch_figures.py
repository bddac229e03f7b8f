"""What is made of measured times; here they are given."""

from __future__ import annotations

import numpy as np
import pytest

from evosample.sampling import EvolvedSampling, ExperimentSpec, RandomSubset, SelectiveBackprop, Uniform
from evosample.torch import figures
from evosample.torch.figures import Costs, EpochFigures, Stopwatch

SPEC = ExperimentSpec(
    num_samples=1000, num_epochs=10, meta_batch_size=100, mini_batch_size=25, policy=EvolvedSampling(prune_ratio=0.2)
)


class Clock:
    """What goes on as it is told."""

    time_s = 0.0

    def perf_counter(self) -> float:
        return self.time_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(figures, "time", clock)
    return clock


def test_a_selecting_step_is_predicted_from_a_forward_pass_and_a_share_of_a_step() -> None:
    costs = Costs(score_meta_batch_s=[1.0, 9.0, 1.0], score_mini_batch_s=[0.3, 0.3], train_meta_batch_s=[3.0, 3.0, 8.0])
    assert costs.full_epoch_s(SPEC.shape(0)) == 10 * 3.0
    assert costs.full_epoch_s(SPEC.shape(1)) == 8 * 3.0
    assert costs.predicted_s(SPEC.shape(0)) == 10 * 3.0
    assert costs.predicted_s(SPEC.shape(1)) == pytest.approx(8 * (1.0 + 3.0 * 0.3))


def test_where_no_step_scores_nothing_is_said_to_be_saved(clock: Clock) -> None:
    for policy in (EvolvedSampling(), RandomSubset(), Uniform()):
        spec = ExperimentSpec(num_samples=1000, num_epochs=10, mini_batch_size=25, policy=policy)
        costs = Costs()
        stopwatch = Stopwatch(EpochFigures(0), spec.shape(0), costs)
        for _ in range(3):
            stopwatch.begin_step(trains_all=True)
            clock.time_s += 1.0
            stopwatch.end_step()
        stopwatch.end_epoch()
        assert costs.train_meta_batch_s == [1.0, 1.0, 1.0]
        assert stopwatch.figures.realised_saving is None


def test_where_every_second_step_selects_the_others_cost_a_full_one() -> None:
    spec = ExperimentSpec(
        num_samples=1000, num_epochs=10, meta_batch_size=100, mini_batch_size=50, policy=SelectiveBackprop()
    )
    costs = Costs(score_meta_batch_s=[1.0], score_mini_batch_s=[0.5], train_meta_batch_s=[3.0])
    assert costs.predicted_s(spec.shape(0)) == pytest.approx(10 * 3.0)
    assert costs.predicted_s(spec.shape(5)) == pytest.approx(5 * 3.0 + 5 * (1.0 + 1.5))


def test_without_measurements_nothing_is_predicted() -> None:
    assert Costs().predicted_s(SPEC.shape(1)) is None
    assert Costs().full_epoch_s(SPEC.shape(1)) is None
    assert Costs(train_meta_batch_s=[1.0]).predicted_s(SPEC.shape(1)) is None


def test_the_realised_saving_is_that_of_the_steps_without_their_loading(clock: Clock) -> None:
    costs = Costs(score_meta_batch_s=[0.02], score_mini_batch_s=[0.005], train_meta_batch_s=[0.08])
    stopwatch = Stopwatch(EpochFigures(1), SPEC.shape(1), costs)
    for _ in range(3):
        clock.time_s += 0.03
        stopwatch.figures.loading_s += 0.03
        stopwatch.begin_step(trains_all=False)
        clock.time_s += 0.06
        stopwatch.end_step()
    stopwatch.end_epoch()
    assert stopwatch.figures.predicted_saving == pytest.approx(1 - 0.04 / 0.08)
    assert stopwatch.figures.realised_saving == pytest.approx(1 - 0.06 / 0.08)
    assert stopwatch.figures.seconds == pytest.approx(0.27)


def test_the_effective_sample_share_is_one_for_equal_weights_and_less_for_others() -> None:
    for weights, share in (([2, 2, 2, 2], 1.0), ([1, 0, 0, 0], 0.25)):
        stopwatch = Stopwatch(EpochFigures(1), SPEC.shape(1), Costs())
        stopwatch.chose(np.array(weights, np.float32))
        stopwatch.end_epoch()
        assert stopwatch.figures.effective_sample_share == pytest.approx(share)
