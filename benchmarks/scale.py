"""One experiment with thousands of ranks, on the real server: what each part of an epoch takes.

`python benchmarks/scale.py [--ranks 4096] [--num-samples 67108864] [--servers 1] [--epochs 2]`

The ranks are coroutines of one process: each joins, streams its part, reports its losses, finishes the epoch and waits
for the next one, as the client library does. Beside the seconds that pass stand those of processor time, of the servers
and of the store: they are what more ranks take more of. docs/scaling.md reckons with them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import grpc
from performance.ranks import serving, serving_from
from performance.raw import LIMITS

import evosample
from evosample.sampling import ExperimentSpec
from evosample.v1 import selection_pb2 as pb
from evosample.v1 import selection_pb2_grpc as pb_grpc
from evosample.wire import spec_to_proto

_CONNECTIONS = 64  # of all ranks together: what a connection costs is not what is measured
_PART_ROWS = 4  # of a step
_REPORT_BYTES = 2**20
_AT_ONCE = 512  # calls of the ranks under way
_WAITING_S = 30.0


class Rank:
    """One of them."""

    def __init__(self, stub: Any, ref: pb.ExperimentRef, rank: int, world_size: int) -> None:
        self._stub = stub
        self._join = pb.JoinRunRequest(ref=ref, run_id="run", rank=rank, world_size=world_size)
        self._member = pb.Member()
        self._start = pb.EpochStart()

    async def join(self, _: int) -> None:
        joined = await self._stub.JoinRun(self._join)
        self._member = pb.Member(
            ref=self._join.ref, generation=joined.generation, rank=self._join.rank, claim=joined.claim
        )

    async def stream(self, epoch: int) -> None:
        num_bytes = 0
        async for response in self._stub.StreamEpoch(pb.StreamEpochRequest(member=self._member, epoch=epoch)):
            if response.HasField("start"):
                self._start = response.start
            num_bytes += len(response.rows.prior_scores)
        assert num_bytes == 4 * _PART_ROWS * self._start.num_steps

    async def report(self, epoch: int) -> None:
        steps = _REPORT_BYTES // (4 * _PART_ROWS)
        for first in range(0, self._start.num_steps, steps):
            num_steps = min(steps, self._start.num_steps - first)
            losses = b"\0\0\x80\x3f" * (_PART_ROWS * num_steps)  # ones
            await self._stub.ReportLosses(
                pb.ReportLossesRequest(
                    member=self._member,
                    plan_id=self._start.plan_id,
                    first_step=first,
                    num_steps=num_steps,
                    losses=losses,
                )
            )

    async def wait(self, epoch: int) -> None:
        """Ask for rows of an epoch that others have yet to let begin."""
        async for response in self._stub.StreamEpoch(pb.StreamEpochRequest(member=self._member, epoch=epoch)):
            assert response.HasField("wait")

    async def finish(self, epoch: int) -> None:
        request = pb.FinishEpochRequest(member=self._member, epoch=epoch, plan_id=self._start.plan_id)
        await self._stub.FinishEpoch(request)


def processor_s(pids: Sequence[int]) -> float:
    """Processor time of some processes so far, in seconds."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")


async def run(addresses: Sequence[str], server_pids: list[int], store_pid: int, options: argparse.Namespace) -> None:
    """Take all ranks through some epochs, part by part."""
    spec = ExperimentSpec(
        num_samples=options.num_samples,
        num_epochs=100,
        meta_batch_size=_PART_ROWS * options.ranks,
        mini_batch_size=options.ranks,
        policy=evosample.EvolvedSampling(prune_ratio=0.2, annealing=0),
    )
    channels = [grpc.aio.insecure_channel(addresses[i % len(addresses)], LIMITS) for i in range(_CONNECTIONS)]
    stubs: list[Any] = [pb_grpc.SelectionServiceStub(channel) for channel in channels]
    create = pb.CreateExperimentRequest(ref=pb.ExperimentRef(name="many"), spec=spec_to_proto(spec))
    ref = (await stubs[0].CreateExperiment(create)).experiment.ref
    ranks = [Rank(stubs[i % _CONNECTIONS], ref, i, options.ranks) for i in range(options.ranks)]
    at_once = asyncio.Semaphore(_AT_ONCE)

    async def all_of(what: str, epoch: int, part: Callable[[Rank, int], Awaitable[None]]) -> None:
        async def one(rank: Rank) -> None:
            async with at_once:
                await part(rank, epoch)

        await measured(what, asyncio.gather(*map(one, ranks)))

    async def measured(what: str, work: Awaitable[object]) -> None:
        servers_s, store_s, began_s = processor_s(server_pids), processor_s([store_pid]), time.perf_counter()
        await work
        seconds = time.perf_counter() - began_s
        servers_s, store_s = processor_s(server_pids) - servers_s, processor_s([store_pid]) - store_s
        each = f"{1000 * servers_s / len(ranks):6.2f} ms a rank"
        print(f"  {what:38}{seconds:8.2f} s   servers {servers_s:7.2f} s, {each}   store {store_s:6.2f} s", flush=True)

    await all_of("all join", 0, Rank.join)
    for epoch in range(options.epochs):
        print(f"epoch {epoch}")
        await all_of("turn, and all stream their parts" if epoch else "all stream their parts", epoch, Rank.stream)
        await all_of("all report their losses", epoch, Rank.report)
        if not epoch:
            waiting = [asyncio.create_task(rank.wait(1)) for rank in ranks]
            await measured(f"all wait for each other, {_WAITING_S:g} s", asyncio.wait(waiting, timeout=_WAITING_S))
            assert not any(task.done() for task in waiting)
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)
        await all_of("all finish", epoch, Rank.finish)
    for channel in channels:
        await channel.close()


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--ranks", type=int, default=4096)
    arguments.add_argument("--num-samples", type=int, default=2**26)
    arguments.add_argument("--servers", type=int, default=1)
    arguments.add_argument("--epochs", type=int, default=2)
    options = arguments.parse_args()
    with ExitStack() as stack:
        first = stack.enter_context(serving("--max-streams", "10000", "--max-project-streams", "10000"))
        others = [stack.enter_context(serving_from(first)) for _ in range(options.servers - 1)]
        print(f"{options.ranks:,} ranks, {options.num_samples:,} samples, {options.servers} servers on one store")
        pids = [server.process.pid for server in (first, *others)]
        asyncio.run(run([server.address for server in (first, *others)], pids, first.store_pid, options))


if __name__ == "__main__":
    main()
