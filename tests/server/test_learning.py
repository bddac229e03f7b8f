"""What the server learns and streams, held against plain loops over the design's formulas."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import evosample
from support import ServerProcess, Visit, fixed_losses, train

N, EPOCHS = 500, 5


def create(client: evosample.Client, name: str, **changes: Any) -> evosample.Experiment:
    settings: dict[str, Any] = {"num_samples": N, "num_epochs": EPOCHS, "meta_batch_size": 48, "mini_batch_size": 12}
    return client.create_experiment(name, **(settings | changes))


def train_with_ranks(
    client: evosample.Client, experiment: evosample.Experiment, losses: NDArray[np.float32], world_size: int
) -> list[Visit]:
    """Train in one thread a rank; returns the visits in the order of (epoch, step, rank)."""
    with ThreadPoolExecutor(world_size) as ranks:
        jobs = [
            ranks.submit(
                train,
                client.get_experiment(experiment.name),
                losses,
                rank=rank,
                world_size=world_size,
                run_id="the-run",
            )
            for rank in range(world_size)
        ]
        visits = [visit for job in jobs for visit in job.result()]
    return sorted(visits, key=lambda visit: (visit.epoch, visit.step, visit.rank))


def plain_scores(visits: list[Visit], beta1: float, beta2: float) -> tuple[list[float], list[float]]:
    """Design section 1, one sample at a time."""
    s, w = [1 / N] * N, [1 / N] * N
    visited = set()
    for visit in visits:
        for sample, loss in zip(visit.sample_ids.tolist(), visit.losses.tolist(), strict=True):
            if np.isfinite(loss):
                w[sample] = beta1 * s[sample] + (1 - beta1) * loss
                s[sample] = beta2 * s[sample] + (1 - beta2) * loss
                visited.add(sample)
    mean = sum(w[sample] for sample in visited) / len(visited)
    return s, [w[sample] if sample in visited else mean for sample in range(N)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("meta_batch_size", "prune_ratio"), [(48, 0.0), (48, 0.4), (12, None), (12, 0.4)])
def test_scores_equal_a_plain_loop_over_the_formulas(
    client: evosample.Client, name: str, world_size: int, meta_batch_size: int, prune_ratio: float
) -> None:
    policy = evosample.EvolvedSampling(prune_ratio=prune_ratio)
    experiment = create(client, name, policy=policy, meta_batch_size=meta_batch_size)
    losses = fixed_losses(N, EPOCHS)
    losses[0, 100:150] = np.nan  # these get their first loss late, as do those that the first epoch drops
    visits = train_with_ranks(client, experiment, losses, world_size)
    s, w = plain_scores(visits, 0.2, experiment.spec.policy.beta2)
    exported = experiment.export_scores()
    np.testing.assert_allclose(exported.scores, s, rtol=1e-6)
    np.testing.assert_allclose(exported.sampling_weights, w, rtol=1e-6)
    visited = [i for v in visits for i, loss in zip(v.sample_ids.tolist(), v.losses, strict=True) if np.isfinite(loss)]
    np.testing.assert_array_equal(exported.num_visits, np.bincount(visited, minlength=N))
    assert (exported.num_visits > 0).all() == experiment.spec.selects, "what no step scores may have had no loss yet"


@pytest.mark.parametrize("policy", [evosample.Uniform(), evosample.RandomSubset(prune_ratio=0.2)])
def test_policies_without_scoring_train_on_all_that_they_load_and_keep_scores(
    client: evosample.Client, name: str, policy: evosample.Policy
) -> None:
    visits = train(experiment := create(client, name, policy=policy), fixed_losses(N, EPOCHS))
    assert {len(visit.sample_ids) for visit in visits} == {len(visit.positions) for visit in visits} == {12}
    np.testing.assert_allclose(experiment.export_scores().scores, plain_scores(visits, 0.2, 0.9)[0], rtol=1e-6)


def test_loss_based_sampling_is_es_without_memory(client: evosample.Client, name: str) -> None:
    policy = evosample.EvolvedSampling(beta1=0, beta2=0)
    visits = train(experiment := create(client, name, policy=policy), fixed_losses(N, EPOCHS))
    last = {i: x for v in visits for i, x in zip(v.sample_ids.tolist(), v.losses.tolist(), strict=True)}
    exported = experiment.export_scores()
    assert exported.scores.tolist() == exported.sampling_weights.tolist() == [last[i] for i in range(N)]


def test_an_annealing_epoch_trains_on_everything_and_a_selecting_one_on_a_share(
    client: evosample.Client, name: str
) -> None:
    visits = train(create(client, name, policy=evosample.EvolvedSampling(prune_ratio=0.4)), fixed_losses(N, EPOCHS))
    steps = [sum(visit.epoch == epoch for visit in visits) for epoch in range(EPOCHS)]
    assert steps == [10, 6, 6, 6, 10]
    assert [{len(v.positions) for v in visits if v.epoch == e} for e in range(EPOCHS)] == [{48}, {12}, {12}, {12}, {48}]


def test_the_same_seed_gives_the_same_ids_and_choices_on_any_server(
    client: evosample.Client, name: str, start_server: Any
) -> None:
    settings: dict[str, Any] = {"policy": evosample.EvolvedSampling(prune_ratio=0.2), "importance_weight": "unbiased"}
    losses = fixed_losses(N, EPOCHS)
    first = [visit.key() for visit in train(create(client, name, **settings, seed=1), losses)]
    again = [visit.key() for visit in train(create(client, f"{name}-again", **settings, seed=1), losses)]
    with evosample.connect(start_server().address) as elsewhere:
        other = [visit.key() for visit in train(create(elsewhere, name, **settings, seed=1), losses)]
    assert first == again == other
    assert first != [visit.key() for visit in train(create(client, f"{name}-seed", **settings, seed=2), losses)]


def test_with_another_world_size_the_ids_of_every_global_batch_are_the_same(
    client: evosample.Client, name: str
) -> None:
    losses = fixed_losses(N, EPOCHS)
    runs = []
    for world_size in (1, 2, 3):
        policy = evosample.EvolvedSampling(prune_ratio=0.2)
        experiment = create(client, f"{name}-{world_size}", policy=policy)
        global_batches: dict[tuple[int, int], list[int]] = {}
        for visit in train_with_ranks(client, experiment, losses, world_size):
            global_batches.setdefault((visit.epoch, visit.step), []).extend(visit.sample_ids.tolist())
            assert len(visit.sample_ids) == 48 // world_size
        runs.append(global_batches)
    assert runs[0] == runs[1] == runs[2]


def test_an_experiment_with_shards_is_shuffled_by_shard(client: evosample.Client, name: str) -> None:
    experiment = create(client, name, shard_sizes=[N // 20] * 20, shuffle_block_samples=N // 4)
    assert client.get_experiment(name).spec == experiment.spec
    visits = train(experiment, fixed_losses(N, EPOCHS))
    for epoch in range(EPOCHS):
        ids = np.concatenate([visit.sample_ids for visit in visits if visit.epoch == epoch])
        for block in np.array_split(ids, 4):
            assert len(set(block // (N // 20))) <= 10, "a quarter of the epoch meets two blocks of five shards"
        assert len(set(ids // (N // 20))) == 20


def test_every_kept_sample_is_visited_at_most_once_an_epoch(client: evosample.Client, name: str) -> None:
    visits = train(create(client, name, policy=evosample.EvolvedSampling(prune_ratio=0.3)), fixed_losses(N, EPOCHS))
    for epoch in range(EPOCHS):
        ids = np.concatenate([visit.sample_ids for visit in visits if visit.epoch == epoch])
        assert len(set(ids.tolist())) == len(ids)


def test_non_finite_losses_count_as_not_visited_and_are_counted(client: evosample.Client, name: str) -> None:
    experiment = create(client, name)
    losses = fixed_losses(N, EPOCHS)
    losses[:, 7] = np.nan
    losses[:, 8] = np.inf
    losses[:, 9] = -np.inf
    visits = train(experiment, losses)
    met = sum(int(np.isin(visit.sample_ids, [7, 8, 9]).sum()) for visit in visits)
    status = experiment.status()
    assert status.non_finite_rows == met > 0
    assert status.unreported_rows == 0
    assert status.visited_rows == sum(len(visit.sample_ids) for visit in visits) - met
    exported = experiment.export_scores()
    assert exported.num_visits[[7, 8, 9]].tolist() == [0, 0, 0]
    assert np.isfinite(exported.scores).all()


def test_a_killed_server_costs_nothing(client: evosample.Client, name: str, start_server: Any) -> None:
    settings: dict[str, Any] = {"policy": evosample.EvolvedSampling(prune_ratio=0.2)}
    losses = fixed_losses(N, EPOCHS)
    undisturbed = create(client, name, **settings)
    expected = [visit.key() for visit in train(undisturbed, losses)]
    server: ServerProcess = start_server()

    def kill_now_and_then(batch: evosample.Batch) -> None:
        if (batch.epoch, batch.step) in {(0, 4), (1, 0), (2, 7), (4, 9)}:
            server.kill()
            server.restart()

    with evosample.connect(server.address) as disturbed_client:
        disturbed = create(disturbed_client, name, **settings)
        assert [visit.key() for visit in train(disturbed, losses, before_step=kill_now_and_then)] == expected
        for ours, theirs in zip(disturbed.export_scores(), undisturbed.export_scores(), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert disturbed.status().unreported_rows == 0


def test_a_job_resumed_at_a_position_goes_on_as_if_nothing_had_happened(client: evosample.Client, name: str) -> None:
    settings: dict[str, Any] = {"policy": evosample.EvolvedSampling(prune_ratio=0.2)}
    losses = fixed_losses(N, EPOCHS)
    undisturbed = create(client, name, **settings)
    expected = [visit.key() for visit in train(undisturbed, losses)]
    experiment = create(client, f"{name}-resumed", **settings)
    before = []
    run = experiment.epochs()
    for epoch in run:
        for batch in epoch:
            chosen = batch.select(losses[batch.epoch, batch.sample_ids])
            before.append(Visit(0, batch, chosen, losses[batch.epoch, batch.sample_ids]).key())
            if (batch.epoch, batch.step) == (2, 3):
                run.flush()
                position = run.position
            if (batch.epoch, batch.step) == (3, 1):  # goes on past the checkpoint, into the next epoch, and dies
                break
        else:
            continue
        break
    run.close()
    assert position == (2, 4)
    after = [visit.key() for visit in train(experiment, losses, position=position)]
    assert before[: len(expected) - len(after)] + after == expected
    for ours, theirs in zip(experiment.export_scores(), undisturbed.export_scores(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("world_size", [1, 2])
def test_columns_of_several_blocks_are_learned_from_in_full(
    client: evosample.Client, name: str, world_size: int
) -> None:
    n, big = 600_000, 65_536  # three blocks; with one rank its losses take three blocks, too
    policy = evosample.EvolvedSampling(prune_ratio=0.1, annealing=0)
    experiment = client.create_experiment(
        name, num_samples=n, num_epochs=2, meta_batch_size=big, mini_batch_size=big // 4, policy=policy
    )
    losses = fixed_losses(n, 2)
    visits = train_with_ranks(client, experiment, losses, world_size)
    s, w = np.full(n, 1 / n), np.full(n, 1 / n)
    for epoch in range(2):
        ids = np.concatenate([visit.sample_ids for visit in visits if visit.epoch == epoch])
        assert len(np.unique(ids)) == len(ids) == experiment.num_steps(epoch) * big
        w[ids] = 0.2 * s[ids] + 0.8 * losses[epoch, ids]
        s[ids] = 0.8 * s[ids] + 0.2 * losses[epoch, ids]
    exported = experiment.export_scores()
    visited = exported.num_visits > 0
    assert visited.mean() > 0.98
    w[~visited] = w[visited].mean()
    np.testing.assert_allclose(exported.scores, s, rtol=1e-6)
    np.testing.assert_allclose(exported.sampling_weights, w, rtol=1e-6)
    client.delete_experiment(name)


def test_an_epoch_says_how_many_of_its_samples_the_one_before_had_left_out(client: evosample.Client, name: str) -> None:
    experiment = create(client, name, policy=evosample.EvolvedSampling(prune_ratio=0.4))
    before: set[int] = set()
    shares = []
    for epoch in experiment.epochs():
        ids = set()
        for batch in epoch:
            ids.update(batch.sample_ids.tolist())
            batch.report(np.ones(len(batch.sample_ids), np.float32))
        assert epoch.new_share == (len(ids - before) / len(ids) if epoch.number else None)
        shares.append(epoch.new_share or 0)
        before = ids
    assert min(shares[2:-1]) > 0.2
