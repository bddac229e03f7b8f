"""Whatever is killed and lost: jobs of every policy see and learn what the formulas give."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest

from faults.harness import EACH_POLICY, ReplicatedServer, computed, disturbing, run_job
from stores import StandaloneStore


@pytest.mark.parametrize("policy", EACH_POLICY)
def test_killed_servers_and_a_store_that_goes_back_cost_nothing(
    start_replica: Callable[..., ReplicatedServer], store: StandaloneStore, policy: str
) -> None:
    servers = [start_replica(), start_replica()]
    (log,) = store.folder.glob("appendonlydir/*.incr.aof")
    num_lost_bytes = []

    def harm(rng: random.Random, stopping: threading.Event) -> None:
        for _ in range(2):
            stopping.wait(rng.uniform(0, 0.3))
            server = rng.choice(servers)
            server.kill()
            server.restart()
            synced_bytes = log.stat().st_size
            stopping.wait(rng.uniform(0.2, 0.7))
            for _ in range(200):  # it never grows while the job waits before its last epoch
                if log.stat().st_size > synced_bytes:
                    break
                stopping.wait(0.01)
            store.kill()
            num_lost_bytes.append(log.stat().st_size - synced_bytes)
            with log.open("r+b") as file:
                file.truncate(synced_bytes)
            store.start()

    settings = EACH_POLICY[policy]
    with disturbing(harm, len(policy)) as is_over:
        addresses = [server.address for server in servers]
        outcome = run_job(addresses, "job", settings=settings, pace_s=0.15, last_epoch_after=is_over)
        assert outcome == computed(settings, 2)
    assert len(num_lost_bytes) == 2
    assert max(num_lost_bytes) > 0
