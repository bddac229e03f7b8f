"""The batch level: which rows of its part of a step a rank back-propagates."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evosample.sampling.philox import Purpose, exponentials, random_bits
from evosample.sampling.race import race
from evosample.sampling.spec import ExperimentSpec


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
    *,
    epoch: int,
    step: int,
    rank: int,
    world_size: int,
    prior_scores: NDArray[np.float32],
    losses: NDArray[np.float32],
    set_importance_weights: NDArray[np.float32] | None,
) -> MiniBatch:
    """Draw a rank's share of a step's mini-batch: the one definition that clients and servers share.

    In a step that selects, (b / W) of the part's (B / W) rows are drawn without replacement with probability
    proportional to the policy's sampling weights; "unbiased" importance weights are b / (B * pi_batch) times the set
    level's. In a step that does not select, all rows are chosen.

    Args:
        prior_scores: float32 [B / W], scores at the epoch's start.
        losses: float32 [B / W], >= 0; non-finite ones are chosen only to fill up.
        set_importance_weights: float32 [B / W], the set level's; None where the experiment has none.
    """
    shape = spec.shape(epoch)
    num_rows = len(losses)
    if shape.selects:
        num_chosen = shape.trained_rows // world_size
        bits = random_bits(spec.seed, Purpose.SELECT, epoch, step, rank * num_rows, num_rows)
        rows, inclusion_probabilities = race(
            spec.policy.sampling_weights(prior_scores, losses), num_chosen, exponentials(bits)
        )
        batch_weights = num_chosen / (num_rows * inclusion_probabilities)
    else:
        rows, batch_weights = np.arange(num_rows), np.ones(num_rows)
    if set_importance_weights is None:
        return MiniBatch(rows, np.ones(len(rows), np.float32))
    weights = batch_weights * set_importance_weights[rows]
    if spec.importance_weight == "self_normalized":
        weights *= len(weights) / weights.sum()
    return MiniBatch(rows, weights.astype(np.float32))
