"""What people are shown of an experiment, worked out of what it tells: for the dashboard and the command line. Pure."""

from __future__ import annotations

from collections import deque
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evosample.sampling import EpochSummary, ExperimentSpec
from evosample.wire import ExperimentStatus, Watched

Activity = Literal["training", "silent", "not started", "planning", "finished"]

RECENT_S = 60.0
"""A rank whose latest report is no older is taken to be connected."""

STALENESS_LABELS = ("this epoch", "1 epoch ago", "2-3", "4-7", "8-15", "16 or more", "never")
"""Of the shares of `staleness_shares`: epochs since a sample's latest loss."""

_STALENESS_STARTS = (0, 1, 2, 4, 8, 16)


def merged_epochs(known: list[EpochSummary], watched: Watched) -> list[EpochSummary]:
    """The epochs that have ended, ascending: those known and those told just now, without those a run went back over.

    It is the very list that was known if nothing has changed.
    """
    epochs = {summary.epoch: summary for summary in known if summary.epoch < watched.status.epoch}
    if len(epochs) == len(known) and not watched.epochs:
        return known
    epochs |= {past.summary.epoch: past.summary for past in watched.epochs}
    return [epochs[epoch] for epoch in sorted(epochs)]


def num_recent_ranks(watched: Watched) -> int:
    """Ranks of the latest run that have reported lately."""
    return sum(rank.age_s <= RECENT_S for rank in watched.ranks)


def activity(watched: Watched) -> Activity:
    """What an experiment is doing."""
    status = watched.status
    if status.state == "finished":
        return "finished"
    if not status.generation:
        return "not started"
    if num_recent_ranks(watched):
        return "training"
    return "planning" if status.state in ("unplanned", "sealed") else "silent"


def progress_share(watched: Watched) -> float:
    """Share of the whole run's steps that its ranks have reported, from 0 to 1."""
    status, spec = watched.status, watched.status.spec
    if status.state == "finished":
        return 1.0
    steps = sum(rank.step for rank in watched.ranks if rank.epoch == status.epoch)
    in_epoch = steps / max(status.world_size * status.num_steps, 1)
    begin, stop = (spec.num_steps_before(epoch) for epoch in (status.epoch, status.epoch + 1))
    return (begin + (stop - begin) * in_epoch) / spec.total_steps


def saved_share(status: ExperimentStatus) -> float | None:
    """Back-propagation saved so far, as a share of what ordinary training on as many rows takes.

    1 - back-propagated rows / rows of the epochs that have ended; None if none has, or if all rows are trained on.
    """
    num_rows = status.visited_rows + status.non_finite_rows + status.unreported_rows
    can_save = status.spec.selects or status.spec.policy.hides
    return 1 - status.trained_rows / num_rows if num_rows and can_save else None


def covered_share(spec: ExperimentSpec, summary: EpochSummary) -> float:
    """Share of the samples that have had a finite loss by the end of an epoch."""
    return 1 - summary.num_never_visited / spec.num_samples


def staleness_shares(spec: ExperimentSpec, summary: EpochSummary) -> NDArray[np.float64]:
    """Shares of the samples by how long ago their latest loss was: float64 [len(STALENESS_LABELS)], summing to 1."""
    counts = summary.staleness_histogram.copy()
    # A sample that was never visited is as stale as the experiment is old, and counted there.
    oldest = min(summary.epoch + 1, len(counts) - 1)
    num_never = min(summary.num_never_visited, int(counts[oldest]))
    counts[oldest] -= num_never
    return np.append(np.add.reduceat(counts, _STALENESS_STARTS), num_never) / spec.num_samples


def mean_recent_loss(watched: Watched) -> float | None:
    """Mean over the ranks of the mean loss in their latest reports; None if there is none."""
    losses = [rank.mean_loss for rank in watched.ranks if rank.mean_loss is not None]
    return sum(losses) / len(losses) if losses else None


class Throughput:
    """Samples a second that an experiment's ranks visit, from figures that follow each other.

    Args:
        window_s: what is averaged over: reports come in bursts.
    """

    def __init__(self, window_s: float = 15.0) -> None:
        self._window_s = window_s
        self._generation = 0
        self._seen: deque[tuple[float, dict[int, float]]] = deque()

    def add(self, time_s: float, watched: Watched) -> float | None:
        """Samples a second up to `time_s`, on any steady clock; None while there is nothing to compare with."""
        if watched.status.generation != self._generation:
            self._generation = watched.status.generation
            self._seen.clear()
        self._seen.append((time_s, _visited_rows(watched)))
        while len(self._seen) > 2 and self._seen[1][0] <= time_s - self._window_s:
            self._seen.popleft()
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        ranks = first.keys() & last.keys()
        if last_s <= first_s or not ranks:
            return None
        return sum(last[rank] - first[rank] for rank in ranks) / (last_s - first_s)


def _visited_rows(watched: Watched) -> dict[int, float]:
    """Rows of each rank's part up to its latest report, counted from the experiment's beginning."""
    spec = watched.status.spec
    return {
        rank.rank: (spec.num_rows_before(rank.epoch) + rank.step * spec.shape(rank.epoch).step_rows)
        / max(watched.status.world_size, 1)
        for rank in watched.ranks
    }


def differing_settings(one: ExperimentSpec, other: ExperimentSpec) -> dict[str, tuple[str, str]]:
    """What two experiments were created with and is not the same: name -> value in the one, value in the other."""
    settings, others = _settings(one), _settings(other)
    names = [*settings, *(name for name in others if name not in settings)]
    return {name: values for name in names if len(set(values := (settings.get(name, "-"), others.get(name, "-")))) == 2}


def _settings(spec: ExperimentSpec) -> dict[str, str]:
    return {
        "samples": f"{spec.num_samples:,}",
        "epochs": f"{spec.num_epochs:,}",
        "meta-batch size": f"{spec.meta_batch_size:,}",
        "mini-batch size": f"{spec.mini_batch_size:,}",
        "policy": type(spec.policy).__name__,
        **{name.replace("_", " "): _shown(value) for name, value in vars(spec.policy).items()},
        "importance weight": spec.importance_weight,
        "seed": str(spec.seed),
        "at most skipped in a row": f"{spec.max_skipped_epochs or 'any number of'} epochs",
        "loss clip quantile": f"{spec.loss_clip_quantile:g}",
        "starts from known scores": "yes" if spec.warm_start else "no",
        "shards": f"{len(spec.shard_sizes):,}",
    }


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# How figures are written


def percent(share: float | None) -> str:
    """A share as 61 %, or 0.4 % where that would be 0."""
    if share is None:
        return "-"
    return f"{100 * share:.1f} %" if 0 < abs(share) < 0.0995 else f"{100 * share:.0f} %"


def number(value: float | None) -> str:
    """Three digits of a number: 0.0123, 12.3, 12,300."""
    if value is None or not np.isfinite(value):
        return "-"
    if abs(value) >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


def age(age_s: float) -> str:
    """How long ago something was: 5 s ago, 12 min ago."""
    for unit, length_s in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if age_s >= 2 * length_s:
            return f"{age_s / length_s:.0f} {unit} ago"
    return f"{age_s:.0f} s ago"
