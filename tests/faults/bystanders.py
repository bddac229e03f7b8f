"""Experiments that nothing may change while a server is being pestered, and twins of theirs, to compare with."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import numpy as np

from evosample.v1 import selection_pb2 as pb
from evosample.v1 import selection_pb2_grpc as pb_grpc
from faults.malformed import NUM_EPOCHS, B, N, Target, small_spec

_TIMEOUT_S = 30.0


class Job:
    """All ranks of a run on an experiment of its own, with losses that are the same every time.

    Args:
        stub: of the server.
        ref: name and project of the experiment.
        world_size: ranks that join; with 0 nobody does.
        warm_start: whether to import scores.
    """

    def __init__(
        self, stub: pb_grpc.SelectionServiceStub, ref: pb.ExperimentRef, *, world_size: int, warm_start: bool = False
    ) -> None:
        self._stub = stub
        create = pb.CreateExperimentRequest(ref=ref, spec=small_spec(seed=11, warm_start=warm_start))
        self.ref = stub.CreateExperiment(create).experiment.ref
        if warm_start:
            scores = np.random.default_rng(5).random(N, "<f4").tobytes()
            columns = pb.ImportScoresRequest(ref=self.ref, num_samples=N, scores=scores, sampling_weights=scores)
            stub.ImportScores(iter([columns]))
        self.members: list[pb.Member] = []
        self.join(world_size)

    def join(self, world_size: int) -> None:
        """Begin a run."""
        for rank in range(world_size):
            join = pb.JoinRunRequest(ref=self.ref, run_id="run", rank=rank, world_size=world_size)
            joined = self._stub.JoinRun(join)
            member = pb.Member(ref=self.ref, generation=joined.generation, rank=rank, claim=joined.claim)
            self.members.append(member)
        if world_size:
            self._begin(0)

    def _begin(self, epoch: int) -> None:
        """Wait for an epoch."""
        self.epoch, self.plan_id, self._num_steps = epoch, "", 0
        self._reported = {member.rank: 0 for member in self.members}  # steps, of ranks that have not finished
        request = pb.StreamEpochRequest(member=self.members[0], epoch=epoch)
        for response in self._stub.StreamEpoch(request, timeout=_TIMEOUT_S):
            if response.WhichOneof("event") == "start":
                self.plan_id, self._num_steps = response.start.plan_id, response.start.num_steps

    def report(self, rank: int, num_steps: int) -> None:
        """Report a rank's next steps, each on its own."""
        for step in range(self._reported[rank], self._reported[rank] + num_steps):
            losses = np.random.default_rng([self.epoch, step, rank]).gamma(2, 1, B // len(self.members))
            self._stub.ReportLosses(
                pb.ReportLossesRequest(
                    member=self.members[rank],
                    plan_id=self.plan_id,
                    first_step=step,
                    num_steps=1,
                    losses=losses.astype("<f4").tobytes(),
                )
            )
        self._reported[rank] += num_steps

    def finish(self, rank: int) -> None:
        """Report what is left, and say so."""
        self.report(rank, self._num_steps - self._reported[rank])
        del self._reported[rank]
        member = self.members[rank]
        self._stub.FinishEpoch(pb.FinishEpochRequest(member=member, epoch=self.epoch, plan_id=self.plan_id))

    def finish_epoch(self) -> None:
        """All that is left of the epoch, for all ranks."""
        for rank in list(self._reported):
            self.finish(rank)
        self._begin(self.epoch + 1)

    def pin(self, pin: str) -> None:
        """Keep the current epoch."""
        self._stub.PinEpoch(pb.PinEpochRequest(ref=self.ref, pin=pin, epoch=self.epoch))

    def delete(self) -> None:
        """Delete the experiment."""
        self._stub.DeleteExperiment(pb.DeleteExperimentRequest(ref=self.ref))

    def status(self) -> pb.Experiment:
        """What the server tells of the experiment."""
        return self._stub.GetExperiment(pb.GetExperimentRequest(ref=self.ref)).experiment

    def exported(self) -> list[bytes]:
        """All columns of all epochs that are retained."""
        columns = ("scores", "sampling_weights", "num_visits")
        exports = [
            list(self._stub.ExportScores(pb.ExportScoresRequest(ref=self.ref, epoch=epoch)))
            for epoch in self.status().retained_epochs
        ]
        return [b"".join(getattr(rows, column) for rows in export) for export in exports for column in columns]


class Bystander:
    """An experiment, its twin under a name that nobody is told, and how it stood."""

    def __init__(
        self, stub: pb_grpc.SelectionServiceStub, name: str, prepare: Callable[[Job], None], **job: Any
    ) -> None:
        name = f"{name}-{secrets.token_hex(4)}"
        self.job = Job(stub, pb.ExperimentRef(name=name), **job)
        self._twin = Job(stub, pb.ExperimentRef(project="twins", name=name), **job)
        for each in (self.job, self._twin):
            prepare(each)
        self._status, self._exported = self.job.status(), self.job.exported()

    @property
    def target(self) -> Target:
        """What a fuzzer is told of it."""
        target = Target(self.job.ref, world_size=max(len(self.job.members), 1), is_bystander=True)
        target.members.extend(self.job.members)
        if self.job.members:
            target.epoch = self.job.epoch
            target.plan_ids.append(self.job.plan_id)
        return target

    def check_unchanged(self) -> None:
        """Assert that it stands as it did, and that it goes on like its twin."""
        assert self.job.status() == self._status
        assert self.job.exported() == self._exported
        for each in (self.job, self._twin):
            if not each.members:
                each.join(1)
            if each.epoch < NUM_EPOCHS:
                each.finish_epoch()
        assert self.job.exported() == self._twin.exported()
        assert self.job.exported() != self._exported or self.job.epoch == NUM_EPOCHS

    def delete(self) -> None:
        """Leave nothing behind."""
        for each in (self.job, self._twin):
            each.delete()


def bystanders(stub: pb_grpc.SelectionServiceStub) -> list[Bystander]:
    """One in each state that an experiment can be in for long."""

    def half_reported(job: Job) -> None:
        job.finish_epoch()
        job.report(0, 2)

    def one_rank_waits(job: Job) -> None:
        job.report(1, 3)
        job.finish(0)

    def pinned(job: Job) -> None:
        job.pin("start")
        for _ in range(3):
            job.finish_epoch()
        job.report(0, 1)

    def finished(job: Job) -> None:
        while job.epoch < NUM_EPOCHS:
            job.finish_epoch()

    def untouched(job: Job) -> None: ...

    return [
        Bystander(stub, "half-reported", half_reported, world_size=1),
        Bystander(stub, "one-rank-waits", one_rank_waits, world_size=2),
        Bystander(stub, "pinned", pinned, world_size=1),
        Bystander(stub, "finished", finished, world_size=1),
        Bystander(stub, "without-run", untouched, world_size=0),
        Bystander(stub, "imported", untouched, world_size=0, warm_start=True),
    ]
