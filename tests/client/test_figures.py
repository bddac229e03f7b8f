from __future__ import annotations

import datetime
import json
from typing import Any

import numpy as np
import pytest

from evosample.figures import (
    STALENESS_LABELS,
    Throughput,
    activity,
    age,
    covered_share,
    differing_settings,
    mean_recent_loss,
    merged_epochs,
    number,
    percent,
    progress_share,
    saved_share,
    staleness_shares,
)
from evosample.sampling import (
    SCORE_BIN_EDGES,
    EpochSummary,
    EvolvedSampling,
    ExperimentSpec,
    FoldCounts,
    initial_scores,
    mean_of_finite,
    summarize_epoch,
)
from evosample.wire import ExperimentStatus, PastEpoch, RankProgress, Watched
from evosample_server.dashboard import plots

N = 1000
SPEC = ExperimentSpec(
    num_samples=N,
    num_epochs=10,
    meta_batch_size=100,
    mini_batch_size=20,
    policy=EvolvedSampling(prune_ratio=0.3, annealing=0),
)
NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def watched(
    *ranks: tuple[int, int, float, float | None], epochs: tuple[EpochSummary, ...] = (), **status: Any
) -> Watched:
    """Figures with ranks as (epoch, step, age_s, mean_loss)."""
    fields: dict[str, Any] = {
        "project": "p",
        "name": "e",
        "uid": "u",
        "spec": SPEC,
        "state": "open",
        "epoch": 2,
        "generation": 1,
        "world_size": max(len(ranks), 1),
        "finished_ranks": (),
        "visited_rows": 0,
        "non_finite_rows": 0,
        "unreported_rows": 0,
        "trained_rows": 0,
        "num_steps": 7,
        "create_time": NOW,
        "retained_epochs": (),
        "pins": {},
        "extended_num_samples": 0,
    }
    return Watched(
        ExperimentStatus(**(fields | status)),
        tuple(RankProgress(number, *rank) for number, rank in enumerate(ranks)),
        tuple(PastEpoch(NOW, summary) for summary in epochs),
    )


def summary(epoch: int, *, num_never: int = 0, seed: int = 0) -> EpochSummary:
    """What a fold would have made of an epoch after which `num_never` samples have not been visited."""
    random = np.random.default_rng(seed)
    num_visits = np.ones(N, np.uint16)
    num_visits[:num_never] = 0
    staleness = random.integers(0, min(epoch, 254) + 1, N).astype(np.uint8)
    staleness[:num_never] = min(epoch + 1, 255)
    scores = initial_scores(N)._replace(
        scores=random.gamma(2, 1, N).astype(np.float32), num_visits=num_visits, staleness=staleness
    )
    shape = SPEC.shape(min(epoch, SPEC.num_epochs - 1))
    losses = random.gamma(2, 1, shape.num_rows).astype(np.float32)
    before = SPEC.num_trained_before(min(epoch, SPEC.num_epochs))
    return summarize_epoch(
        epoch, shape, mean_of_finite(losses), FoldCounts(shape.num_rows, 0, 0), scores, trained_before=before
    )


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        (watched(generation=0, world_size=0), "not started"),
        (watched((2, 3, 5.0, 1.0)), "training"),
        (watched((2, 3, 500.0, 1.0), (2, 3, 5.0, 1.0)), "training"),
        (watched((2, 3, 500.0, 1.0)), "silent"),
        (watched((2, 7, 500.0, 1.0), state="sealed"), "planning"),
        (watched((9, 10, 1.0, 1.0), state="finished", epoch=10), "finished"),
    ],
)
def test_what_an_experiment_is_doing(figures: Watched, expected: str) -> None:
    assert activity(figures) == expected


def test_progress_counts_the_steps_of_all_ranks() -> None:
    assert progress_share(watched(generation=0, world_size=0, epoch=0)) == 0
    steps_before = 2 * 7
    total = 10 * 7
    assert progress_share(watched((2, 3, 1.0, 1.0), (1, 7, 1.0, 1.0))) == pytest.approx((steps_before + 1.5) / total)
    assert progress_share(watched((9, 7, 1.0, 1.0), epoch=10, state="finished")) == 1


def test_what_was_saved_is_measured_against_ordinary_training_of_as_many_rows() -> None:
    def saved(trained_rows: int, *rows: int, spec: ExperimentSpec = SPEC) -> float | None:
        visited, non_finite, unreported = rows
        found = watched(
            spec=spec,
            trained_rows=trained_rows,
            visited_rows=visited,
            non_finite_rows=non_finite,
            unreported_rows=unreported,
        )
        return saved_share(found.status)

    assert saved(0, 0, 0, 0) is None
    assert saved(N, N, 0, 0) == 0
    assert saved(4 * 7 * 20, 4 * 7 * 100 - 80, 50, 30) == pytest.approx(0.8)
    unscored = ExperimentSpec(num_samples=N, num_epochs=10, mini_batch_size=20)
    assert saved(N, N, 0, 0, spec=unscored) is None, "as many rows as ordinary training"


def test_coverage_and_staleness_count_every_sample_once() -> None:
    for epoch in (0, 1, 5, 14, 15, 16, 40):
        found = summary(epoch, num_never=130)
        assert covered_share(SPEC, found) == pytest.approx(0.87)
        shares = staleness_shares(SPEC, found)
        assert len(shares) == len(STALENESS_LABELS)
        assert shares.sum() == pytest.approx(1)
        assert shares[-1] == pytest.approx(0.13)
        expected = found.staleness_histogram
        assert shares[0] == pytest.approx(expected[0] / N)
        if epoch >= 40:
            assert shares[4] == pytest.approx(expected[8:16].sum() / N)
            assert shares[5] == pytest.approx((expected[16] - 130) / N)


def test_samples_a_second_follow_from_two_figures() -> None:
    throughput = Throughput(window_s=10)
    assert throughput.add(100.0, watched((0, 4, 1.0, 1.0), (0, 4, 1.0, 1.0))) is None
    assert throughput.add(102.0, watched((0, 5, 1.0, 1.0), (0, 4, 1.0, 1.0))) == pytest.approx(50 / 2)
    # into the next epoch, of 7 steps before it
    assert throughput.add(104.0, watched((1, 0, 1.0, 1.0), (0, 7, 1.0, 1.0))) == pytest.approx(300 / 2 * 2 / 4)
    assert throughput.add(200.0, watched((1, 0, 1.0, 1.0), (0, 7, 1.0, 1.0))) == 0
    # what a new run has reported is not compared with what the one before had
    assert throughput.add(201.0, watched((0, 1, 1.0, 1.0), generation=2)) is None
    assert throughput.add(202.0, watched((0, 2, 1.0, 1.0), generation=2)) == pytest.approx(100)
    # a rank that is seen for the first time has no speed yet
    assert throughput.add(203.0, watched((0, 3, 1.0, 1.0), (0, 9, 1.0, 1.0), generation=2)) == pytest.approx(50 / 2)


def test_epochs_that_a_run_goes_back_over_are_dropped() -> None:
    first = merged_epochs([], watched(epoch=3, epochs=(summary(0), summary(1), summary(2))))
    assert [e.epoch for e in first] == [0, 1, 2]
    assert merged_epochs(first, watched(epoch=3)) is first
    assert [e.epoch for e in merged_epochs(first, watched(epoch=1))] == [0]
    anew = summary(2, seed=5)
    assert merged_epochs(first, watched(epoch=3, epochs=(anew,)))[2] is anew


def test_mean_loss_of_ranks_leaves_out_those_without() -> None:
    assert mean_recent_loss(watched((0, 1, 1.0, 2.0), (0, 1, 1.0, None), (0, 1, 1.0, 4.0))) == 3
    assert mean_recent_loss(watched((0, 1, 1.0, None))) is None


def test_differing_settings_name_what_differs_alone() -> None:
    assert differing_settings(SPEC, SPEC) == {}
    other = ExperimentSpec(num_samples=2000, num_epochs=10, meta_batch_size=100, mini_batch_size=20, seed=4)
    assert differing_settings(SPEC, other) == {
        "samples": ("1,000", "2,000"),
        "beta2": ("0.8", "0.9"),
        "prune ratio": ("0.3", "0"),
        "annealing": ("0", "0.05"),
        "seed": ("0", "4"),
    }


def test_figures_have_three_digits_at_most() -> None:
    assert [number(x) for x in (None, float("nan"), 0.012345, 1.0, 12.345, 123456.0)] == [
        *("-", "-", "0.0123", "1", "12.3", "123,000")
    ]
    assert [percent(x) for x in (None, 0.0, 0.004, 0.0994, 0.61, 1.0)] == [
        "-",
        "0 %",
        "0.4 %",
        "9.9 %",
        "61 %",
        "100 %",
    ]
    assert [age(x) for x in (0.4, 119.0, 120.0, 7200.0, 200_000.0)] == [
        *("0 s ago", "119 s ago", "2 min ago", "2 h ago", "2 d ago")
    ]


def test_score_densities_are_those_of_the_samples_per_doubling() -> None:
    """Scores that are evenly spread over their logarithm have the same density in every bin."""
    scores = np.exp2(np.linspace(-8, 2, 100_000, endpoint=False)).astype(np.float32)
    counts = np.histogram(scores, [0, *SCORE_BIN_EDGES, np.inf])[0]
    (density,) = plots.score_densities([summary(3)._replace(score_histogram=counts)])
    np.testing.assert_allclose(density[density > 0], 10, rtol=1e-3)
    assert np.count_nonzero(density) == 20


def test_plots_of_no_epoch_say_so() -> None:
    for options in (
        plots.losses([]),
        plots.shares(SPEC, []),
        plots.staleness(SPEC, []),
        plots.histograms({}),
        plots.heat_map([]),
    ):
        assert options["title"]["show"]
        assert not any(series["data"] for series in options["series"])
        assert json.dumps(options, allow_nan=False)


def test_plots_of_a_thousand_epochs_stay_small() -> None:
    epochs = [summary(epoch, seed=epoch) for epoch in range(1000)]
    heat_map = plots.heat_map(epochs)
    assert len(heat_map["xAxis"]["data"]) == 200
    assert heat_map["xAxis"]["data"][:2] == ["0", "5"]
    (series,) = heat_map["series"]
    rows = len(heat_map["yAxis"]["data"])
    assert len(series["data"]) == 200 * rows
    # the first column is the mean of its five epochs
    densities = plots.score_densities(epochs[:5]).mean(axis=0)
    labels = ["0", *(f"{edge:.2g}" for edge in SCORE_BIN_EDGES)]
    first = labels.index(heat_map["yAxis"]["data"][0])
    assert [cell[2] for cell in series["data"][:rows]] == densities[first : first + rows].round(2).tolist()
    spec = ExperimentSpec(num_samples=N, num_epochs=1000, meta_batch_size=100, mini_batch_size=20)
    for options in (heat_map, plots.losses(epochs), plots.shares(spec, epochs), plots.staleness(spec, epochs)):
        assert len(json.dumps(options, allow_nan=False)) < 200_000


def test_a_loss_that_is_not_there_is_a_gap() -> None:
    epochs = [summary(0), summary(1)._replace(mean_loss=float("nan")), summary(2)]
    data = plots.losses(epochs)["series"][0]["data"]
    assert [value is None for _, value in data] == [False, True, False]
    assert json.dumps(plots.losses(epochs), allow_nan=False)
