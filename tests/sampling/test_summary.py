from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evosample.sampling import (
    SCORE_BIN_EDGES,
    EpochShape,
    FoldCounts,
    Report,
    Scores,
    fold_epoch,
    initial_scores,
    mean_of_finite,
    score_histogram,
    summarize_epoch,
)
from evosample.sampling.spec import ExperimentSpec

SPEC = ExperimentSpec(num_samples=40, num_epochs=4, meta_batch_size=8, mini_batch_size=4)
LOSSES = np.arange(8, dtype=np.float32)


def test_scores_are_counted_in_the_bins_of_their_half_octaves() -> None:
    rng = np.random.default_rng(0)
    scores = np.exp(rng.uniform(-20, 12, 1_200_000)).astype(np.float32)
    expected, _ = np.histogram(scores, [0, *SCORE_BIN_EDGES, np.inf])
    np.testing.assert_array_equal(score_histogram(scores), expected)


def test_a_bin_begins_with_its_edge() -> None:
    edges = SCORE_BIN_EDGES.astype(np.float32)
    np.testing.assert_array_equal(score_histogram(edges), [0] + [1] * len(edges))
    np.testing.assert_array_equal(score_histogram(np.nextafter(edges, np.float32(0))), [1] * len(edges) + [0])


def test_the_smallest_and_the_largest_scores_are_counted_at_the_ends() -> None:
    counts = score_histogram(np.array([0, 1e-45, 1e-30, 1e30, 3e38], np.float32))
    assert (counts[0], counts[-1], counts.sum()) == (3, 2, 5)


def fold(scores: Scores, sample_ids: list[int], losses: NDArray[np.float32]) -> FoldCounts:
    return fold_epoch(SPEC, scores, np.array(sample_ids), Report(losses, np.zeros(len(losses), np.bool_), {}))


def test_staleness_counts_the_epochs_since_the_last_finite_loss() -> None:
    scores = initial_scores(40)
    fold(scores, list(range(8)), LOSSES)
    fold(scores, [0, 1, 20], np.array([1, np.inf, np.nan], np.float32))
    assert scores.staleness[:9].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 2]
    for _ in range(300):
        fold(scores, [1], np.ones(1, np.float32))
    assert scores.staleness[:3].tolist() == [255, 0, 255]


def test_an_epoch_is_summed_up() -> None:
    losses = np.array([1, 2, np.inf, np.nan, 6, 0.5, np.nan, 3], np.float32)
    scores = initial_scores(40)
    counts = fold(scores, [7, 3, 9, 11, 30, 1, 0, 20], losses)
    shape = EpochShape(
        num_steps=1, step_rows=8, trained_rows=4, selecting_interval=1, num_hidden_steps=0, is_annealing=False
    )
    found = summarize_epoch(2, shape, mean_of_finite(losses), counts, scores, trained_before=100)
    assert (found.epoch, found.num_rows, found.num_trained, found.total_trained) == (2, 8, 4, 104)
    assert found.counts == (5, 1, 2)
    assert found.mean_loss == 2.5
    assert found.mean_score == np.float64(scores.scores.astype(np.float64).mean())
    assert found.num_never_visited == 35
    assert found.staleness_histogram.tolist() == [5, 35] + [0] * 15
    assert found.hardest_ids[:5].tolist() == [30, 20, 3, 7, 1]
    assert found.hardest_ids[5:].tolist() == [0, 2, *range(4, 7), *range(8, 18)]  # of equal ones the first
    np.testing.assert_array_equal(found.hardest_scores, scores.scores[found.hardest_ids])
    assert found.score_histogram.sum() == 40


def test_an_epoch_without_losses_has_no_mean_loss() -> None:
    losses = np.full(8, np.nan, np.float32)
    scores = initial_scores(40)
    counts = fold(scores, list(range(8)), losses)
    found = summarize_epoch(0, SPEC.shape(0), mean_of_finite(losses), counts, scores, trained_before=0)
    assert np.isnan(found.mean_loss)
    assert found.staleness_histogram.tolist() == [0, 40] + [0] * 15
