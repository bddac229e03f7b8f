"""An epoch's two ends: planning its table from the scores, and folding its losses into them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evosample.sampling.layout import sample_id_dtype
from evosample.sampling.philox import Purpose, exponentials, random_bits
from evosample.sampling.race import Draw, race
from evosample.sampling.scores import Scores, updated_sampling_weights, updated_scores
from evosample.sampling.spec import ExperimentSpec


class Table(NamedTuple):
    """An epoch in plan order: row by row what will be visited. Whole steps only.

    Attributes:
        sample_ids: uint32 [num_rows] (uint64 where n needs it).
        prior_scores: float32 [num_rows], s at the epoch's start.
        importance_weights: float32 [num_rows], the set level's; None where the experiment asks for none.
    """

    sample_ids: NDArray[Any]
    prior_scores: NDArray[np.float32]
    importance_weights: NDArray[np.float32] | None


class FoldCounts(NamedTuple):
    """What became of a table's rows: loss reported and finite, reported but not finite, not reported."""

    visited: int
    non_finite: int
    unreported: int


def keep_samples(spec: ExperimentSpec, epoch: int, scores: Scores) -> Draw:
    """The set level: which samples `epoch` keeps.

    k = (1 - r) * n samples are drawn without replacement in proportion to the policy's prune weights. Where these come
    from scores, a sample without a finite loss yet is kept before all others: at its starting score of 1/n it would
    hardly ever be drawn.

    Returns:
        Draw of sample ids with their inclusion probabilities: 1 for what the rule above forces in.
    """
    num_samples, k = spec.num_samples, spec.shape(epoch).num_kept
    if k == num_samples:
        return Draw(np.arange(k), np.ones(k))
    draws = exponentials(random_bits(spec.seed, Purpose.PRUNE, epoch, 0, 0, num_samples))
    weights = spec.policy.prune_weights(scores.sampling_weights)
    forced = (scores.num_visits == 0) & spec.policy.keeps_unvisited
    num_forced = int(np.count_nonzero(forced))
    candidates = np.flatnonzero(forced if num_forced > k else ~forced)
    if num_forced > k:  # uniformly among the samples that are all owed a place
        uniform = race(np.zeros(num_forced, np.float32), k, draws[candidates])
        return Draw(candidates[uniform.rows], uniform.inclusion_probabilities)
    drawn = race(weights[candidates], k - num_forced, draws[candidates])
    inclusion_probabilities = np.where(forced, 1.0, 0.0)
    inclusion_probabilities[candidates[drawn.rows]] = drawn.inclusion_probabilities
    kept = forced
    kept[candidates[drawn.rows]] = True
    sample_ids = np.flatnonzero(kept)
    return Draw(sample_ids, inclusion_probabilities[sample_ids])


def permutation(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A uniform permutation of 0..len(bits)-1: indices sorted by random bits, packed into the same 64-bit word.

    Packed words sort several times faster than an argsort. The random half has 64 - log2(n) bits; what ties remain
    are broken by index, a bias below 2^-10 of a swap per pair even at n = 2^32.
    """
    n = len(bits)
    index_bits = np.uint64((n - 1).bit_length() if n else 0)
    packed = bits >> index_bits << index_bits
    packed |= np.arange(n, dtype=np.uint64)
    packed.sort()
    packed &= (np.uint64(1) << index_bits) - np.uint64(1)
    return packed


def shuffle_by_shard(spec: ExperimentSpec, epoch: int, sample_ids: NDArray[Any]) -> NDArray[np.intp]:
    """An order in which reading is nearly sequential: shards are permuted, samples shuffled in blocks of shards.

    A shard belongs to the block of `shuffle_block_samples` samples of the dataset in which it begins.

    Args:
        sample_ids: [k], ascending: what the epoch visits.

    Returns:
        Positions in `sample_ids`, [k].
    """
    sizes = np.array(spec.shard_sizes)
    stops = np.searchsorted(sample_ids, np.cumsum(sizes))
    starts = np.concatenate([[0], stops[:-1]])
    shards = permutation(random_bits(spec.seed, Purpose.SHUFFLE_SHARDS, epoch, 0, 0, len(sizes))).astype(np.intp)
    blocks = (np.cumsum(sizes[shards]) - sizes[shards]) // spec.shuffle_block_samples
    bits = random_bits(spec.seed, Purpose.SHUFFLE_BLOCKS, epoch, 0, 0, len(sample_ids))
    order = np.empty(len(sample_ids), np.intp)
    first = 0
    for block in np.split(shards, np.flatnonzero(np.diff(blocks)) + 1):
        positions = np.concatenate([np.arange(starts[shard], stops[shard]) for shard in block])
        stop = first + len(positions)
        order[first:stop] = positions[permutation(bits[first:stop])]
        first = stop
    return order


def plan_epoch(spec: ExperimentSpec, epoch: int, scores: Scores) -> Table:
    """Prune, shuffle, cut to whole steps: a pure function of the scores and the spec's seed."""
    shape = spec.shape(epoch)
    kept = keep_samples(spec, epoch, scores)
    order = permutation(random_bits(spec.seed, Purpose.SHUFFLE, epoch, 0, 0, shape.num_kept))[: shape.num_rows]
    if spec.shard_sizes:
        order.sort()  # what falls out of the whole steps is drawn from all shards, not from the last ones
        order = order[shuffle_by_shard(spec, epoch, kept.rows[order])]
    sample_ids = kept.rows[order]
    importance_weights = None
    if spec.importance_weight != "none":
        weights = shape.num_kept / (spec.num_samples * kept.inclusion_probabilities[order])
        importance_weights = weights.astype(np.float32)
    return Table(sample_ids.astype(sample_id_dtype(spec.num_samples)), scores.scores[sample_ids], importance_weights)


def count_new(num_samples: int, sample_ids_before: NDArray[Any], sample_ids: NDArray[Any]) -> int:
    """How many samples of one epoch's table are not in that of the epoch before; ids are in [0, num_samples)."""
    was_there = np.zeros(num_samples, np.bool_)
    was_there[sample_ids_before] = True
    return len(sample_ids) - int(np.count_nonzero(was_there[sample_ids]))


def fold_epoch(
    spec: ExperimentSpec, scores: Scores, sample_ids: NDArray[Any], losses: NDArray[np.float32]
) -> tuple[Scores, FoldCounts]:
    """Take an epoch's losses into the scores. A sample without a finite loss stays as it was.

    Args:
        scores: at the epoch's start; not changed.
        sample_ids: [num_rows], each at most once.
        losses: float32 [num_rows]; NaN where not reported, +inf where reported as not finite.

    Returns:
        The scores at the next epoch's start, and what became of the rows.
    """
    finite = np.isfinite(losses)
    ids, visited_losses = sample_ids[finite], losses[finite]
    prior = scores.scores[ids]
    after = Scores(scores.scores.copy(), scores.sampling_weights.copy(), scores.num_visits.copy())
    after.sampling_weights[ids] = updated_sampling_weights(prior, visited_losses, spec.policy.beta1)
    after.scores[ids] = updated_scores(prior, visited_losses, spec.policy.beta2)
    after.num_visits[ids] += np.uint32(1)
    num_unreported = int(np.count_nonzero(np.isnan(losses)))
    counts = FoldCounts(len(ids), len(losses) - len(ids) - num_unreported, num_unreported)
    return after, counts
