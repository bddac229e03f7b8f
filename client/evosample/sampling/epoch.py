"""An epoch's two ends: planning its table from the scores, and folding its losses into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evosample.sampling.draws import draw
from evosample.sampling.groups import (
    DoReMi,
    Groups,
    floor_samples,
    floor_sizes,
    group_sizes,
    shared_out,
    weights_within_groups,
)
from evosample.sampling.layout import sample_id_dtype
from evosample.sampling.philox import BLOCK_ROWS, Purpose, random_bits
from evosample.sampling.scores import Scores, clipped_losses
from evosample.sampling.spec import EpochShape, ExperimentSpec

_INDEX_BITS = np.uint64(40)


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


class Plan(NamedTuple):
    """What an epoch visits.

    Attributes:
        table: in plan order; steps that are only scored come last.
        shape: its sizes.
    """

    table: Table
    shape: EpochShape


class KeptSamples(NamedTuple):
    """What an epoch keeps.

    Attributes:
        sample_ids: [k], ascending; of the dtype of a table's.
        inclusion_probabilities: float64 [k]; None where the experiment asks for no importance weights.
        importance_weights: float64 [k], the policy's own; None: it gives none.
        hidden_ids: [h], ascending: what is not kept but scored, without training, at the epoch's end.
        is_guarded: bool [k], which of the kept samples have to be visited: what keeps groups at their floors, and what
            is due by `max_skipped_epochs`. None: there is no such thing.
    """

    sample_ids: NDArray[Any]
    inclusion_probabilities: NDArray[np.float64] | None
    importance_weights: NDArray[np.float64] | None
    hidden_ids: NDArray[Any]
    is_guarded: NDArray[np.bool_] | None


class _Rows(Mapping[str, NDArray[np.float32]]):
    """Columns of some samples, of which only those are copied that are looked at, and none can be changed."""

    def __init__(self, columns: Mapping[str, NDArray[np.float32]], rows: NDArray[np.int64] | slice) -> None:
        self._columns = columns
        self._rows = rows

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        values = self._columns[name][self._rows]
        values.flags.writeable = False
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


def keep_samples(
    spec: ExperimentSpec,
    epoch: int,
    scores: Scores,
    groups: Groups | None = None,
    mixture: NDArray[np.float64] | None = None,
) -> KeptSamples:
    """The set level: which samples `epoch` keeps, ascending, and which it only scores.

    What has to be kept is: what keeps groups at their floors; where `policy.keeps_unvisited`, every sample without a
    finite loss yet, before all others; and with any policy one that had none in `max_skipped_epochs` epochs. Of the
    rest the policy keeps what it likes, with a mixture of each group by itself. An epoch that would come to less than
    one meta-batch leaves nothing out; nor does one that would hide less than one, since these would never be scored,
    and so stay hidden for good.

    Args:
        groups: None where there are none.
        mixture: float64 [G], sum 1; None where there is none.
    """
    num_samples, policy = spec.num_samples, spec.policy
    dtype = sample_id_dtype(num_samples)
    is_due: NDArray[np.bool_] = np.broadcast_to(np.False_, num_samples)  # takes no memory
    if spec.max_skipped_epochs:
        is_due = scores.staleness >= spec.max_skipped_epochs
    is_owed = is_due | ((scores.num_visits == 0) & policy.keeps_unvisited)
    floor = None
    if groups is not None and spec.group_floor:
        least = floor_sizes(groups.ids, spec.num_groups, spec.group_floor)
        # By the draw's own bits those that are left over would be favoured.
        ties = random_bits(spec.seed, Purpose.FLOORS, epoch, 0, 0, num_samples)
        # Whoever is in by its weight alone would keep those out that have none of their own yet.
        goes_first = is_owed | (scores.num_visits == 0)
        floor = floor_samples(groups.ids, least, goes_first, scores.sampling_weights, ties)
    wants_probabilities = spec.importance_weight != "none"

    def everything() -> KeptSamples:
        sample_ids, ones = np.arange(num_samples, dtype=dtype), np.ones(num_samples)
        is_guarded = _guarded(sample_ids, spec.shape(epoch, num_samples).num_training_rows, floor, is_due)
        return KeptSamples(sample_ids, ones if wants_probabilities else None, None, np.empty(0, dtype), is_guarded)

    if spec.is_annealing(epoch) or (spec.num_places == num_samples and not policy.is_adaptive):
        return everything()
    bits = random_bits(spec.seed, Purpose.PRUNE, epoch, 0, 0, num_samples)
    forced = is_owed if floor is None else is_owed | floor
    inclusion_probabilities = np.ones(num_samples) if wants_probabilities else None
    importance_weights = np.ones(num_samples) if policy.weighs else None
    if np.count_nonzero(forced) > spec.num_places:  # uniformly among the samples that are all owed a place
        owed = np.flatnonzero(forced if floor is None else forced & ~floor)
        num_left = spec.num_places - int(np.count_nonzero(forced)) + len(owed)
        uniform = draw("successive", np.zeros(len(owed), np.float32), num_left, bits[owed])
        forced = np.zeros(num_samples, np.bool_) if floor is None else floor.copy()
        forced[owed[uniform.rows]] = True
        if inclusion_probabilities is not None:
            inclusion_probabilities[owed[uniform.rows]] = uniform.inclusion_probabilities
    is_forced = forced.copy()
    hidden: list[NDArray[np.int64]] = []
    weights = scores.sampling_weights
    if groups is not None and mixture is not None:
        weights = weights_within_groups(weights, scores.num_visits, groups.ids, spec.num_groups)
    columns = {"scores": scores.scores, "sampling_weights": weights, **scores.columns}
    if policy.is_adaptive:  # it goes by all samples that have a loss; what it may not leave out is put back
        has_loss = (scores.num_visits > 0) | (not policy.keeps_unvisited)
        shares = iter([(_where(has_loss), int(np.count_nonzero(has_loss)))])
    else:
        shares = _shares(spec, is_forced, groups, mixture)
    for free, num_places in shares:
        kept = policy.keep(_Rows(columns, free), num_places, epoch / spec.num_epochs, bits[free])
        ids = _ids(free, kept.rows)
        forced[ids] = True
        if inclusion_probabilities is not None:
            inclusion_probabilities[ids] = kept.inclusion_probabilities
        if importance_weights is not None and kept.importance_weights is not None:
            importance_weights[ids] = kept.importance_weights
        hidden.append(_ids(free, kept.hidden))
        del kept, ids  # of a large dataset they are large
    del bits
    sample_ids, hidden_ids = forced.nonzero()[0].astype(dtype), np.concatenate(hidden).astype(dtype)
    if policy.is_adaptive:
        for values in (inclusion_probabilities, importance_weights):
            if values is not None:
                values[is_forced] = 1
        hidden_ids = hidden_ids[~is_forced[hidden_ids]]
    num_rows = spec.shape(epoch, len(sample_ids), len(hidden_ids)).num_training_rows
    if not num_rows or 0 < len(hidden_ids) < spec.meta_batch_size:
        return everything()
    if floor is not None and np.count_nonzero(floor) > num_rows:  # whole steps would not hold them
        return everything()
    return KeptSamples(
        sample_ids,
        None if inclusion_probabilities is None else inclusion_probabilities[sample_ids],
        None if importance_weights is None else importance_weights[sample_ids],
        hidden_ids,
        _guarded(sample_ids, num_rows, floor, is_due),
    )


def _guarded(
    sample_ids: NDArray[Any], num_rows: int, floor: NDArray[np.bool_] | None, is_due: NDArray[np.bool_]
) -> NDArray[np.bool_] | None:
    """Which of the kept samples are not to fall out of the whole steps; those that are due if there is room for all."""
    if floor is None and not is_due.any():
        return None
    guarded = (is_due if floor is None else is_due | floor)[sample_ids]
    if np.count_nonzero(guarded) > num_rows:
        return None if floor is None else floor[sample_ids]
    return guarded if floor is not None or guarded.any() else None


def _shares(
    spec: ExperimentSpec,
    is_forced: NDArray[np.bool_],
    groups: Groups | None,
    mixture: NDArray[np.float64] | None,
) -> Iterator[tuple[NDArray[np.int64] | slice, int]]:
    """What the policy has to choose from and how many of it, at once or, with a mixture, group by group."""
    if groups is None or mixture is None:
        yield _where(~is_forced), spec.num_places - int(np.count_nonzero(is_forced))
        return
    free = np.flatnonzero(~is_forced)
    sizes = group_sizes(groups.ids, spec.num_groups)
    least = group_sizes(groups.ids[is_forced], spec.num_groups)
    seen = np.maximum(least, np.minimum(sizes, 1)) if isinstance(spec.mixture, DoReMi) else least
    if seen.sum() > spec.num_places:
        seen = least
    places = shared_out(mixture, seen, sizes, spec.num_places) - least
    by_group = free[np.argsort(groups.ids[free], kind="stable")]
    stops = np.cumsum(sizes - least)
    yield from zip(np.split(by_group, stops[:-1]), places.tolist(), strict=True)


def _where(mask: NDArray[np.bool_]) -> NDArray[np.int64] | slice:
    """The rows of a mask; if these are all, as a slice, with which nothing is copied."""
    return slice(None) if mask.all() else np.flatnonzero(mask)


def _ids(free: NDArray[np.int64] | slice, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sample ids of rows of what was free."""
    return rows if isinstance(free, slice) else free[rows]


def permutation(bits: NDArray[np.uint64]) -> NDArray[np.int64]:
    """A uniform permutation of 0..len(bits)-1: indices sorted by the upper 24 of their random bits.

    Ties are broken by index, a bias of 2^-24 of a swap per pair. (Of many more rows than 2^24, neighbours often are in
    the order of their indices: that matters little to what is in a batch.)

    Sorted are the 24 bits with the index below them: whole numbers, which numpy sorts several times as fast as it finds
    out their order, and without going back and forth over all of the array. The result takes the place of the bits.
    """
    bits >>= _INDEX_BITS
    bits <<= _INDEX_BITS
    for first in range(0, len(bits), BLOCK_ROWS):
        block = bits[first : first + BLOCK_ROWS]
        block |= np.arange(first, first + len(block), dtype=np.uint64)
    bits.sort()
    bits &= (np.uint64(1) << _INDEX_BITS) - np.uint64(1)
    return bits.view(np.int64)


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
    shards = permutation(random_bits(spec.seed, Purpose.SHUFFLE_SHARDS, epoch, 0, 0, len(sizes)))
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


def plan_epoch(
    spec: ExperimentSpec,
    epoch: int,
    scores: Scores,
    groups: Groups | None = None,
    mixture: NDArray[np.float64] | None = None,
) -> Plan:
    """Prune, shuffle, cut to whole steps: a pure function of the scores, the groups, their mixture and the seed."""
    kept = keep_samples(spec, epoch, scores, groups, mixture)
    num_kept = len(kept.sample_ids)
    shape = spec.shape(epoch, num_kept, len(kept.hidden_ids))
    num_training_rows = shape.num_training_rows
    order = permutation(random_bits(spec.seed, Purpose.SHUFFLE, epoch, 0, 0, num_kept))
    probabilities = kept.inclusion_probabilities
    if kept.is_guarded is None:
        order = order[:num_training_rows]
    else:  # what falls out of the whole steps is none of what has to be visited
        others = np.flatnonzero(~kept.is_guarded[order])
        num_left = len(others) - (len(order) - num_training_rows)
        order = np.delete(order, others[num_left:])
        # Without the others at its end, these would make up the last steps.
        order = order[permutation(random_bits(spec.seed, Purpose.SHUFFLE_GUARDED, epoch, 0, 0, len(order)))]
        if probabilities is not None:
            is_cut_to = num_training_rows / num_kept
            probabilities = probabilities * np.where(kept.is_guarded, 1.0, num_left / max(len(others), 1)) / is_cut_to
    if spec.shard_sizes:
        order.sort()  # what falls out of the whole steps is drawn from all shards, not from the last ones
        order = order[shuffle_by_shard(spec, epoch, kept.sample_ids[order])]
    sample_ids = kept.sample_ids[order]
    importance_weights = None
    if probabilities is not None:
        importance_weights = num_kept / (spec.num_samples * probabilities[order])
    elif spec.has_set_weights:
        importance_weights = np.ones(len(order)) if kept.importance_weights is None else kept.importance_weights[order]
    if shape.num_hidden_steps:
        hidden = permutation(random_bits(spec.seed, Purpose.SHUFFLE_HIDDEN, epoch, 0, 0, len(kept.hidden_ids)))
        hidden = np.sort(hidden[: shape.num_hidden_steps * shape.step_rows])  # the order in which they are best read
        sample_ids = np.concatenate([sample_ids, kept.hidden_ids[hidden]])
        if importance_weights is not None:
            importance_weights = np.concatenate([importance_weights, np.zeros(len(hidden))])
    table = Table(
        sample_ids,
        scores.scores[sample_ids],
        None if importance_weights is None else importance_weights.astype(np.float32),
    )
    return Plan(table, shape)


def mask_of(num_samples: int, sample_ids: NDArray[Any]) -> NDArray[np.bool_]:
    """Which samples are among some: bool [num_samples]."""
    mask = np.zeros(num_samples, np.bool_)
    mask[sample_ids] = True
    return mask


class Report(NamedTuple):
    """What was reported of an epoch's rows, in the order of its table.

    Attributes:
        losses: float32 [num_rows]; NaN where not reported, +inf where reported as not finite.
        chosen: bool [num_rows], which rows were chosen for back-propagation.
        columns: float32 [num_rows] each, what the policy has reported beside the loss.
    """

    losses: NDArray[np.float32]
    chosen: NDArray[np.bool_]
    columns: Mapping[str, NDArray[np.float32]]


def fold_epoch(spec: ExperimentSpec, scores: Scores, sample_ids: NDArray[Any], report: Report) -> FoldCounts:
    """Take what was reported of an epoch into the scores. A sample without a finite loss stays as it was.

    Where a loss is finite but another column of its row is not, the row counts as not finite, too.

    Args:
        scores: at the epoch's start; their arrays are changed to what they are at the next one's. (They may be large.)
        sample_ids: [num_rows], each at most once.

    Returns:
        What became of the rows.
    """
    losses = report.losses
    finite = np.isfinite(losses)
    for column in report.columns.values():
        finite &= np.isfinite(column)
    num_finite = int(np.count_nonzero(finite))
    num_unreported = int(np.count_nonzero(np.isnan(losses)))
    if num_finite < len(losses) or spec.loss_clip_quantile < 1:
        clipped = clipped_losses(losses[finite], spec.loss_clip_quantile)
        losses = np.full(len(losses), np.nan, np.float32)
        losses[finite] = clipped

    def by_sample(values: NDArray[Any], of_others: float | bool) -> NDArray[Any]:
        found = np.full(len(scores.scores), of_others, values.dtype)
        found[sample_ids] = values
        return found

    # Only this goes back and forth in memory. All else is done in blocks of samples, which stay in the cache.
    new_losses, chosen = by_sample(losses, np.nan), by_sample(report.chosen, False)
    reported = {name: by_sample(values, np.nan) for name, values in report.columns.items()}
    columns = {"scores": scores.scores, "sampling_weights": scores.sampling_weights, **scores.columns}
    for first in range(0, len(new_losses), BLOCK_ROWS):
        block = slice(first, first + BLOCK_ROWS)
        visited = ~np.isnan(new_losses[block])
        rows = visited.nonzero()[0]  # found once: numpy would look for them again wherever it is given a mask
        if len(rows):
            before = {name: column[block][rows] for name, column in columns.items()}
            reported_here = {name: values[block][rows] for name, values in reported.items()}
            folded = spec.policy.fold(before, new_losses[block][rows], reported_here)
            for name, column in columns.items():
                column[block][rows] = folded[name]
        _count(scores.num_visits[block], visited)
        _count(scores.num_chosen[block], chosen[block])
        _age(scores.staleness[block], visited)
        _age(scores.chosen_staleness[block], chosen[block])
    return FoldCounts(num_finite, len(losses) - num_finite - num_unreported, num_unreported)


def _count(counts: NDArray[np.uint16], seen: NDArray[np.bool_]) -> None:
    """One more for those that were seen, as far as the type holds it."""
    counts += seen & (counts < np.iinfo(counts.dtype).max)


def _age(staleness: NDArray[np.uint8], seen: NDArray[np.bool_]) -> None:
    """One more epoch has ended; for those that were seen none since."""
    np.minimum(staleness, np.uint8(254), out=staleness)
    staleness += np.uint8(1)
    staleness *= ~seen
