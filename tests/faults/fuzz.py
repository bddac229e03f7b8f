"""Sends a server requests that no honest client sends, and looks whether it stays well.

    python tests/faults/fuzz.py --requests 100000 --seed 1

This starts a server with an embedded store, and takes three to five minutes on two cores; the tests send 10,000
requests (test_malformed.py). With --address HOST:PORT it goes to a server that is running, of which only the answers
and the bystanders are looked at. The seed fixes all that is random here; what is sent depends on the answers, too, and
these come in any order.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import redis
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from rich.progress import MofNCompleteColumn, Progress

sys.path.insert(0, str(Path(__file__).parents[1]))  # for running it as a script

from evosample.sampling import POLICIES
from evosample.v1 import selection_pb2 as pb
from evosample.v1 import selection_pb2_grpc as pb_grpc
from faults.bystanders import bystanders
from faults.malformed import SERVICE, N, RequestMaker, Target, message_class, policies, small_spec
from halves_of_losses import Halves, install
from support import ServerProcess

_NUM_TARGETS = 6
_NUM_WORKERS = 32
_TIMEOUT_S = 60.0
_WAIT_S = 0.2  # what may rightly wait for ever is left alone after that
_HURRY_S = 0.005
_MAX_FAILURES = 100
_REQUESTS_BETWEEN_DELETIONS = 4_000

# The cache of columns is so small that it is full when memory is looked at for the first time.
_SERVER_OPTIONS = ["--max-samples", "100000", "--max-message-bytes", str(2**20), "--cache-bytes", "100000"]
# What may come to them after the first 4,000 requests. By the 100,000th the server has grown by 10 to 25 MiB: by what
# it keeps of specs (of at most 4,096), and by the allocator's holes, for it has no more objects than before. The store
# grows by 0.2 MiB, or 5 when it writes its log anew. So a leak shows from some 400 bytes a request on, in the tests
# with their 10,000 from some 6 kB.
_SERVER_GROWTH_MIB = 40
_STORE_GROWTH_MIB = 16
_STORED_GROWTH_MIB = 1

_ANSWERS = {
    "OK",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "FAILED_PRECONDITION",
    "ABORTED",
    "RESOURCE_EXHAUSTED",
}


class Failure(NamedTuple):
    """An answer that the protocol does not allow."""

    method: str
    code: str
    message: str
    payloads: list[bytes]

    def __str__(self) -> str:
        sent = [payload[:500].hex() for payload in self.payloads]
        return f"{self.method}: {self.code}: {self.message[:2000]}\n    sent: {sent}"


class Fuzzer:
    """Keeps calling a server, with many calls in flight.

    Args:
        address: of the server.
        chance: where all that is random comes from.
        spared: experiments that requests may be about only if they can't be accepted.

    Attributes:
        counts: (RPC, status) -> calls.
        failures: answers that should not be.
    """

    def __init__(self, address: str, *, chance: random.Random, spared: list[Target]) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.failures: list[Failure] = []
        self._address = address
        self._chance = chance
        self._spared = [target.ref.name for target in spared]
        self._targets = [Target(pb.ExperimentRef(project="default", name=f"target-{i}")) for i in range(_NUM_TARGETS)]
        self._maker = RequestMaker(chance, [*spared, *self._targets])
        self._projects = {"default"}
        self._num_left = 0

    def run(self, num_requests: int, on_request: Callable[[], object] = lambda: None) -> None:
        """Send so many requests, and delete all experiments that came by them."""
        self._num_left = num_requests
        asyncio.run(self._run(on_request))

    async def _run(self, on_request: Callable[[], object]) -> None:
        with grpc.insecure_channel(self._address) as self._streaming_channel:
            async with grpc.aio.insecure_channel(self._address) as self._channel:
                for target in self._targets:
                    await self._renew(target)
                async with asyncio.TaskGroup() as tasks:
                    for target in self._targets:
                        tasks.create_task(self._keep(target))
                    for _ in range(_NUM_WORKERS):
                        tasks.create_task(self._work(on_request))
                await self._delete_all()

    async def _work(self, on_request: Callable[[], object]) -> None:
        while self._num_left > 0:
            self._num_left = self._num_left - 1 if len(self.failures) < _MAX_FAILURES else 0
            method, payloads = self._maker.make()
            timeout_s = _HURRY_S if self._chance.random() < 0.02 else None
            await self._call(method, payloads, timeout_s)
            on_request()

    async def _keep(self, target: Target) -> None:
        while self._num_left > 0:
            await self._renew(target)

    # Calls

    async def _call(self, method: MethodDescriptor, payloads: list[bytes], timeout_s: float | None = None) -> list[Any]:
        """The responses, checked as far as the protocol goes; none if it failed, as it may."""
        may_time_out = timeout_s is not None or method.name in ("StreamEpoch", "WatchExperiment")
        code, responses = "OK", []
        try:
            answers = await self._send(method, payloads, timeout_s or (_WAIT_S if may_time_out else _TIMEOUT_S))
            responses = [message_class(method.output_type).FromString(answer) for answer in answers]
        except DecodeError as undecodable:
            self._fail(method, code, f"the response can't be decoded: {undecodable}", payloads)
        except grpc.RpcError as raised:
            failed: Any = raised
            code = failed.code().name
            is_expected = (code in _ANSWERS and _has_details(failed)) or (code == "DEADLINE_EXCEEDED" and may_time_out)
            if not is_expected:
                self._fail(method, code, failed.details() or "", payloads)
        self.counts[method.name, code] += 1
        with suppress(DecodeError, IndexError):  # of a request that was refused, or whose answer was not waited for
            self._learn(method, message_class(method.input_type).FromString(payloads[0]), responses)
        return responses

    def _fail(self, method: MethodDescriptor, code: str, message: str, payloads: list[bytes]) -> None:
        self.failures.append(Failure(method.name, code, message, payloads))

    async def _send(self, method: MethodDescriptor, payloads: list[bytes], timeout_s: float) -> list[bytes]:
        path = f"/{SERVICE.full_name}/{method.name}"
        if method.client_streaming:
            # asyncio's client takes it for an error of its own if the server answers before it has sent all
            call: Any = self._streaming_channel.stream_unary(path)
            return [await asyncio.to_thread(call, iter(payloads), timeout=timeout_s)]
        if method.server_streaming:
            call = self._channel.unary_stream(path)
            return [answer async for answer in call(payloads[0], timeout=timeout_s)]
        call = self._channel.unary_unary(path)
        return [await call(payloads[0], timeout=timeout_s)]

    # What requests are about

    def _learn(self, method: MethodDescriptor, request: Any, responses: list[Any]) -> None:
        """Remember what further requests can refer to."""
        if method.name == "CreateExperiment":
            self._projects.add(request.ref.project or "default")  # whatever was answered, it may be there
        for response in responses:
            match response:
                case pb.GetExperimentResponse() | pb.CreateExperimentResponse():
                    for target in self._about(response.experiment.ref):
                        if target.ref.uid != response.experiment.ref.uid:
                            target.members.clear()
                        target.ref.uid = response.experiment.ref.uid
                        target.epoch = response.experiment.epoch
                        target.world_size = max(response.experiment.world_size, 1)
                        policy = POLICIES.get(response.experiment.spec.WhichOneof("policy") or "", Halves)
                        target.columns = policy.reported_columns
                case pb.JoinRunResponse():
                    for target in self._about(request.ref):
                        member = pb.Member(
                            ref=request.ref, generation=response.generation, rank=request.rank, claim=response.claim
                        )
                        target.members.append(member)
                        target.world_size = request.world_size
                case pb.StreamEpochResponse() if response.HasField("start"):
                    for target in self._about(request.member.ref):
                        target.plan_ids.append(response.start.plan_id)
                        target.epoch = request.epoch
                        target.step_rows = response.start.step_rows

    def _about(self, ref: pb.ExperimentRef) -> list[Target]:
        return [
            target
            for target in self._targets
            if (target.ref.project, target.ref.name) == (ref.project or "default", ref.name)
        ]

    async def _ask(self, name: str, request: Any) -> list[Any]:
        """A call in good order; its experiment may be gone all the same."""
        return await self._call(SERVICE.methods_by_name[name], [request.SerializeToString()])

    async def _renew(self, target: Target) -> None:
        """See to it that a target is there, in some state, and known."""
        ref = pb.ExperimentRef(project=target.ref.project, name=target.ref.name)
        found = await self._ask("GetExperiment", pb.GetExperimentRequest(ref=ref))
        if found and (found[0].experiment.state == pb.EXPERIMENT_STATE_FINISHED or self._chance.random() < 0.1):
            await self._ask("DeleteExperiment", pb.DeleteExperimentRequest(ref=ref))
            found = []
        if not found:
            spec = small_spec(seed=self._chance.randrange(9), warm_start=self._chance.random() < 0.3)
            spec.MergeFrom(policies(self._chance))
            spec.importance_weight = self._chance.choice(pb.ImportanceWeight.values())
            await self._ask("CreateExperiment", pb.CreateExperimentRequest(ref=ref, spec=spec))
            if spec.num_groups:
                losses = bytes(4 * N) if spec.mixture.HasField("step_size") else b""
                groups = pb.SetGroupsRequest(ref=ref, num_samples=N, groups=bytes(2 * N), reference_losses=losses)
                await self._ask("SetGroups", groups)
            if self._chance.random() < 0.2:  # without a run
                return
            world_size = self._chance.choice([1, 1, 2, 4])
            for rank in range(world_size):
                join = pb.JoinRunRequest(ref=target.ref, run_id="run-0", rank=rank, world_size=world_size)
                await self._ask("JoinRun", join)
        if target.members:
            stream = pb.StreamEpochRequest(member=target.members[-1], epoch=target.epoch, max_steps=1)
            await self._ask("StreamEpoch", stream)

    async def _delete_all(self) -> None:
        """Delete all experiments but the bystanders."""
        for project in sorted(self._projects):
            page_token: str | None = ""
            while page_token is not None:
                request = pb.ListExperimentsRequest(project=project, page_size=100, page_token=page_token)
                page_token = None
                for page in await self._ask("ListExperiments", request):
                    page_token = page.next_page_token or None
                    for experiment in page.experiments:
                        if experiment.ref.name not in self._spared:
                            await self._ask("DeleteExperiment", pb.DeleteExperimentRequest(ref=experiment.ref))


def _has_details(error: Any) -> bool:
    """Whether an error carries what the protocol says of its code."""
    if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in (error.details() or ""):
        return True  # the transport's own
    status = rpc_status.from_call(error)
    details = list(status.details) if status is not None else []
    has_field = error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
    expected = error_details_pb2.BadRequest if has_field else error_details_pb2.ErrorInfo
    return len(details) == 1 and details[0].Is(expected.DESCRIPTOR)


class Footprint(NamedTuple):
    """What a server and its embedded store take."""

    server_mib: float
    store_mib: float
    stored_mib: float
    contents: dict[bytes, Any]

    @classmethod
    def of(cls, server: ServerProcess) -> Footprint:
        with redis.Redis(unix_socket_path=server.store_socket) as store:
            lasting = [key for key in store.scan_iter() if store.ttl(key) == -1]  # a lock lets go by itself
            contents = {key: _content(store, key) for key in lasting}
            stored_mib = store.info("memory")["used_memory"] / 2**20
        return cls(_resident_mib(server.process.pid), _resident_mib(server.store_pid), stored_mib, contents)

    def sizes(self) -> str:
        """For people."""
        return (
            f"server {self.server_mib:.1f} MiB, store {self.store_mib:.1f} MiB with {self.stored_mib:.2f} MiB of data"
        )

    def check(self, before: Footprint) -> None:
        """Assert that next to nothing has come to it, and that the store holds what it held."""
        print(f"before: {before.sizes()}, after: {self.sizes()}")
        assert self.server_mib < before.server_mib + _SERVER_GROWTH_MIB
        assert self.store_mib < before.store_mib + _STORE_GROWTH_MIB
        assert self.stored_mib < before.stored_mib + _STORED_GROWTH_MIB
        differing = {
            key for key in {*self.contents, *before.contents} if self.contents.get(key) != before.contents.get(key)
        }
        assert not differing, f"left behind, lost or changed in the store: {sorted(differing)[:20]}"


def _content(store: Any, key: bytes) -> Any:
    match store.type(key):  # how an index is laid out depends on how long it has once been
        case b"zset":
            return store.zrange(key, 0, -1)
        case b"hash":
            return store.hgetall(key)
        case _:
            return store.dump(key)


def _resident_mib(pid: int) -> float:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) / 2**10


def check_server(
    address: str,
    *,
    num_requests: int,
    seed: int,
    process: ServerProcess | None = None,
    on_request: Callable[[], object] = lambda: None,
) -> Counter[tuple[str, str]]:
    """Assert that a server bears so many requests, and changes nothing by them that it must not change.

    Args:
        address: of the server. All experiments of its default project get deleted.
        num_requests: how many.
        seed: of all chance.
        process: its process, for looking into it.
        on_request: called after each.

    Returns:
        (RPC, status) -> calls.
    """
    with grpc.insecure_channel(address) as channel:
        spared = bystanders(pb_grpc.SelectionServiceStub(channel))
        fuzzer = Fuzzer(address, chance=random.Random(seed), spared=[each.target for each in spared])
        before = None
        while num_requests > 0:
            fuzzer.run(min(num_requests, _REQUESTS_BETWEEN_DELETIONS), on_request)
            num_requests -= _REQUESTS_BETWEEN_DELETIONS
            assert not fuzzer.failures, "\n".join(map(str, fuzzer.failures))
            if before is None and process is not None:  # caches are filled, scripts loaded
                before = Footprint.of(process)
        for method in SERVICE.methods:
            codes = {code for name, code in fuzzer.counts if name == method.name}
            assert codes >= {"OK", "INVALID_ARGUMENT"}, f"{method.name} was called in vain: {codes}"
        if before is not None and process is not None:
            Footprint.of(process).check(before)
        for each in spared:
            each.check_unchanged()
            each.delete()
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE.full_name))
        assert health.status == health_pb2.HealthCheckResponse.SERVING
    return fuzzer.counts


def check_own_server(
    folder: Path, *, num_requests: int, seed: int, on_request: Callable[[], object] = lambda: None
) -> Counter[tuple[str, str]]:
    """The same with a server that is started in a folder, and must neither end nor log an error meanwhile."""
    package = install(folder / "package")
    process = ServerProcess(folder / "data", *_SERVER_OPTIONS, "--log-level", "warning", python_path=package)
    try:
        counts = check_server(
            process.address, num_requests=num_requests, seed=seed, process=process, on_request=on_request
        )
    finally:
        code = process.stop()
        log = (folder / "data.log").read_text()
        complains = any(sign in log for sign in ("Traceback", "[error", "[critical", "Warning"))
        if complains:
            print(log, file=sys.stderr)
    assert code == 0
    assert not complains
    return counts


def main() -> None:
    """Run it from a shell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--address", help="HOST:PORT of a server whose default project holds nothing of value")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as bar,
    ):
        task = bar.add_task("requests", total=options.requests)
        common = {"num_requests": options.requests, "seed": options.seed, "on_request": lambda: bar.advance(task)}
        if options.address:
            counts = check_server(options.address, **common)
        else:
            counts = check_own_server(Path(folder), **common)
    for (method, code), count in sorted(counts.items()):
        print(f"{count:8,} {method} {code}")


if __name__ == "__main__":
    main()
