"""Bounds: what is over one is told which it was and how to raise it; and a store that is ill makes no server ill."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis import Redis

import evosample
from evosample.v1 import selection_pb2 as pb
from evosample.v1 import selection_pb2_grpc as pb_grpc
from faults.harness import ReplicatedServer
from stores import StandaloneStore, wait_until
from support import ServerProcess, fixed_losses, train

SETTINGS: dict[str, Any] = {"num_samples": 200, "num_epochs": 3, "meta_batch_size": 20, "mini_batch_size": 5}


@contextlib.contextmanager
def member_of(server: ServerProcess, **settings: Any) -> Iterator[tuple[pb_grpc.SelectionServiceStub, pb.Member]]:
    """A raw stub, and a member of a run of a new experiment."""
    with evosample.connect(server.address) as client, grpc.insecure_channel(server.address) as channel:
        ref = client.create_experiment("e", **(SETTINGS | settings)).ref
        stub = pb_grpc.SelectionServiceStub(channel)
        joined = stub.JoinRun(pb.JoinRunRequest(ref=ref, run_id="run", world_size=1))
        yield stub, pb.Member(ref=ref, generation=joined.generation, claim=joined.claim)


@contextlib.asynccontextmanager
async def connections(address: str, number: int) -> AsyncIterator[list[Any]]:
    """Raw stubs, each over a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with contextlib.AsyncExitStack() as stack:
        channels = [grpc.aio.insecure_channel(address, options) for _ in range(number)]
        yield [pb_grpc.SelectionServiceStub(await stack.enter_async_context(channel)) for channel in channels]


def start_of(stub: Any, member: pb.Member) -> str:
    """The id of the first epoch's plan."""
    responses = stub.StreamEpoch(pb.StreamEpochRequest(member=member), timeout=20)
    return str(next(response.start.plan_id for response in responses if response.HasField("start")))


def exhausted(call: Callable[[], Any]) -> str:
    """What a call over a bound is told."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    return str(caught.value.details())


def test_a_server_takes_so_many_streams(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--max-streams", "3", "--max-project-streams", "3")
    with member_of(server) as (stub, member):
        waiting = [stub.StreamEpoch(pb.StreamEpochRequest(member=member, epoch=1)) for _ in range(3)]
        for stream in waiting:
            next(stream)  # it says that it waits
        said = exhausted(lambda: list(stub.StreamEpoch(pb.StreamEpochRequest(member=member))))
        assert "already serves 3 streams" in said
        assert "raise it with --max-streams" in said
        waiting.pop().cancel()

        def is_free() -> bool:
            with contextlib.suppress(grpc.RpcError):
                return bool(list(stub.StreamEpoch(pb.StreamEpochRequest(member=member))))
            return False

        wait_until(is_free, "a stream that was cancelled to be counted out")


def test_a_project_takes_no_more_than_half_of_the_streams(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--max-streams", "20")
    with member_of(server) as (stub, member), member_of(server, project="other") as (_, others):
        waiting = [stub.StreamEpoch(pb.StreamEpochRequest(member=member, epoch=1)) for _ in range(10)]
        for stream in waiting:
            next(stream)
        said = exhausted(lambda: next(stub.StreamEpoch(pb.StreamEpochRequest(member=member, epoch=1))))
        assert "10 streams of project 'default'" in said
        assert list(stub.StreamEpoch(pb.StreamEpochRequest(member=others)))


def test_a_project_takes_so_many_watches_which_share_so_many_looks(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server()
    with member_of(server) as (stub, member), member_of(server, project="other") as (_, others):

        def watch(ref: pb.ExperimentRef) -> Any:
            return stub.WatchExperiment(pb.WatchExperimentRequest(ref=ref, interval_ms=100))

        watches = [watch(member.ref) for _ in range(200)]
        for watching in watches:
            next(watching)
        assert "200 watching experiments of project 'default'" in exhausted(lambda: next(watch(member.ref)))
        assert next(stub.WatchExperiment(pb.WatchExperimentRequest(ref=member.ref, once=True)))
        looks = watch(others.ref)

        def seconds_until_next(watching: Any) -> float:
            began_s = time.monotonic()
            next(watching)
            return time.monotonic() - began_s

        alone_s = sorted(seconds_until_next(looks) for _ in range(5))[2]
        shared_s = max(seconds_until_next(watches[0]) for _ in range(3))  # the first ones may have been waiting here
        assert shared_s > 5 * alone_s  # 4 s, where 0.1 was asked for
        for watching in (*watches, looks):
            watching.cancel()


def test_thousands_of_ranks_may_call_at_once(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--max-streams", "4000")
    with member_of(server) as (_, member):

        async def all_at_once() -> set[object]:
            async with connections(server.address, 20) as stubs:
                request = pb.GetExperimentRequest(ref=member.ref)
                calls = [stubs[number % 20].GetExperiment(request) for number in range(2500)]
                return {await call.code() for call in calls}

        assert asyncio.run(all_at_once()) == {grpc.StatusCode.OK}


def test_hundreds_of_ranks_may_share_a_connection(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server()
    with member_of(server) as (stub, member):
        next_epoch = pb.StreamEpochRequest(member=member, epoch=1)
        waiting = [stub.StreamEpoch(next_epoch, timeout=60) for _ in range(400)]
        for stream in waiting:
            next(stream)  # it says that it waits
        assert stub.FinishEpoch(pb.FinishEpochRequest(member=member, plan_id=start_of(stub, member)), timeout=20)
        for stream in waiting:
            assert any(response.HasField("start") for response in stream)


def test_ranks_that_wait_share_so_many_looks(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--max-streams", "4000")
    with member_of(server) as (_, member), Redis(unix_socket_path=server.store_socket) as store:

        def num_looks() -> int:
            return int(store.info("commandstats")["cmdstat_evalsha"]["calls"])

        async def looks_of_waiting(num_streams: int, seconds: float) -> int:
            async with connections(server.address, 10) as stubs:
                request = pb.StreamEpochRequest(member=member, epoch=1)
                first = num_looks()
                streams = [stubs[number % 10].StreamEpoch(request) for number in range(num_streams)]
                await asyncio.to_thread(wait_until, lambda: num_looks() >= first + num_streams, "all of them to wait")
                before = num_looks()
                await asyncio.sleep(seconds)
                num = num_looks() - before
                assert not any(stream.done() for stream in streams)
                for stream in streams:
                    stream.cancel()
                return num

        assert asyncio.run(looks_of_waiting(900, 3)) < 900 * 3 / 2


def test_a_project_takes_so_many_exports(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server()
    large = {"num_samples": 2_000_000, "meta_batch_size": 1000}
    with member_of(server, **large) as (stub, member), member_of(server, project="other") as (_, others):
        exports = [stub.ExportScores(pb.ExportScoresRequest(ref=member.ref)) for _ in range(10)]
        for export in exports:
            next(export)  # and no more: they stay open
        said = exhausted(lambda: next(stub.ExportScores(pb.ExportScoresRequest(ref=member.ref))))
        assert "10 times at once" in said
        assert list(stub.ExportScores(pb.ExportScoresRequest(ref=others.ref)))
        assert sum(len(rows.scores) for rows in exports.pop()) < 4 * 2_000_000  # its first message was taken above

        def is_free() -> bool:
            with contextlib.suppress(grpc.RpcError):
                return bool(list(stub.ExportScores(pb.ExportScoresRequest(ref=member.ref))))
            return False

        wait_until(is_free, "an export that has ended to be counted out")
        for export in exports:
            export.cancel()


def test_a_project_takes_so_many_experiments(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--max-experiments", "2")
    with evosample.connect(server.address) as client:
        for name in ("a", "b", "a"):
            client.create_experiment(name, **SETTINGS)
        client.create_experiment("c", **SETTINGS, project="other")
        with pytest.raises(
            evosample.ResourceExhaustedError, match=r"has 2 experiments, of 2 .*raise it with --max-experiments"
        ):
            client.create_experiment("c", **SETTINGS)
        client.delete_experiment("a")
        client.create_experiment("c", **SETTINGS)


@pytest.mark.parametrize("bound", ["--max-experiments=5", "--max-project-samples=1000"])
def test_creations_at_the_same_time_stay_within_a_projects_bounds(
    start_server: Callable[..., ServerProcess], bound: str
) -> None:
    server = start_server(bound)

    def created(number: int) -> bool:
        with contextlib.suppress(evosample.ResourceExhaustedError):
            client.create_experiment(f"e{number % 30}", **SETTINGS)  # two of each name
            list(client.list_experiments())  # looking must not make room
            return True
        return False

    with evosample.connect(server.address) as client:
        list(client.list_experiments())
        with ThreadPoolExecutor(60) as pool:
            assert any(pool.map(created, range(60)))
        assert len(list(client.list_experiments())) == 5
        with pytest.raises(evosample.ResourceExhaustedError):
            client.create_experiment("another", **SETTINGS)
        client.delete_experiment(next(client.list_experiments()).name)
        client.create_experiment("another", **SETTINGS)


def test_a_place_whose_experiment_was_never_made_is_free_again_after_a_while(
    start_server: Callable[..., ServerProcess],
) -> None:
    server = start_server("--max-experiments", "1")
    with (
        evosample.connect(server.address) as client,
        Redis(unix_socket_path=server.store_socket) as store,
    ):

        def hold(since_s: float) -> None:  # as a server does, which then ends
            store.hset("evosample:{default}:samples", "unmade", f"200 {int(since_s)}")
            store.zadd("evosample:{default}:experiments", {"unmade": 0})

        hold(time.time())
        assert not list(client.list_experiments())
        with pytest.raises(evosample.ResourceExhaustedError, match="has 1 experiments"):
            client.create_experiment("e", **SETTINGS)
        hold(time.time() - 61)
        assert not list(client.list_experiments())
        client.create_experiment("e", **SETTINGS)


def test_losses_take_four_bytes_a_row_in_however_many_messages_they_come(server: ServerProcess) -> None:
    rows, step_rows = 400_000, 40_000
    with (
        Redis(unix_socket_path=server.store_socket) as store,
        member_of(server, num_samples=rows, meta_batch_size=step_rows) as (stub, member),
    ):
        request = pb.StreamEpochRequest(member=member, max_steps=1)
        plan_id = next(r.start.plan_id for r in stub.StreamEpoch(request) if r.HasField("start"))
        losses = np.ones(step_rows, "<f4").tobytes()
        for step in range(rows // step_rows):
            stub.ReportLosses(
                pb.ReportLossesRequest(member=member, plan_id=plan_id, first_step=step, num_steps=1, losses=losses)
            )
        blocks = list(store.scan_iter(f"*{member.ref.uid}*{plan_id}*loss*"))
        assert len(blocks) == 2
        assert sum(map(store.strlen, blocks)) == 4 * rows
        assert sum(map(store.memory_usage, blocks)) < 1.2 * 4 * rows


def test_a_message_takes_so_many_losses(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--max-message-bytes", str(2**20))
    with member_of(server, num_samples=400_000, meta_batch_size=100_000) as (stub, member):
        request = pb.StreamEpochRequest(member=member, max_steps=1)
        plan_id = next(r.start.plan_id for r in stub.StreamEpoch(request) if r.HasField("start"))

        def report(num_steps: int) -> pb.ReportLossesRequest:
            losses = np.ones(num_steps * 100_000, "<f4").tobytes()
            return pb.ReportLossesRequest(member=member, plan_id=plan_id, num_steps=num_steps, losses=losses)

        stub.ReportLosses(report(2))
        said = exhausted(lambda: stub.ReportLosses(report(3)))
        assert "1,200,000 bytes; this server takes at most 1,048,576" in said
        assert "--max-message-bytes" in said
        huge = pb.ReportLossesRequest(member=member, plan_id=plan_id, num_steps=1, losses=bytes(5 * 2**20))
        assert "larger than max" in exhausted(lambda: stub.ReportLosses(huge))


def rss_bytes(server: ServerProcess) -> int:
    """Memory of a process that is in RAM."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


def test_readers_that_do_not_read_cost_no_memory(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server()
    n = 4_000_000
    with member_of(server, num_samples=n, meta_batch_size=1000, mini_batch_size=100) as (stub, member):
        request = pb.StreamEpochRequest(member=member)
        assert sum(r.rows.num_steps for r in stub.StreamEpoch(request)) == n // 1000  # the cache is full from here on
        before = rss_bytes(server)
        slow = [stub.StreamEpoch(request) for _ in range(30)]
        for stream in slow:
            assert next(stream).HasField("start")
        time.sleep(2)  # whatever would be sent ahead has been
        grown = rss_bytes(server) - before
        for stream in slow:
            stream.cancel()
    # All of them together are 960 MB. A stream may hold a message or two of 1 MiB, and the flow control's window.
    assert grown < 30 * 6 * 2**20


@pytest.mark.parametrize("ill", ["full", "read-only", "gone"])
def test_a_store_that_takes_no_writes_makes_the_server_unhealthy_until_it_does_and_jobs_go_on(
    tmp_path: Path, ill: str
) -> None:
    store = StandaloneStore(tmp_path / "store")
    server = ReplicatedServer(tmp_path / "server", store.url)
    with grpc.insecure_channel(server.address) as channel, evosample.connect(server.address) as client:

        def is_serving() -> bool:
            found = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            return bool(found.status == health_pb2.HealthCheckResponse.SERVING)

        assert is_serving()
        experiment = client.create_experiment("e", **SETTINGS)

        def step(batch: evosample.Batch) -> None:
            if (batch.epoch, batch.step) == (1, 3):
                make_ill()
                wait_until(lambda: not is_serving(), "the server to be unhealthy")
                with pytest.raises(evosample.UnavailableError, match=said):
                    impatient.create_experiment("other", **SETTINGS)
                make_well()
                wait_until(is_serving, "the server to be healthy again")

        def make_ill() -> None:
            match ill:
                case "full":
                    store.call("CONFIG", "SET", "maxmemory", "1mb")
                case "read-only":
                    store.call("REPLICAOF", "127.0.0.1", "1")
                case "gone":
                    store.kill()

        def make_well() -> None:
            match ill:
                case "full":
                    store.call("CONFIG", "SET", "maxmemory", "0")
                case "read-only":
                    store.call("REPLICAOF", "NO", "ONE")
                case "gone":
                    store.start()

        said = {"full": "maxmemory", "read-only": "read only|MASTERDOWN|read-only", "gone": "store"}[ill]
        with evosample.connect(server.address, outage_timeout_s=1) as impatient:
            train(experiment, fixed_losses(200, 3), before_step=step)
        assert experiment.status().state == "finished"
        assert experiment.status().unreported_rows == 0
    server.stop()
    store.close()
