"""The batch level: which rows of its part of a step a rank back-propagates."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evosample.sampling.draws import draw
from evosample.sampling.philox import Purpose, random_bits
from evosample.sampling.scores import clipped_losses
from evosample.sampling.spec import EpochShape, ExperimentSpec


class MiniBatch(NamedTuple):
    """The rows to back-propagate.

    Attributes:
        positions: int64 [m], rows of the rank's part of the step, ascending.
        importance_weights: float32 [m]; multiply the losses by them. All ones with `importance_weight="none"`.
    """

    positions: NDArray[np.int64]
    importance_weights: NDArray[np.float32]


def select_mini_batch(
    spec: ExperimentSpec,
    shape: EpochShape,
    *,
    epoch: int,
    step: int,
    rank: int,
    world_size: int,
    prior_scores: NDArray[np.float32],
    losses: NDArray[np.float32],
    set_importance_weights: NDArray[np.float32] | None,
    bits: NDArray[np.uint64] | None = None,
) -> MiniBatch:
    """Draw a rank's share of a step's mini-batch: the one definition that clients and servers share.

    In a step that selects, (b / W) of the part's (B / W) rows are drawn by the policy's sampling weights; "unbiased"
    importance weights are b / (B * pi_batch) times the set level's. In a step that does not select, all rows are
    chosen; in a hidden one none.

    Args:
        shape: of the epoch, as it was planned.
        prior_scores: float32 [B / W], scores at the epoch's start.
        losses: float32 [B / W], >= 0; non-finite ones are chosen only to fill up.
        set_importance_weights: float32 [B / W], the set level's; None where all are one.
        bits: uint64 [B / W], as `selection_bits` gives them for this step, for whoever made them beforehand.
    """
    num_rows = len(losses)
    if shape.step_selects(step):
        num_chosen = shape.trained_rows // world_size
        if bits is None:
            (bits,) = selection_bits(spec, epoch, range(step, step + 1), rank, num_rows)
        drawn_from: NDArray[np.int64] | slice = slice(None)
        finite = None if losses.max(initial=0) < np.inf else np.isfinite(losses)
        if finite is not None and np.count_nonzero(finite) < num_chosen:  # these come first whatever they weigh
            weights = finite.astype(np.float32)
        else:
            if finite is not None:
                drawn_from = finite.nonzero()[0]
            clipped = clipped_losses(losses[drawn_from], spec.loss_clip_quantile)
            clipped.flags.writeable = False  # they are a policy's to look at, and may be the caller's own
            weights = spec.policy.sampling_weights(prior_scores[drawn_from], clipped, num_chosen)
        drawn = draw(spec.policy.batch_draw, weights, num_chosen, bits[drawn_from])
        rows = drawn.rows if isinstance(drawn_from, slice) else drawn_from[drawn.rows]
    else:
        rows = np.arange(num_rows if shape.step_trains(step) else 0)
    if set_importance_weights is None and spec.importance_weight == "none":
        return MiniBatch(rows, np.ones(len(rows), np.float32))
    importance_weights = np.ones(len(rows))
    if spec.importance_weight != "none" and shape.step_selects(step):
        importance_weights = num_chosen / (num_rows * drawn.inclusion_probabilities)
    if set_importance_weights is not None:
        importance_weights *= set_importance_weights[rows]
    if spec.importance_weight == "self_normalized" and len(rows):
        importance_weights *= len(rows) / importance_weights.sum()
    return MiniBatch(rows, importance_weights.astype(np.float32))


def selection_bits(
    spec: ExperimentSpec, epoch: int, steps: range, rank: int, part_rows: int
) -> list[NDArray[np.uint64]]:
    """The random bits that a rank draws its mini-batches of some steps by: uint64 [part_rows] each."""
    return [random_bits(spec.seed, Purpose.SELECT, epoch, step, rank * part_rows, part_rows) for step in steps]
