"""A store that loses its last acknowledged writes: living clients send again what was lost."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

import evosample
from evosample.wire import ExperimentName
from evosample_server import keys
from faults.harness import SETTINGS, Outcome, ReplicatedServer, disturbing, exported, lose_last_writes, run_job
from stores import ClusterStore, StandaloneStore, StoreProcess
from support import fixed_losses

Undisturbed = Callable[..., Outcome]
StartReplica = Callable[..., ReplicatedServer]


@pytest.mark.parametrize("seed", range(3))
def test_a_cluster_whose_primary_fails_over_and_loses_its_last_writes_costs_nothing(
    undisturbed: Undisturbed, tmp_path: Path, seed: int
) -> None:
    head = keys.head(ExperimentName("default", "job"))
    cluster = ClusterStore(tmp_path / "cluster", replica_for=head)
    servers = [ReplicatedServer(tmp_path / f"server{number}", cluster.url) for number in range(2)]
    num_lost_writes = []

    def fail_over(rng: random.Random, stopping: threading.Event) -> None:
        for _ in range(2):
            stopping.wait(rng.uniform(0.5, 1.5))
            primary = cluster.node_of(head)
            cluster.cut_replication(head)
            before = written(primary)
            stopping.wait(rng.uniform(0.2, 2))  # up to three epochs are lost
            while written(primary) == before and not stopping.is_set():  # the job may be mending the loss before
                time.sleep(0.01)
            num_lost_writes.append(written(primary) - before)
            primary.kill()
            cluster.wait_for_promotion(primary, head)
            primary.restart()
            cluster.wait_until_ok()

    def written(process: Any) -> int:
        return int(process.call("INFO", "replication")["master_repl_offset"])

    try:
        with disturbing(fail_over, seed):
            job = run_job([server.address for server in servers], "job", pace_s=0.03)
        assert job == undisturbed()
        assert len(num_lost_writes) == 2
        assert min(num_lost_writes) > 0
    finally:
        for server in servers:
            server.stop()
        cluster.close()


@pytest.mark.parametrize("seed", range(2))
def test_a_power_cut_that_costs_the_log_its_last_seconds_costs_nothing_while_clients_live(
    undisturbed: Undisturbed, start_replica: StartReplica, store: StandaloneStore, seed: int
) -> None:
    """What the fsync policy decides: killing the store loses nothing that was acknowledged, for the system keeps what
    was written (test_kills.py). A power cut loses what `appendfsync everysec` had not forced to the disk: one second,
    or two while the disk is slow. Here the file is cut back by up to two seconds.
    """
    server = start_replica()
    num_lost_bytes = []

    def cut_power(rng: random.Random, stopping: threading.Event) -> None:
        for _ in range(3):
            stopping.wait(rng.uniform(0.3, 1))
            num_lost_bytes.append(lose_last_writes(store, rng.uniform(0.2, 2), stopping))

    with disturbing(cut_power, seed) as is_over:
        assert run_job(server.address, "job", pace_s=0.05, last_epoch_after=is_over) == undisturbed()
    assert len(num_lost_bytes) == 3
    assert min(num_lost_bytes) > 0


def test_what_nobody_can_send_again_is_told_and_not_guessed(
    start_replica: StartReplica, store: StandaloneStore
) -> None:
    """Rank 1 dies after its epoch, the store loses that epoch's losses: then rank 0's rows are no longer the plan's."""
    server = start_replica()
    losses = fixed_losses(SETTINGS["num_samples"], SETTINGS["num_epochs"])
    (log,) = store.folder.glob("appendonlydir/*.incr.aof")

    def begin(client: evosample.Client, rank: int) -> evosample.Run:
        return client.create_experiment("job", **SETTINGS).epochs(
            rank=rank, world_size=2, run_id="job", straggler_timeout_s=3, wait_timeout_s=60
        )

    with evosample.connect(server.address) as here:
        lost = evosample.connect(server.address)
        runs = [begin(here, 0), begin(lost, 1)]
        epochs = [next(run) for run in runs]
        synced_bytes = log.stat().st_size
        for epoch in epochs:
            for batch in epoch:
                batch.select(losses[batch.epoch, batch.sample_ids])
        batches = iter(next(runs[0]))
        next(batches).select(losses[1, :20])
        runs[1]._closing.set()  # as if its process had been killed: nothing more comes from it
        store.kill()
        with log.open("r+b") as file:
            file.truncate(synced_bytes)
        store.start()

        def go_on() -> None:
            for batch in batches:
                batch.select(losses[1, :20])
                runs[0].flush()

        with pytest.raises(evosample.DataLossError, match="planned epoch 1 anew with other rows"):
            go_on()
        lost.close()


def test_what_was_committed_is_on_a_replica_before_anybody_learns_of_it(tmp_path: Path) -> None:
    """The job has ended: nobody is left to send anything again when the primary dies at once."""
    head = keys.head(ExperimentName("default", "job"))
    cluster = ClusterStore(tmp_path / "cluster", replica_for=head)
    server = ReplicatedServer(tmp_path / "server", cluster.url)
    try:
        replica = cluster.replica_of(head)
        seen = []

        def see_replica(batch: evosample.Batch) -> None:
            if batch.step == 0 and batch.epoch:
                seen.append(int(field(replica, head, "epoch")) >= batch.epoch)

        def field(process: StoreProcess, key: str, name: str) -> bytes:
            with process.client() as client:
                client.execute_command("READONLY")
                return cast(bytes, client.hget(key, name))

        job = run_job(server.address, "job", before_step=see_replica)
        primary = cluster.node_of(head)
        primary.kill()
        cluster.wait_for_promotion(primary, head)
        assert seen == [True] * 10
        with evosample.connect(server.address) as client:
            experiment = client.get_experiment("job")
            assert experiment.status().state == "finished"
            assert exported(experiment) == job.scores
    finally:
        server.stop()
        cluster.close()
