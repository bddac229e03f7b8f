from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import evosample
from evosample import RankProgress
from evosample.sampling import SCORE_BIN_EDGES
from support import ServerProcess, fixed_losses

N, EPOCHS = 400, 5
SETTINGS: dict[str, Any] = {
    "num_samples": N,
    "num_epochs": EPOCHS,
    "meta_batch_size": 40,
    "mini_batch_size": 20,
    "policy": evosample.EvolvedSampling(prune_ratio=0.2),
}
LOSSES = fixed_losses(N, EPOCHS)


def progress_of(experiment: evosample.Experiment) -> tuple[RankProgress, ...]:
    return next(experiment.watch()).ranks


def go_through(epoch: evosample.Epoch) -> None:
    for batch in epoch:
        batch.select(LOSSES[batch.epoch, batch.sample_ids])


def test_past_epochs_are_summed_up(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    assert experiment.history() == ()
    began = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=1)
    visited: list[set[int]] = []
    scores = []
    for epoch in experiment.epochs():
        ids: list[int] = []
        for batch in epoch:
            losses = LOSSES[batch.epoch, batch.sample_ids].copy()
            if batch.step == 0:
                losses[0] = np.nan
            batch.select(losses)
            ids += batch.sample_ids.tolist()[batch.step == 0 :]
        visited.append(set(ids))
        scores.append(experiment.export_scores() if epoch.number < EPOCHS - 1 else None)
    scores[-1] = experiment.export_scores()

    history = experiment.history()
    assert [past.summary.epoch for past in history] == list(range(EPOCHS))
    assert all(began < past.end_time < datetime.datetime.now(datetime.UTC) for past in history)
    assert [past.summary.num_rows for past in history] == [400, 320, 320, 320, 400]
    assert [past.summary.num_trained for past in history] == [400, 160, 160, 160, 400]
    seen: set[int] = set()
    for epoch_number, (past, ids_visited) in enumerate(zip(history, visited, strict=True)):
        summary, exported = past.summary, scores[epoch_number]
        assert exported is not None
        seen |= ids_visited
        assert summary.counts == (len(ids_visited), 1, 0)
        assert summary.mean_loss == pytest.approx(LOSSES[epoch_number, list(ids_visited)].mean(), rel=1e-6)
        assert summary.mean_score == pytest.approx(exported.scores.mean(), rel=1e-6)
        expected, _ = np.histogram(exported.scores, [0, *SCORE_BIN_EDGES, np.inf])
        np.testing.assert_array_equal(summary.score_histogram, expected)
        assert summary.num_never_visited == N - len(seen)
        missed = [next((k for k in range(epoch_number + 1) if i in visited[epoch_number - k]), None) for i in range(N)]
        staleness = [epoch_number + 1 if k is None else k for k in missed]
        np.testing.assert_array_equal(summary.staleness_histogram, np.bincount(staleness, minlength=17))
        np.testing.assert_array_equal(summary.hardest_scores, np.sort(exported.scores)[::-1][:20])
        np.testing.assert_array_equal(summary.hardest_scores, exported.scores[summary.hardest_ids])


def test_ranks_are_seen_as_far_as_they_have_reported(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    assert progress_of(experiment) == ()
    runs = [experiment.epochs(rank=rank, world_size=2, run_id="job") for rank in range(2)]
    epochs = [next(run) for run in runs]
    means = []
    for _ in range(3):
        batch = next(iter(epochs[1]))
        losses = LOSSES[0, batch.sample_ids]
        means.append(losses.mean())
        batch.select(losses)
        runs[1].flush()
    (seen,) = progress_of(experiment)
    assert (seen.rank, seen.epoch, seen.step) == (1, 0, 3)
    assert 0 <= seen.age_s < 30
    assert seen.mean_loss == pytest.approx(means[-1], rel=1e-6)
    for rank in range(2):
        go_through(epochs[rank])
    for run in runs:
        next(run)
    assert [(rank.epoch, rank.step) for rank in progress_of(experiment)] == [(0, 10), (0, 10)]
    experiment.epochs(run_id="another")  # of which nothing has been reported
    assert progress_of(experiment) == ()


def test_many_ranks_report_less_often(client: evosample.Client, name: str) -> None:
    settings = SETTINGS | {"num_samples": 6_400, "meta_batch_size": 1_280, "mini_batch_size": 640}

    def seen_after_a_second(world_size: int) -> tuple[Any, ...]:
        experiment = client.create_experiment(f"{name}-{world_size}", **settings)
        run = experiment.epochs(rank=0, world_size=world_size, run_id="job")
        batch = next(iter(next(run)))
        batch.report(np.ones(len(batch.sample_ids), np.float32))
        time.sleep(1)
        seen = progress_of(experiment)
        run.flush()
        assert len(progress_of(experiment)) == 1
        run.close()
        return seen

    assert len(seen_after_a_second(1)) == 1
    assert seen_after_a_second(640) == ()


def test_watching_ends_with_the_experiment(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    watching = experiment.watch(interval_s=0.1)
    figures = [next(watching)]
    for epoch in experiment.epochs():
        go_through(epoch)
        if epoch.number < EPOCHS - 1:
            figures.append(next(watching))
    figures += watching
    assert [watched.status.state for watched in figures[-1:]] == ["finished"]
    assert [past.summary.epoch for watched in figures for past in watched.epochs] == list(range(EPOCHS))


def test_epochs_that_a_run_goes_through_again_are_told_again(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    watching = experiment.watch(interval_s=0.1)
    run = experiment.epochs()
    for _ in range(3):
        go_through(next(run))
    next(run)

    def told_until(epoch: int) -> list[int]:
        told: list[int] = []
        for watched in watching:
            told += [past.summary.epoch for past in watched.epochs]
            if watched.status.epoch == epoch:
                return told
        raise AssertionError("the experiment has finished")

    assert told_until(3) == [0, 1, 2]
    run = experiment.epochs(position=(2, 0))
    epoch = next(run)
    assert told_until(2) == []
    go_through(epoch)
    next(run)
    assert told_until(3) == [2]


def test_watching_goes_on_when_the_server_is_killed_and_started_again(
    start_server: Callable[..., ServerProcess],
) -> None:
    server = start_server()
    with evosample.connect(server.address) as client:
        experiment = client.create_experiment("e", **SETTINGS)
        watching = experiment.watch(interval_s=0.1)
        next(watching)
        server.kill()
        server.restart()
        assert next(watching).status.name == "e"


def test_watching_what_is_not_there_is_an_error(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    watching = experiment.watch(interval_s=0.1)
    next(watching)
    with pytest.raises(evosample.InvalidArgumentError, match=r"interval_ms=61000.*60,000"):
        next(experiment.watch(interval_s=61))
    client.delete_experiment(name)
    with pytest.raises(evosample.NotFoundError):
        next(watching)
