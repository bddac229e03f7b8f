"""Whatever process is killed, the stream of ids, the choices and the scores are those of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from faults.harness import LARGE, Outcome, ReplicatedServer, Turns, disturbing, run_job
from stores import StandaloneStore

Undisturbed = Callable[..., Outcome]
StartReplica = Callable[..., ReplicatedServer]


@pytest.mark.parametrize("seed", range(5))
def test_servers_killed_at_random_moments_cost_nothing(
    undisturbed: Undisturbed, start_replica: StartReplica, seed: int
) -> None:
    servers = [start_replica(), start_replica()]
    num_kills = 0

    def kill(rng: random.Random, stopping: threading.Event) -> None:
        nonlocal num_kills
        while num_kills < 10:  # 50 over all seeds
            stopping.wait(rng.uniform(0, 0.4))
            server = rng.choice(servers)
            server.kill()
            num_kills += 1
            server.restart()

    job = 0
    with disturbing(kill, seed):
        while num_kills < 10:
            job += 1
            addresses = [server.address for server in servers]
            assert run_job(addresses, f"job-{job}", pace_s=0.01) == undisturbed()


def test_servers_killed_inside_a_fold_or_a_commit_cost_nothing(
    undisturbed: Undisturbed, start_replica: StartReplica, store: StandaloneStore
) -> None:
    servers = [start_replica(), start_replica()]
    num_inside = 0

    def kill_in_turns(rng: random.Random, stopping: threading.Event) -> None:
        nonlocal num_inside
        with store.client() as client:
            turns = Turns(client)
            while turns.wait_for_one(stopping):
                time.sleep(rng.uniform(0, 0.15))
                for server in servers:
                    server.kill()
                num_inside += turns.is_on()  # its holder is dead and can't have given the lock back
                for server in servers:
                    server.restart()
                time.sleep(0.5)

    with disturbing(kill_in_turns, 1):
        job = 0
        while num_inside < 4:
            job += 1
            addresses = [server.address for server in servers]
            assert run_job(addresses, f"job-{job}", settings=LARGE) == undisturbed(settings=LARGE)


def test_servers_that_are_stopped_in_order_cost_nothing(undisturbed: Undisturbed, start_replica: StartReplica) -> None:
    """As in a rolling update: what is under way when they stop is broken off by them, not by the network."""
    servers = [start_replica(), start_replica()]
    num_stops = 0

    def stop(rng: random.Random, stopping: threading.Event) -> None:
        nonlocal num_stops
        while not stopping.wait(rng.uniform(0, 0.3)):
            server = rng.choice(servers)
            assert server.stop() == 0
            num_stops += 1
            server.restart()

    with disturbing(stop, 6):
        addresses = [server.address for server in servers]
        assert run_job(addresses, "job", pace_s=0.03) == undisturbed()
    assert num_stops >= 3


def test_three_servers_of_which_one_is_killed_again_and_again(
    undisturbed: Undisturbed, start_replica: StartReplica
) -> None:
    servers = [start_replica() for _ in range(3)]
    num_kills = 0

    def kill(rng: random.Random, stopping: threading.Event) -> None:
        nonlocal num_kills
        while not stopping.wait(rng.uniform(0.5, 1.5)):
            server = rng.choice(servers)
            server.kill()
            num_kills += 1
            server.restart()

    with disturbing(kill, 3):
        addresses = [server.address for server in servers]
        assert run_job(addresses, "job", pace_s=0.03) == undisturbed()
    assert num_kills >= 3


def test_an_embedded_store_killed_at_random_moments_costs_nothing(undisturbed: Undisturbed, start_server: Any) -> None:
    server = start_server()
    num_kills = 0

    def kill(rng: random.Random, stopping: threading.Event) -> None:
        nonlocal num_kills
        while not stopping.wait(rng.uniform(0.5, 1.5)):
            os.kill(server.store_pid, signal.SIGKILL)
            num_kills += 1

    with disturbing(kill, 4):
        assert run_job(server.address, "job", pace_s=0.03) == undisturbed()
    assert num_kills >= 3


def test_a_redis_killed_at_random_moments_costs_nothing(
    undisturbed: Undisturbed, start_replica: StartReplica, store: StandaloneStore
) -> None:
    server = start_replica()
    num_kills = 0

    def kill(rng: random.Random, stopping: threading.Event) -> None:
        nonlocal num_kills
        while not stopping.wait(rng.uniform(0.5, 1.5)):
            store.kill()
            num_kills += 1
            stopping.wait(rng.uniform(0, 0.5))
            store.start()

    with disturbing(kill, 5):
        assert run_job(server.address, "job", pace_s=0.03) == undisturbed()
    assert num_kills >= 3
