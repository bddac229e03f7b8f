"""What an epoch has come to: figures for people to look at."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evosample.sampling.epoch import FoldCounts
from evosample.sampling.groups import Groups, group_sizes, mean_by_group
from evosample.sampling.philox import BLOCK_ROWS
from evosample.sampling.scores import Scores
from evosample.sampling.spec import EpochShape, ExperimentSpec

NUM_HARDEST = 20
NUM_STALENESS_BINS = 17
_FIRST_OCTAVE, _LAST_OCTAVE = -20, 10
SCORE_BIN_EDGES: NDArray[np.float64] = np.outer(2.0 ** np.arange(_FIRST_OCTAVE, _LAST_OCTAVE), [1, 1.5]).ravel()[1:]
"""Float64 [59]: inner edges of the bins of scores, two an octave from 2^-20 to 2^10; below and above they are open."""
NUM_SCORE_BINS = len(SCORE_BIN_EDGES) + 1


class GroupSummary(NamedTuple):
    """What an epoch has come to for a group.

    Attributes:
        num_samples: of the group.
        num_rows: of these, what the epoch visited.
        mean_loss: of the finite ones; NaN if there is none.
        excess_loss: mean of max(loss - reference loss, 0); NaN if there is none, and without reference losses.
        weight: its share of what the epoch was to keep; NaN without a mixture.
        is_capped: whether that share is more than the group has.
    """

    num_samples: int
    num_rows: int
    mean_loss: float
    excess_loss: float
    weight: float
    is_capped: bool


class EpochSummary(NamedTuple):
    """What an epoch has come to, when its losses were in the scores.

    Attributes:
        epoch: from 0.
        num_rows: samples that it visited: those it kept, cut to whole steps.
        num_trained: rows of these that were back-propagated.
        total_trained: rows that were back-propagated in this and all earlier epochs.
        counts: rows by what became of them.
        mean_loss: of the finite ones; NaN if there is none.
        mean_score: over all samples.
        score_histogram: int64 [NUM_SCORE_BINS], samples by score; for the bins see SCORE_BIN_EDGES.
        num_never_visited: samples that have had no finite loss so far.
        staleness_histogram: int64 [NUM_STALENESS_BINS], samples by the epochs that have ended since their last finite
            loss: 0 (they had one in this epoch), 1, 2, ... and the rest.
        hardest_ids: int64 [k], the samples of the highest scores, descending; k = min(n, NUM_HARDEST).
        hardest_scores: float32 [k].
        groups: by their ids; empty without groups.
    """

    epoch: int
    num_rows: int
    num_trained: int
    total_trained: int
    counts: FoldCounts
    mean_loss: float
    mean_score: float
    score_histogram: NDArray[np.int64]
    num_never_visited: int
    staleness_histogram: NDArray[np.int64]
    hardest_ids: NDArray[np.int64]
    hardest_scores: NDArray[np.float32]
    groups: tuple[GroupSummary, ...] = ()


def score_histogram(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """How many scores, float32 [n], are in each bin: int64 [NUM_SCORE_BINS]."""
    # A float32's sign, exponent and first bit of its mantissa number the half-octaves in ascending order.
    first = np.float32(2.0**_FIRST_OCTAVE).view(np.uint32) >> np.uint32(22)
    counts = np.zeros(NUM_SCORE_BINS, np.int64)
    for start in range(0, len(scores), BLOCK_ROWS):
        bins = (scores[start : start + BLOCK_ROWS].view(np.uint32) >> np.uint32(22)).astype(np.int64) - int(first)
        counts += np.bincount(np.clip(bins, 0, NUM_SCORE_BINS - 1), minlength=NUM_SCORE_BINS)
    return counts


def mean_of_finite(losses: NDArray[np.float32]) -> float:
    """The mean of the losses that are finite; NaN: there is none."""
    finite = losses[np.isfinite(losses)]
    return float(finite.mean(dtype=np.float64)) if len(finite) else float("nan")


def summarize_epoch(
    epoch: int,
    shape: EpochShape,
    mean_loss: float,
    counts: FoldCounts,
    scores: Scores,
    *,
    trained_before: int,
    groups: tuple[GroupSummary, ...] = (),
) -> EpochSummary:
    """An epoch's summary, from what folding its losses has led to.

    Args:
        mean_loss: of the losses that are finite; NaN: there is none.
        trained_before: rows that were back-propagated in all earlier epochs.
    """
    staleness = np.zeros(256, np.int64)
    for first in range(0, len(scores.staleness), BLOCK_ROWS):  # as 64-bit integers, which bincount makes of them
        staleness += np.bincount(scores.staleness[first : first + BLOCK_ROWS], minlength=256)
    hardest = _largest(scores.scores, NUM_HARDEST)
    return EpochSummary(
        epoch=epoch,
        num_rows=sum(counts),
        num_trained=shape.num_trained,
        total_trained=trained_before + shape.num_trained,
        counts=counts,
        mean_loss=mean_loss,
        mean_score=float(scores.scores.mean(dtype=np.float64)),
        score_histogram=score_histogram(scores.scores),
        num_never_visited=int(np.count_nonzero(scores.num_visits == 0)),
        staleness_histogram=np.append(staleness[: NUM_STALENESS_BINS - 1], staleness[NUM_STALENESS_BINS - 1 :].sum()),
        hardest_ids=hardest,
        hardest_scores=scores.scores[hardest],
        groups=groups,
    )


def summarize_groups(
    spec: ExperimentSpec,
    groups: Groups,
    mixture: NDArray[np.float64] | None,
    sample_ids: NDArray[Any],
    losses: NDArray[np.float32],
) -> tuple[GroupSummary, ...]:
    """What an epoch has come to group by group.

    Args:
        mixture: float64 [G], as the epoch was planned with it.
        sample_ids: [num_rows], the epoch's table.
        losses: float32 [num_rows].
    """
    num_groups = spec.num_groups
    finite = np.isfinite(losses)
    ids, visited, nothing = groups.ids[sample_ids], sample_ids[finite], np.full(num_groups, np.nan)
    excess = nothing
    if groups.reference_losses is not None:
        beyond = np.maximum(losses[finite] - groups.reference_losses[visited], 0)
        excess = mean_by_group(beyond, ids[finite], num_groups)
    sizes, weights = group_sizes(groups.ids, num_groups), nothing if mixture is None else mixture
    rows, means = group_sizes(ids, num_groups), mean_by_group(losses[finite], ids[finite], num_groups)
    is_capped = weights * spec.num_places > sizes
    columns = (column.tolist() for column in (sizes, rows, means, excess, weights, is_capped))
    return tuple(GroupSummary(*group) for group in zip(*columns, strict=True))


def _largest(values: NDArray[Any], k: int) -> NDArray[np.int64]:
    """Positions of the k largest values, descending; of equal ones the first."""
    of_blocks = [
        first + _largest_of_few(values[first : first + BLOCK_ROWS], k) for first in range(0, len(values), BLOCK_ROWS)
    ]
    positions = np.sort(np.concatenate(of_blocks))
    return positions[_largest_of_few(values[positions], k)]


def _largest_of_few(values: NDArray[Any], k: int) -> NDArray[np.int64]:
    """The same, with a copy of all of them."""
    k = min(k, len(values))
    smallest = np.partition(values, len(values) - k)[len(values) - k]
    positions = np.flatnonzero(values > smallest)
    positions = np.append(positions, np.flatnonzero(values == smallest)[: k - len(positions)])
    return positions[np.lexsort((positions, -values[positions]))]
