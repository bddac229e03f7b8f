"""Whatever is killed and lost: jobs of every policy see and learn what the formulas give."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest

from faults.harness import EACH_POLICY, ReplicatedServer, computed, disturbing, lose_last_writes, run_job
from stores import StandaloneStore


@pytest.mark.parametrize("policy", EACH_POLICY)
def test_killed_servers_and_a_store_that_goes_back_cost_nothing(
    start_replica: Callable[..., ReplicatedServer], store: StandaloneStore, policy: str
) -> None:
    servers = [start_replica(), start_replica()]
    num_lost_bytes = []

    def harm(rng: random.Random, stopping: threading.Event) -> None:
        for _ in range(2):
            stopping.wait(rng.uniform(0, 0.3))
            server = rng.choice(servers)
            server.kill()
            server.restart()
            num_lost_bytes.append(lose_last_writes(store, rng.uniform(0.2, 0.7), stopping))

    settings = EACH_POLICY[policy]
    with disturbing(harm, len(policy)) as is_over:
        addresses = [server.address for server in servers]
        outcome = run_job(addresses, "job", settings=settings, pace_s=0.15, last_epoch_after=is_over)
        assert outcome == computed(settings, 2)
    assert len(num_lost_bytes) == 2
    assert max(num_lost_bytes) > 0
