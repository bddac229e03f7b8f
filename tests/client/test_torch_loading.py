"""How the loader gets samples: what can't be loaded, workers of every kind, what is to come."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

import evosample
import evosample.torch
from evosample.torch import Loader
from samples import Announced, Ids, refuse_connections
from support import ServerProcess, fixed_losses, train

N, EPOCHS, B, MINI = 96, 4, 16, 4
STEPS = N // B
SETTINGS: dict[str, Any] = {"num_samples": N, "num_epochs": EPOCHS, "meta_batch_size": B, "mini_batch_size": MINI}
LOSSES = fixed_losses(N, 1)[0]

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def loss_of(ids: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(LOSSES)[ids]


def loader_of(experiment: evosample.Experiment, dataset: Dataset[Any], **options: Any) -> Loader:
    return Loader(dataset, experiment, model=torch.nn.Linear(1, 1), score=loss_of, **options)


def go_through(loader: Loader) -> list[list[int]]:
    """The rest of the run: the ids of every micro-batch."""
    batches = []
    for _ in range(loader.position.epoch, EPOCHS):
        for ids in loader:
            batches.append(ids.tolist())
            loader.mean(loss_of(ids))
    return batches


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_step_goes_on_without_samples_that_cannot_be_loaded(
    client: evosample.Client, name: str, num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    lost = tuple(range(0, N, 3))
    experiment, twin = (client.create_experiment(f"{name}{suffix}", **SETTINGS) for suffix in ("", "-twin"))
    loader = loader_of(experiment, Ids(N, lost), num_workers=num_workers)
    with caplog.at_level(logging.WARNING, "evosample"):
        batches = go_through(loader)
    assert not set(lost) & {sample for batch in batches for sample in batch}
    assert loader.figures.num_not_loaded == len(lost)
    assert "can't be loaded, such as" in caplog.text
    # The same as if their losses were not finite: there are no scores for them, and what is chosen is among the others.
    losses = LOSSES.copy()
    losses[list(lost)] = np.nan
    visits = train(twin, np.broadcast_to(losses, (EPOCHS, N)))
    assert batches == [
        [sample for sample in visit.sample_ids[visit.positions].tolist() if sample not in lost] for visit in visits
    ]
    np.testing.assert_array_equal(experiment.export_scores().scores, twin.export_scores().scores)
    assert not experiment.export_scores().num_visits[list(lost)].any()


def test_a_step_without_some_samples_has_as_many_micro_batches_as_every_other(
    client: evosample.Client, name: str
) -> None:
    """Else the ranks of a job would wait for each other."""
    passes: list[int] = []

    def score(ids: torch.Tensor) -> torch.Tensor:
        passes.append(len(ids))
        return loss_of(ids)

    experiment = client.create_experiment(name, **SETTINGS)
    loader = Loader(
        Ids(N, tuple(range(0, N, 4))), experiment, model=torch.nn.Linear(1, 1), score=score, micro_batch_size=MINI
    )
    batches = go_through(loader)
    assert len(batches) == STEPS * (2 * B // MINI + 2)  # annealing epochs, and those that select
    assert len(passes) == 2 * STEPS * (B // MINI)


def test_where_there_are_more_micro_batches_than_samples_some_repeat_one_and_count_for_nothing(
    client: evosample.Client, name: str
) -> None:
    experiment, twin = (client.create_experiment(f"{name}{suffix}", **SETTINGS) for suffix in ("", "-twin"))
    lost = tuple(range(0, N, 3))
    losses = LOSSES.copy()
    losses[list(lost)] = np.nan
    visits = train(twin, np.broadcast_to(losses, (EPOCHS, N)))
    passes: list[int] = []

    def score(ids: torch.Tensor) -> torch.Tensor:
        passes.append(len(ids))
        return loss_of(ids)

    loader = Loader(Ids(N, lost), experiment, model=torch.nn.Linear(1, 1), score=score, micro_batch_size=1)
    means: list[float] = []
    num_batches = 0
    for _ in range(EPOCHS):
        for ids in loader:
            num_batches += 1
            assert len(ids) == 1
            mean = float(loader.mean(loss_of(ids)))
            means.append(mean)
            if loader.ends_step:
                trained = losses[visits[0].sample_ids[visits[0].positions]]
                np.testing.assert_allclose(sum(means), np.nanmean(trained), rtol=1e-5)
                means.clear()
                visits.pop(0)
    assert num_batches == 2 * STEPS * (B + MINI)
    assert passes == [1] * (2 * STEPS * B)
    np.testing.assert_array_equal(experiment.export_scores().scores, twin.export_scores().scores)


def test_importance_weights_stay_with_their_samples_when_others_are_missing(
    client: evosample.Client, name: str
) -> None:
    settings = SETTINGS | {"importance_weight": "unbiased", "mini_batch_size": 8}
    experiment, twin = (client.create_experiment(f"{name}{suffix}", **settings) for suffix in ("", "-twin"))
    lost = tuple(range(0, N, 4))
    losses = LOSSES.copy()
    losses[list(lost)] = np.nan
    expected = [
        (visit.importance_weights * losses[visit.sample_ids[visit.positions]])[
            ~np.isin(visit.sample_ids[visit.positions], lost)
        ].mean()
        for visit in train(twin, np.broadcast_to(losses, (EPOCHS, N)))
    ]
    loader = loader_of(experiment, Ids(N, lost))
    means = [float(loader.mean(loss_of(ids))) for _ in range(EPOCHS) for ids in loader]
    np.testing.assert_allclose(means, expected, rtol=1e-5)
    assert 0.2 < (loader.figures.effective_sample_share or 0) <= 1


def test_a_step_of_which_nothing_can_be_loaded_is_an_error(client: evosample.Client, name: str) -> None:
    loader = loader_of(client.create_experiment(name, **SETTINGS), Ids(N, tuple(range(N))))
    with pytest.raises(evosample.DataLossError, match="none of the 16 samples"):
        next(iter(loader))


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.parametrize("persistent_workers", [False, True])
def test_workers_of_every_start_method_load_the_same_and_know_nothing_of_the_server(
    client: evosample.Client, name: str, method: str, persistent_workers: bool
) -> None:
    experiment, twin = (client.create_experiment(f"{name}{suffix}", **SETTINGS) for suffix in ("", "-twin"))
    options = {"num_workers": 2, "multiprocessing_context": method, "persistent_workers": persistent_workers}
    batches = go_through(loader_of(experiment, Ids(N), worker_init_fn=refuse_connections, **options))
    assert batches == go_through(loader_of(twin, Ids(N)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_exception_in_a_worker_ends_the_epoch_and_keeps_what_was_reported(
    client: evosample.Client, name: str, method: str
) -> None:
    experiment, twin = (client.create_experiment(f"{name}{suffix}", **SETTINGS) for suffix in ("", "-twin"))
    visits = train(twin, np.broadcast_to(LOSSES, (EPOCHS, N)))
    damaged = int(visits[STEPS + 3].sample_ids[0])
    dataset = Ids(N, damaged=(damaged,))
    dataset_epoch_0 = loader_of(experiment, Ids(N))
    for ids in dataset_epoch_0:
        dataset_epoch_0.mean(loss_of(ids))
    loader = loader_of(experiment, dataset, num_workers=2, multiprocessing_context=method)
    loader.load_state_dict(dataset_epoch_0.state_dict())
    with pytest.raises(OSError, match=f"sample {damaged} is damaged"):
        go_through(loader)
    assert loader.position == (1, 3)
    loader.state_dict()  # everything is reported
    status = experiment.status()
    assert (status.epoch, status.state) == (1, "open")
    rest = loader_of(experiment, Ids(N))
    rest.load_state_dict(loader.state_dict())
    go_through(rest)
    np.testing.assert_array_equal(experiment.export_scores().scores, twin.export_scores().scores)
    assert experiment.status().unreported_rows == 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_dataset_that_prefetches_is_told_what_comes_in_time_and_once(
    client: evosample.Client, name: str, num_workers: int
) -> None:
    experiment = client.create_experiment(name, **SETTINGS | {"mini_batch_size": B, "policy": evosample.Uniform()})
    dataset = Announced(N, 3 * B + 1)
    loader = loader_of(experiment, dataset, num_workers=num_workers)
    for _ in range(EPOCHS):
        dataset.announced.clear()
        seen: list[int] = []
        for step, ids in enumerate(loader):
            seen += ids.tolist()
            # Announced are the 3 steps of prefetch_samples; workers take some steps ahead of that.
            assert len(dataset.announced) >= (min(step + 3, STEPS - 1)) * B
            if not num_workers:
                assert len(dataset.announced) == min(step + 3, STEPS - 1) * B
            loader.mean(loss_of(ids))
        assert dataset.announced == seen[B:]  # the first step is taken at once


def test_how_far_ahead_is_announced_counts_the_samples_of_all_processes(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS | {"mini_batch_size": B, "policy": evosample.Uniform()})
    dataset = Announced(N, 3 * B)
    place: dict[str, Any] = {"data_parallel_rank": 0, "data_parallel_size": 4, "run_id": "job"}
    batches = iter(loader_of(experiment, dataset, num_workers=0, **place))
    next(batches)
    assert dataset.num_ahead == 3 * B // 4
    assert len(dataset.announced) == 3 * B // 4


def test_the_epoch_of_the_last_position_that_was_asked_for_is_kept(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS | {"num_epochs": 8})
    loader = loader_of(experiment, Ids(N))
    states = {}
    for epoch in range(8):
        for ids in loader:
            loader.mean(loss_of(ids))
            if loader.position in ((1, 2), (4, 0)):
                states[epoch] = loader.state_dict()
    assert 1 not in experiment.status().retained_epochs
    assert experiment.status().pins == {"checkpoint": 4}
    loader.load_state_dict(states[3])
    next(iter(loader))
    assert loader.position == (4, 0)
    loader.load_state_dict(states[1])
    with pytest.raises(evosample.EpochNotRetainedError):
        next(iter(loader))


def test_an_epoch_says_where_its_time_went_and_what_selection_saved(
    client: evosample.Client, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    loader = loader_of(experiment, Ids(N), predict_saving=True)
    with caplog.at_level(logging.INFO, "evosample"):
        for epoch in range(EPOCHS):
            for ids in loader:
                loader.mean(loss_of(ids))
            figures = loader.figures
            assert (figures.epoch, figures.num_steps) == (epoch, STEPS)
            assert 0 < figures.loading_s + figures.scoring_s < figures.seconds
            assert (figures.scoring_s > 0) == (epoch in (1, 2))
            assert (figures.predicted_saving is not None) == (epoch in (1, 2))
            assert (figures.realised_saving is not None) == (epoch in (1, 2))
            assert f"epoch {epoch}: 6 steps in" in caplog.text
    assert "of the time saved (predicted:" in caplog.text


def test_a_score_may_take_its_batch_apart(client: evosample.Client, name: str) -> None:
    def score(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return loss_of(batch.pop("ids"))

    experiment = client.create_experiment(name, **SETTINGS)
    loader = Loader(
        Ids(N),
        experiment,
        model=torch.nn.Linear(1, 1),
        score=score,
        collate_fn=lambda ids: {"ids": torch.tensor(ids)},
        predict_saving=True,
    )
    for _ in range(EPOCHS):
        for batch in loader:
            loader.mean(loss_of(batch["ids"]))


def test_meta_batches_that_nobody_trained_on_are_an_error_at_the_next_epoch(
    client: evosample.Client, name: str
) -> None:
    loader = loader_of(client.create_experiment(name, **SETTINGS), Ids(N))
    assert len(list(loader.meta_batches())) == STEPS
    with pytest.raises(evosample.UsageError, match="the losses of step 0 of epoch 0 were not handed over"):
        next(loader.meta_batches())


def test_figures_may_be_looked_at_in_the_middle(client: evosample.Client, name: str) -> None:
    loader = loader_of(client.create_experiment(name, **SETTINGS), Ids(N))
    for step, ids in enumerate(loader):
        loader.mean(loss_of(ids))
        assert f"{step + 1} steps" in str(loader.figures)
        assert (loader.figures.seconds > 0) == (step > 0)


class Seeds(Ids):
    """Samples whose second half is what a worker's random state is."""

    def __getitem__(self, sample_id: int) -> tuple[int, int]:  # type: ignore[override]
        return sample_id, torch.initial_seed()


def test_workers_have_random_numbers_of_their_own_on_every_rank(client: evosample.Client, name: str) -> None:
    client.create_experiment(name, **SETTINGS)
    seeds = set()
    for rank in range(2):
        loader = Loader(
            Seeds(N),
            client.get_experiment(name),
            model=torch.nn.Linear(1, 1),
            score=lambda batch: loss_of(batch[0]),
            num_workers=1,
            data_parallel_rank=rank,
            data_parallel_size=2,
            run_id="run",
        )
        seeds.add(int(next(iter(loader))[1][0]))
    assert len(seeds) == 2


def test_predicting_the_saving_changes_nothing_else(client: evosample.Client, name: str) -> None:
    experiment, twin = (client.create_experiment(f"{name}{suffix}", **SETTINGS) for suffix in ("", "-twin"))
    assert go_through(loader_of(experiment, Ids(N), predict_saving=True)) == go_through(loader_of(twin, Ids(N)))
    np.testing.assert_array_equal(experiment.export_scores().scores, twin.export_scores().scores)


def test_meta_batches_may_be_taken_ahead_and_scored_when_their_turn_comes(client: evosample.Client, name: str) -> None:
    experiment, twin = (client.create_experiment(f"{name}{suffix}", **SETTINGS) for suffix in ("", "-twin"))
    loader = loader_of(experiment, Ids(N))

    def ahead() -> Iterator[evosample.torch.MetaBatch]:
        meta_batches = loader.meta_batches()
        waiting = [next(meta_batches)]
        for meta_batch in meta_batches:
            waiting.append(meta_batch)
            yield waiting.pop(0)
        yield from waiting

    batches = []
    for _ in range(EPOCHS):
        for meta_batch in ahead():
            assert meta_batch.step == loader.position
            for ids in loader.micro_batches(meta_batch.to("cpu")):
                batches.append(ids.tolist())
                loader.mean(loss_of(ids))
    assert batches == go_through(loader_of(twin, Ids(N)))


def test_forked_workers_leave_grpc_alone(server: ServerProcess) -> None:
    """Its fork handlers, where they are on, write about it, and now and then crash or hang a worker."""
    script = Path(__file__).parents[1] / "forked_job.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, server.address], capture_output=True, text=True, timeout=120
    )
    assert done.stderr == ""
    assert done.returncode == 0
    refused, *found = done.stdout.splitlines()
    assert refused.startswith("refused this process was forked from one that has used evosample")
    assert found == ["found 0", "found 0"]


class Ending(Ids):
    """Has less to give than it says."""

    def __getitem__(self, sample_id: int) -> int | None:
        if sample_id % 10 == 0:
            raise StopIteration
        return super().__getitem__(sample_id)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_dataset_that_ends_too_soon_is_told(client: evosample.Client, name: str, num_workers: int) -> None:
    loader = loader_of(client.create_experiment(name, **SETTINGS), Ending(N), num_workers=num_workers)
    with pytest.raises((evosample.UsageError, RuntimeError), match="StopIteration"):
        go_through(loader)


def test_a_position_is_that_of_a_dataset(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    dataset = Ids(N)
    dataset.fingerprint = "one"  # type: ignore[attr-defined]
    state = loader_of(experiment, dataset).state_dict()
    loader_of(experiment, dataset).load_state_dict(state)
    dataset.fingerprint = "another"  # type: ignore[attr-defined]
    with pytest.raises(evosample.InvalidArgumentError, match="another dataset"):
        loader_of(experiment, dataset).load_state_dict(state)


def test_processes_that_do_not_know_of_each_other_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(evosample.UsageError, match=r"2 processes were launched.*init_process_group"):
        evosample.torch.connect()


def test_what_is_no_experiment_is_told() -> None:
    name: Any = "mnist"
    with pytest.raises(evosample.InvalidArgumentError, match=r"experiment='mnist': expected what client.create_exp"):
        loader_of(name, Ids(N))
