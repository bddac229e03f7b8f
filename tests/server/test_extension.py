"""Datasets that grow while they are trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import redis
from numpy.typing import NDArray

import evosample
from evosample.sampling import Groups, initial_scores, plan_epoch
from support import ServerProcess, columns_of, fixed_losses

N, MORE, NUM_EPOCHS = 400, 700, 6
SETTINGS: dict[str, Any] = {"num_samples": N, "num_epochs": NUM_EPOCHS, "meta_batch_size": 20, "mini_batch_size": 10}
LOSSES = fixed_losses(1_000, NUM_EPOCHS)


def train(
    experiment: evosample.Experiment,
    num_epochs: int = NUM_EPOCHS,
    before_step: Callable[[evosample.Batch], object] = lambda _: None,
    **place: Any,
) -> list[NDArray[np.int64]]:
    """The sample ids of each epoch."""
    epochs: list[NDArray[np.int64]] = []
    run = experiment.epochs(**place)
    progress = -1.0
    for epoch in run:
        batches = []
        for batch in epoch:
            before_step(batch)
            of_batch = LOSSES[batch.epoch, batch.sample_ids]
            batch.select(of_batch, **columns_of(experiment.spec.policy, of_batch))
            batches.append(batch.sample_ids)
            assert progress < batch.progress <= 1
            progress = batch.progress
        epochs.append(np.concatenate(batches))
        if len(epochs) == num_epochs:
            break
    run.close()
    return epochs


def extend_in(experiment: evosample.Experiment, epoch: int, num_samples: int) -> Callable[[evosample.Batch], object]:
    def extend(batch: evosample.Batch) -> None:
        if (batch.epoch, batch.step) == (epoch, 1):
            experiment.extend_dataset(num_samples)

    return extend


@pytest.mark.parametrize(
    "policy",
    [
        evosample.Uniform(),
        evosample.RandomSubset(),
        evosample.EvolvedSampling(prune_ratio=0.3),
        evosample.InfoBatch(),
        evosample.Kakurenbo(max_ratio=0.5),
        evosample.UCB(),
    ],
    ids=str,
)
def test_added_samples_are_visited_from_the_next_epoch_on(
    client: evosample.Client, name: str, policy: evosample.Policy
) -> None:
    experiment = client.create_experiment(name, policy=policy, **SETTINGS)
    epochs = train(experiment, before_step=extend_in(experiment, 1, MORE))
    assert all(ids.max() < N for ids in epochs[:2])
    share = 0.5 if isinstance(policy, evosample.RandomSubset) else 1.0
    if policy.keeps_unvisited or isinstance(policy, evosample.Uniform):
        assert len(set(epochs[2]) - set(range(N))) > 0.9 * (MORE - N) - 20
    assert all(ids.max() < MORE for ids in epochs[2:])
    assert len(set(np.concatenate(epochs)) - set(range(N))) > 0.9 * share * (MORE - N)
    assert len(epochs[-1]) > share * (1 - policy.prune_ratio) * 0.7 * MORE or policy.is_adaptive
    known = experiment.export_scores()
    assert len(known.scores) == MORE
    assert known.num_visits.tolist() == np.bincount(np.concatenate(epochs), minlength=MORE).tolist()
    status = experiment.status()
    assert (status.spec.num_samples, status.state) == (MORE, "finished")
    assert status.visited_rows == sum(map(len, epochs))
    assert [past.summary.num_rows for past in experiment.history()] == list(map(len, epochs))


def test_the_tables_are_those_of_the_formulas(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, policy=evosample.RandomSubset(prune_ratio=0.5), **SETTINGS)
    _, second = train(experiment, 2, extend_in(experiment, 0, MORE))
    spec = client.get_experiment(name).spec
    assert spec.num_samples == MORE
    assert second.tolist() == plan_epoch(spec, 1, initial_scores(MORE)).table.sample_ids.tolist()


def test_before_the_first_run_they_count_from_the_first_epoch(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, policy=evosample.Uniform(), **SETTINGS)
    experiment.extend_dataset(MORE)
    assert client.get_experiment(name).spec.num_samples == MORE
    (first,) = train(experiment, 1)
    assert set(first.tolist()) == set(range(MORE))


def test_a_run_that_goes_back_meets_the_dataset_as_it_was(client: evosample.Client, name: str) -> None:
    policy = evosample.EvolvedSampling(prune_ratio=0.3)
    experiment = client.create_experiment(name, policy=policy, **SETTINGS)

    def pin(batch: evosample.Batch) -> None:
        if batch.epoch == 1 and not batch.step:
            experiment.pin_epoch("before", 1)
        if (batch.epoch, batch.step) == (2, 1):
            experiment.extend_dataset(MORE)
        if (batch.epoch, batch.step) == (4, 1):
            experiment.extend_dataset(900)

    epochs = train(experiment, before_step=pin)
    assert epochs[2].max() < N <= epochs[3].max() < MORE <= epochs[5].max()
    assert len(experiment.export_scores(epoch=1).scores) == N
    again = train(experiment, position=(5, 0))
    assert [ids.tolist() for ids in again] == [ids.tolist() for ids in epochs[5:]]
    again = train(experiment, position=(1, 0))
    assert again[0].tolist() == epochs[1].tolist()
    assert again[1].max() >= MORE, "what was added is there at once"
    assert len(experiment.export_scores().scores) == 900


def test_jobs_may_be_started_with_the_old_size_or_a_new_one(client: evosample.Client, name: str) -> None:
    settings = SETTINGS | {"policy": evosample.RandomSubset(prune_ratio=0.2)}
    experiment = client.create_experiment(name, **settings)
    train(experiment, 2, extend_in(experiment, 1, MORE))
    assert experiment.num_samples == MORE
    for num_samples in (N, MORE):
        found = client.create_experiment(name, **settings | {"num_samples": num_samples})
        assert (found.uid, found.num_samples) == (experiment.uid, MORE)
    for num_samples in (399, 701):
        with pytest.raises(evosample.AlreadyExistsError, match="num_samples"):
            client.create_experiment(name, **settings | {"num_samples": num_samples})
    with pytest.raises(evosample.AlreadyExistsError, match="seed"):
        client.create_experiment(name, **settings | {"seed": 1})
    experiment.extend_dataset(900)
    experiment.extend_dataset(MORE)  # said late, or again
    assert client.create_experiment(name, **settings | {"num_samples": MORE}).num_samples == 900
    train(client.get_experiment(name))


def test_with_groups_they_count_once_theirs_are_said(client: evosample.Client, name: str) -> None:
    policy = evosample.RandomSubset(prune_ratio=0.5)
    groups = np.arange(MORE) % 3
    experiment = client.create_experiment(
        name, policy=policy, groups=groups[:N], group_floor=0.2, **SETTINGS | {"mini_batch_size": 20}
    )

    def change(batch: evosample.Batch) -> None:
        if (batch.epoch, batch.step) == (0, 1):
            experiment.extend_dataset(MORE)
        if (batch.epoch, batch.step) == (1, 1):
            with pytest.raises(evosample.InvalidArgumentError, match=r"shape \(700,\)"):
                experiment.set_groups(groups[:N])
            experiment.set_groups(groups)

    epochs = train(experiment, before_step=change)
    assert epochs[1].max() < N <= epochs[2].max()
    plan = plan_epoch(client.get_experiment(name).spec, 2, initial_scores(MORE), Groups(groups.astype(np.uint16)))
    assert len(plan.table.sample_ids) == len(epochs[2])
    last = experiment.history()[-1].summary.groups
    assert [group.num_samples for group in last] == np.bincount(groups).tolist()
    assert all(group.num_rows >= 0.2 * group.num_samples for group in last)


def test_groups_that_come_late_count_for_the_samples_that_they_are_of(client: evosample.Client, name: str) -> None:
    settings: dict[str, Any] = SETTINGS | {"policy": evosample.RandomSubset(prune_ratio=0.5), "mini_batch_size": 20}
    experiment = client.create_experiment(name, groups=np.zeros(N, int), mixture=evosample.Mixture(), **settings)

    def change(batch: evosample.Batch) -> None:
        if (batch.epoch, batch.step) == (0, 1):
            experiment.extend_dataset(MORE)
            experiment.set_groups(np.zeros(MORE, int))
            experiment.extend_dataset(900)
        if (batch.epoch, batch.step) == (2, 1):
            experiment.set_groups(np.zeros(900, int))

    epochs = train(experiment, before_step=change)
    assert [int(ids.max()) // 100 for ids in epochs] == [3, 6, 6, 8, 8, 8]
    other = client.create_experiment(f"{name}-other", groups=np.zeros(N, int), **settings)
    other.extend_dataset(MORE)
    again = client.create_experiment(f"{name}-other", groups=np.zeros(N, int), **settings)
    assert (again.num_samples, other.num_samples, other.spec.num_samples) == (MORE, MORE, N)
    other.set_groups(np.zeros(MORE, int))
    other.import_scores(np.ones(other.status().spec.num_samples))
    assert set(train(other, 1)[0].tolist()) <= set(range(MORE))


def test_shards_are_added_as_shards(client: evosample.Client, name: str) -> None:
    settings = SETTINGS | {"shard_sizes": [100] * 4, "policy": evosample.Uniform()}
    experiment = client.create_experiment(name, **settings)
    with pytest.raises(evosample.InvalidArgumentError, match="shard_sizes"):
        experiment.extend_dataset(MORE)
    experiment.extend_dataset(MORE, shard_sizes=[150, 150])
    experiment.extend_dataset(MORE, shard_sizes=[150, 150])
    (ids,) = train(experiment, 1)
    assert set(ids.tolist()) == set(range(MORE))
    assert client.get_experiment(name).spec.shard_sizes == (100, 100, 100, 100, 150, 150)
    again = client.create_experiment(name, **settings | {"num_samples": MORE, "shard_sizes": [100] * 4 + [150] * 2})
    assert again.uid == experiment.uid


def test_what_can_t_be_is_refused(start_server: Callable[..., ServerProcess], name: str) -> None:
    server = start_server("--max-samples", "1000", "--max-project-samples", "1200")
    with evosample.connect(server.address) as client:
        experiment = client.create_experiment("e", policy=evosample.Uniform(), **SETTINGS)
        client.create_experiment("other", policy=evosample.Uniform(), **SETTINGS)
        experiment.extend_dataset(MORE)
        for num_samples, error, said in [
            (N - 1, evosample.InvalidArgumentError, "num_samples=399: expected an integer from 400"),
            (1_001, evosample.ResourceExhaustedError, "takes at most 1,000"),
            (900, evosample.ResourceExhaustedError, "of 1,200 that this server takes"),
            (0, evosample.InvalidArgumentError, "num_samples=0"),
        ]:
            with pytest.raises(error, match=said):
                experiment.extend_dataset(num_samples)
        experiment.extend_dataset(MORE)
        with pytest.raises(evosample.InvalidArgumentError, match="shard_sizes"):
            experiment.extend_dataset(750, shard_sizes=[50])
        train(experiment)
        experiment.export_scores()
        with pytest.raises(evosample.FailedPreconditionError, match="in its last epoch, or has finished"):
            experiment.extend_dataset(750)


def test_a_server_that_is_killed_and_a_dataset_that_is_deleted_leave_no_trace(
    start_server: Callable[..., ServerProcess],
) -> None:
    server = start_server()
    with evosample.connect(server.address) as client, redis.Redis(unix_socket_path=server.store_socket) as store:
        before = set(store.keys())
        experiment = client.create_experiment("e", policy=evosample.EvolvedSampling(prune_ratio=0.3), **SETTINGS)
        train(experiment, 3, extend_in(experiment, 0, 1_000))
        train(experiment, 1, position=(2, 0))
        client.delete_experiment("e")
        assert not [key for key in set(store.keys()) - before if b":e" in key]
