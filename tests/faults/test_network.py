"""Connections that are cut, delayed, truncated or repeated, on either side of the server, change nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import pytest

from faults.harness import Outcome, ReplicatedServer, run_job
from faults.proxy import Proxy
from stores import StandaloneStore

Undisturbed = Callable[..., Outcome]
StartReplica = Callable[..., ReplicatedServer]

FAULTS = {
    "cut": {"cut": 0.02},
    "delay": {"delay": 0.02},
    "truncate": {"truncate": 0.02},
    "duplicate": {"duplicate": 0.05},
    "all": {"cut": 0.01, "delay": 0.005, "truncate": 0.01, "duplicate": 0.02},
}


def switch_on(proxy: Proxy, faults: dict[str, float]) -> None:
    for fault, value in faults.items():
        setattr(proxy, fault, value)


@pytest.mark.parametrize("faults", FAULTS)
def test_a_bad_network_between_clients_and_servers_costs_nothing(
    undisturbed: Undisturbed, start_replica: StartReplica, faults: str
) -> None:
    with ExitStack() as stack:
        proxies = [stack.enter_context(Proxy(start_replica().address, seed=seed)) for seed in range(2)]
        for proxy in proxies:
            switch_on(proxy, FAULTS[faults])
        assert run_job([proxy.address for proxy in proxies], "job", pace_s=0.01) == undisturbed()
        struck = sum((proxy.counts for proxy in proxies), start=proxies[0].counts)
        assert faults in ("delay", "all") or struck[faults] >= 3


@pytest.mark.parametrize("faults", ["cut", "delay", "truncate"])
def test_a_bad_network_between_server_and_store_costs_nothing(
    undisturbed: Undisturbed, start_replica: StartReplica, store: StandaloneStore, faults: str
) -> None:
    with Proxy(f"127.0.0.1:{store.port}", seed=3) as proxy:
        server = start_replica(redis_url=f"redis://{proxy.address}")
        switch_on(proxy, {"delay": {"delay": 0.004}, "cut": {"cut": 0.005}, "truncate": {"truncate": 0.005}}[faults])
        assert run_job(server.address, "job", pace_s=0.01) == undisturbed()
        assert faults == "delay" or proxy.counts[faults] >= 3
