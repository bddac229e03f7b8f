"""A process that is frozen for longer than every time-out costs time and nothing else, also when it wakes up."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import evosample
from faults.harness import LARGE, Outcome, ReplicatedServer, Turns, disturbing, run_job
from stores import StandaloneStore

Undisturbed = Callable[..., Outcome]
StartReplica = Callable[..., ReplicatedServer]

# Longer than the keep-alive of connections (20 s), the store's time-outs (10 s) and the lock of a turn (3 s).
FROZEN_S = 25.0


class At:
    """Tells a disturbing thread when the job gets to a step, and waits until the harm is done."""

    def __init__(self, epoch: int, step: int) -> None:
        self._position = (epoch, step)
        self.is_there = threading.Event()
        self.may_go_on = threading.Event()

    def __call__(self, batch: evosample.Batch) -> None:
        if (batch.epoch, batch.step) == self._position:
            self.is_there.set()
            assert self.may_go_on.wait(60)


def test_from_a_frozen_server_clients_go_to_another(undisturbed: Undisturbed, start_replica: StartReplica) -> None:
    servers = [start_replica(), start_replica()]
    at = At(2, 10)

    def freeze(rng: random.Random, stopping: threading.Event) -> None:
        assert at.is_there.wait(60)
        servers[0].pause()
        at.may_go_on.set()
        stopping.wait()  # until the job has come to its end
        servers[0].resume()

    with disturbing(freeze, 0):
        assert run_job([s.address for s in servers], "job", before_step=at, pace_s=0.002) == undisturbed()


def test_that_all_servers_are_frozen_costs_nothing(undisturbed: Undisturbed, start_replica: StartReplica) -> None:
    servers = [start_replica(), start_replica()]
    at = At(2, 10)

    def freeze(rng: random.Random, stopping: threading.Event) -> None:
        assert at.is_there.wait(60)
        for server in servers:
            server.pause()
        at.may_go_on.set()
        time.sleep(FROZEN_S)
        for server in servers:
            server.resume()

    with disturbing(freeze, 0):
        assert run_job([s.address for s in servers], "job", before_step=at, pace_s=0.002) == undisturbed()


def test_a_frozen_store_costs_nothing(
    undisturbed: Undisturbed, start_replica: StartReplica, store: StandaloneStore
) -> None:
    server = start_replica()
    at = At(2, 10)

    def freeze(rng: random.Random, stopping: threading.Event) -> None:
        assert at.is_there.wait(60)
        store.pause()
        at.may_go_on.set()
        time.sleep(FROZEN_S / 2)
        store.resume()

    with disturbing(freeze, 0):
        assert run_job(server.address, "job", before_step=at, pace_s=0.002) == undisturbed()


def test_a_planner_that_is_frozen_for_longer_than_its_lock_is_overtaken_and_changes_nothing_when_it_wakes_up(
    undisturbed: Undisturbed, start_replica: StartReplica, store: StandaloneStore
) -> None:
    servers = [start_replica(), start_replica()]
    num_overtaken = 0

    def freeze_in_turns(rng: random.Random, stopping: threading.Event) -> None:
        nonlocal num_overtaken
        with store.client() as client:
            turns = Turns(client)
            for _ in range(4):
                if not turns.wait_for_one(stopping):
                    return
                planner = rng.choice(servers)
                planner.pause()
                was_its_turn = turns.is_on()
                time.sleep(
                    5
                )  # its lock runs out after 3 s: by then the other one has made the turn, if this one had it
                num_overtaken += was_its_turn
                planner.resume()

    with disturbing(freeze_in_turns, 2):
        assert run_job([s.address for s in servers], "job", settings=LARGE, pace_s=0.05) == undisturbed(settings=LARGE)
    assert num_overtaken
