"""Ranks of runs, as thin as a client can be: what the server itself can do."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import grpc
import numpy as np
from numpy.typing import NDArray
from performance.raw import LIMITS

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import evosample
from evosample.rows import Rows, decode_event
from evosample.sampling import ExperimentSpec
from evosample.v1 import selection_pb2 as pb
from evosample.v1 import selection_pb2_grpc as pb_grpc
from evosample.wire import spec_to_proto
from support import ServerProcess

META_BATCH_SIZE, MINI_BATCH_SIZE = 256, 64
_REPORT_BYTES = 2**20


@contextmanager
def serving(*options: str) -> Iterator[ServerProcess]:
    """A server with its embedded store, on an empty directory."""
    with tempfile.TemporaryDirectory() as folder:
        server = ServerProcess(Path(folder) / "data", *options)
        try:
            yield server
        finally:
            server.stop()


@contextmanager
def serving_from(store: ServerProcess) -> Iterator[ServerProcess]:
    """A second server on the store of a first: it has read nothing of it yet."""
    with serving("--redis-url", f"unix://{store.store_socket}") as server:
        yield server


def spec_of(num_samples: int, *, prune_ratio: float = 0.0, num_epochs: int = 100) -> ExperimentSpec:
    """ES or ESWP without annealing."""
    return ExperimentSpec(
        num_samples=num_samples,
        num_epochs=num_epochs,
        meta_batch_size=META_BATCH_SIZE,
        mini_batch_size=MINI_BATCH_SIZE,
        policy=evosample.EvolvedSampling(prune_ratio=prune_ratio, annealing=0),
    )


class Rank:
    """One rank of a run, over a connection of its own.

    Args:
        address: of the server.
        name: of the experiment, made if there is none.
    """

    def __init__(self, address: str, name: str, spec: ExperimentSpec, *, rank: int = 0, world_size: int = 1) -> None:
        self._channel = grpc.insecure_channel(address, LIMITS)
        self._stub = pb_grpc.SelectionServiceStub(self._channel)
        request = pb.CreateExperimentRequest(ref=pb.ExperimentRef(name=name), spec=spec_to_proto(spec))
        self.ref = self._stub.CreateExperiment(request).experiment.ref
        join = pb.JoinRunRequest(ref=self.ref, run_id="run", rank=rank, world_size=world_size)
        joined = self._stub.JoinRun(join)
        self._member = pb.Member(ref=self.ref, generation=joined.generation, rank=rank, claim=joined.claim)
        self._part_rows = META_BATCH_SIZE // world_size

    def __enter__(self) -> Rank:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def stream(self, epoch: int = 0, *, first_step: int = 0, max_steps: int = 0) -> Iterator[NDArray[np.uint32]]:
        """Sample ids, message by message; prior scores become an array, too."""
        for response in self._responses(epoch, first_step, max_steps):
            if response.HasField("rows"):
                np.frombuffer(response.rows.prior_scores, np.float32)
                yield np.frombuffer(response.rows.sample_ids, np.uint32)

    async def stream_over(self, channel: grpc.aio.Channel) -> AsyncIterator[int]:
        """Epoch 0 like `stream`, over a connection of an event loop: how many samples each message has."""
        call = channel.unary_stream(
            "/evosample.v1.SelectionService/StreamEpoch",
            request_serializer=pb.StreamEpochRequest.SerializeToString,
            response_deserializer=decode_event,
        )
        async for event in call(pb.StreamEpochRequest(member=self._member)):
            if isinstance(event, Rows):
                np.frombuffer(event.prior_scores, np.float32)
                yield len(np.frombuffer(event.sample_ids, np.uint32))

    def start_of(self, epoch: int) -> pb.EpochStart:
        """How an epoch begins, once it is planned."""
        return next(r.start for r in self._responses(epoch, 0, 1) if r.HasField("start"))

    def _responses(self, epoch: int, first_step: int, max_steps: int) -> Iterator[pb.StreamEpochResponse]:
        return iter(
            self._stub.StreamEpoch(
                pb.StreamEpochRequest(member=self._member, epoch=epoch, first_step=first_step, max_steps=max_steps)
            )
        )

    def report(self, start: pb.EpochStart, losses: NDArray[np.float32]) -> None:
        """Losses of the whole part, [num_steps, part rows]."""
        steps = _REPORT_BYTES // (4 * self._part_rows)
        for first in range(0, start.num_steps, steps):
            some = losses[first : first + steps]
            self._stub.ReportLosses(
                pb.ReportLossesRequest(
                    member=self._member,
                    plan_id=start.plan_id,
                    first_step=first,
                    num_steps=len(some),
                    losses=some.tobytes(),
                )
            )

    def finish(self, epoch: int, start: pb.EpochStart) -> None:
        """Say that all was reported."""
        self._stub.FinishEpoch(pb.FinishEpochRequest(member=self._member, epoch=epoch, plan_id=start.plan_id))

    def turn_s(self, epoch: int, *, beside: AbstractContextManager[object] | None = None) -> float:
        """Report random losses of an epoch, and time it from FinishEpoch to the first rows of the next one.

        Args:
            beside: what goes on meanwhile.
        """
        start = self.start_of(epoch)
        losses = np.random.default_rng(epoch).random((start.num_steps, self._part_rows), np.float32)
        self.report(start, losses)
        with beside or nullcontext():
            began_s = time.perf_counter()
            self.finish(epoch, start)
            next(self.stream(epoch + 1, max_steps=1))
            return time.perf_counter() - began_s
