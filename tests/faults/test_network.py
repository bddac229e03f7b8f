"""Connections that are cut, delayed, truncated or repeated, on either side of the server, change nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import grpc
import pytest

import evosample
from evosample.v1 import selection_pb2 as pb
from evosample.v1 import selection_pb2_grpc as pb_grpc
from faults.harness import Outcome, ReplicatedServer, run_job
from faults.proxy import Proxy
from stores import StandaloneStore, wait_until
from support import ServerProcess

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


def test_a_job_goes_to_a_server_that_was_added_later_and_notices_nothing(
    undisturbed: Undisturbed, start_replica: StartReplica, caplog: pytest.LogCaptureFixture
) -> None:
    options = ("--max-connection-age-s", "1", "--log-level", "debug")
    first, added = start_replica(*options), start_replica(*options)

    def num_answers(server: ServerProcess) -> int:
        return server.log.count("method=ReportLosses")

    with Proxy(first.address) as balancer:

        def add(batch: evosample.Batch) -> None:
            if (batch.epoch, batch.step) == (1, 0):
                balancer.target = added.address  # of new connections alone
                assert not num_answers(added)

        assert run_job(balancer.address, "job", pace_s=0.03, before_step=add) == undisturbed()
        assert num_answers(first)
        assert num_answers(added) > num_answers(first)
    assert not caplog.records, "nothing that it would warn of"


def test_a_stream_outlives_the_age_of_its_connection(start_replica: StartReplica) -> None:
    server = start_replica("--max-connection-age-s", "1")
    with evosample.connect(server.address) as client:
        ref = client.create_experiment("e", num_samples=100, num_epochs=3, meta_batch_size=10, mini_batch_size=5).ref
    with Proxy(server.address) as proxy, grpc.insecure_channel(proxy.address) as channel:
        stub = pb_grpc.SelectionServiceStub(channel)
        watching = stub.WatchExperiment(pb.WatchExperimentRequest(ref=ref, interval_ms=100), timeout=60)
        next(watching)
        proxy.refuse = True

        def is_on_another_connection() -> bool:
            next(watching)
            try:
                stub.GetExperiment(pb.GetExperimentRequest(ref=ref), timeout=20)
            except grpc.RpcError as error:
                return error.code() is grpc.StatusCode.UNAVAILABLE
            return False

        wait_until(is_on_another_connection, "new calls to go over a new connection")
        for _ in range(20):  # two seconds
            assert next(watching).experiment.epoch == 0
