"""A server that is paused between its checks and its write: what it then writes is refused by the store itself.

The pause is made by a proxy between the server and its store, which holds the server's command: the checks have passed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

from evosample.v1 import selection_pb2 as pb
from evosample.v1 import selection_pb2_grpc as pb_grpc
from faults.harness import ReplicatedServer
from faults.proxy import Proxy
from stores import StandaloneStore, wait_until
from support import fixed_losses

N, B = 200, 20
StartReplica = Callable[..., ReplicatedServer]


class Rig:
    """Two servers on one store, the first of which can be paused in front of it."""

    def __init__(self, proxy: Proxy, slow: pb_grpc.SelectionServiceStub, quick: pb_grpc.SelectionServiceStub) -> None:
        self.proxy, self.slow, self.quick = proxy, slow, quick
        self.losses = fixed_losses(N, 1)[0]
        self._pool = ThreadPoolExecutor(1)

    def create(self, name: str) -> pb.ExperimentRef:
        spec = pb.ExperimentSpec(num_samples=N, num_epochs=4, meta_batch_size=B, mini_batch_size=5)
        spec.evolved_sampling.prune_ratio = 0.2
        request = pb.CreateExperimentRequest(ref=pb.ExperimentRef(name=name), spec=spec)
        return self.quick.CreateExperiment(request).experiment.ref

    def join(self, ref: pb.ExperimentRef, run_id: str = "run") -> pb.Member:
        joined = self.quick.JoinRun(pb.JoinRunRequest(ref=ref, run_id=run_id, world_size=1))
        return pb.Member(ref=ref, generation=joined.generation, claim=joined.claim)

    def plan_id(self, member: pb.Member, epoch: int) -> str:
        request = pb.StreamEpochRequest(member=member, epoch=epoch, max_steps=1)
        return next(r.start.plan_id for r in self.quick.StreamEpoch(request, timeout=30) if r.HasField("start"))

    def report(self, member: pb.Member, plan_id: str, losses: Any) -> pb.ReportLossesRequest:
        return pb.ReportLossesRequest(
            member=member, plan_id=plan_id, num_steps=len(losses) // B, losses=losses.astype("<f4").tobytes()
        )

    def finish(self, member: pb.Member, epoch: int, plan_id: str) -> None:
        self.quick.FinishEpoch(pb.FinishEpochRequest(member=member, epoch=epoch, plan_id=plan_id))

    def scores(self, ref: pb.ExperimentRef) -> bytes:
        return b"".join(part.scores for part in self.quick.ExportScores(pb.ExportScoresRequest(ref=ref)))

    def held(self, pattern: bytes, call: Callable[[], Any]) -> Future[Any]:
        """Begin a call and return once its write is held."""
        self.proxy.hold(pattern)
        future = self._pool.submit(call)
        assert self.proxy.held.wait(20)
        return future


@pytest.fixture
def rig(store: StandaloneStore, start_replica: StartReplica) -> Iterator[Rig]:
    with Proxy(f"127.0.0.1:{store.port}") as proxy:
        servers = [start_replica(redis_url=f"redis://{proxy.address}"), start_replica()]
        with grpc.insecure_channel(servers[0].address) as slow, grpc.insecure_channel(servers[1].address) as quick:
            yield Rig(proxy, pb_grpc.SelectionServiceStub(slow), pb_grpc.SelectionServiceStub(quick))


def code_and_reason(future: Future[Any]) -> tuple[str, str]:
    error: Any = future.exception(20)
    assert isinstance(error, grpc.RpcError)
    return error.code().name, str(error.details())


def test_a_report_that_comes_after_its_epoch_has_ended_is_refused(rig: Rig) -> None:
    ref = rig.create("e")
    member = rig.join(ref)
    plan_id = rig.plan_id(member, 0)
    late = rig.held(b":loss:", lambda: rig.slow.ReportLosses(rig.report(member, plan_id, rig.losses[:B] + 100)))
    rig.quick.ReportLosses(rig.report(member, plan_id, rig.losses))
    rig.finish(member, 0, plan_id)
    rig.plan_id(member, 1)
    before = rig.scores(ref)
    rig.proxy.release()
    assert code_and_reason(late)[0] == "FAILED_PRECONDITION"
    assert rig.scores(ref) == before


def test_a_report_that_comes_after_another_run_has_joined_is_refused(rig: Rig) -> None:
    ref = rig.create("e")
    member = rig.join(ref)
    plan_id = rig.plan_id(member, 0)
    late = rig.held(b":loss:", lambda: rig.slow.ReportLosses(rig.report(member, plan_id, rig.losses[:B] + 100)))
    newer = rig.join(ref, "another")
    rig.proxy.release()
    assert code_and_reason(late)[0] == "ABORTED"
    rig.quick.ReportLosses(rig.report(newer, plan_id, rig.losses))
    rig.finish(newer, 0, plan_id)
    rig.plan_id(newer, 1)
    twin = rig.create("twin")
    member = rig.join(twin)
    plan_id = rig.plan_id(member, 0)
    rig.quick.ReportLosses(rig.report(member, plan_id, rig.losses))
    rig.finish(member, 0, plan_id)
    rig.plan_id(member, 1)
    assert rig.scores(ref) == rig.scores(twin)


def test_a_report_that_comes_after_its_experiment_was_deleted_is_refused(rig: Rig, store: StandaloneStore) -> None:
    ref = rig.create("e")
    member = rig.join(ref)
    plan_id = rig.plan_id(member, 0)
    late = rig.held(b":loss:", lambda: rig.slow.ReportLosses(rig.report(member, plan_id, rig.losses)))
    rig.quick.DeleteExperiment(pb.DeleteExperimentRequest(ref=ref))
    rig.proxy.release()
    assert code_and_reason(late)[0] == "NOT_FOUND"
    with store.client() as client:
        assert client.keys("evosample:{*") == []


def test_a_finish_of_a_run_that_was_superseded_ends_nobody_elses_epoch(rig: Rig) -> None:
    ref = rig.create("e")
    member = rig.join(ref)
    plan_id = rig.plan_id(member, 0)
    request = pb.FinishEpochRequest(member=member, plan_id=plan_id)
    late = rig.held(b":finished", lambda: rig.slow.FinishEpoch(request))
    newer = rig.join(ref, "another")
    rig.proxy.release()
    assert code_and_reason(late)[0] == "ABORTED"
    found = rig.quick.GetExperiment(pb.GetExperimentRequest(ref=ref)).experiment
    assert found.state == pb.EXPERIMENT_STATE_OPEN
    assert not found.finished_ranks
    assert rig.plan_id(newer, 0) == plan_id


def test_a_commit_that_comes_after_another_planner_has_made_the_turn_changes_nothing(
    rig: Rig, store: StandaloneStore
) -> None:
    ref = rig.create("e")
    member = rig.join(ref)
    plan_id = rig.plan_id(member, 0)
    rig.quick.ReportLosses(rig.report(member, plan_id, rig.losses))
    rig.proxy.hold(b"$6\r\nsealed\r\n")  # of the commit: what it expects the head's state to be
    rig.slow.FinishEpoch(pb.FinishEpochRequest(member=member, plan_id=plan_id))
    assert rig.proxy.held.wait(20)
    taken_over = rig.plan_id(member, 1)  # the other server has taken over when the lock has run out
    before = rig.scores(ref)
    with store.client() as client:
        plans = client.hgetall(next(iter(client.keys("evosample:*:plans"))))
        rig.proxy.release()
        released = threading.Event()
        for _ in range(100):
            if len(plans) <= 2:  # of the two retained epochs: the plan that lost has been collected
                break
            released.wait(0.1)
            plans = client.hgetall(next(iter(client.keys("evosample:*:plans"))))
        assert len(plans) == 2
    assert rig.plan_id(member, 1) == taken_over
    assert rig.scores(ref) == before


def test_what_a_dead_run_has_left_behind_changes_nothing(rig: Rig) -> None:
    ref = rig.create("e")
    dead = rig.join(ref)
    plan_id = rig.plan_id(dead, 0)
    rig.quick.ReportLosses(rig.report(dead, plan_id, rig.losses + 5))
    living = rig.join(ref, "another")
    assert np.isfinite(rig.losses).all()
    rig.quick.ReportLosses(rig.report(living, plan_id, rig.losses))
    rig.finish(living, 0, plan_id)
    rig.plan_id(living, 1)
    expected = 0.8 * np.float32(1 / N) + 0.2 * np.sort(rig.losses)
    scores = np.sort(np.frombuffer(rig.scores(ref), "<f4"))
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_blocks_that_come_after_their_experiment_was_deleted_do_not_come_back(rig: Rig, store: StandaloneStore) -> None:
    ref = rig.create("e")
    member = rig.join(ref)
    plan_id = rig.plan_id(member, 0)
    rig.quick.ReportLosses(rig.report(member, plan_id, rig.losses))
    request = pb.FinishEpochRequest(member=member, plan_id=plan_id)
    rig.held(b":score:0:staged", lambda: rig.slow.FinishEpoch(request)).result(20)
    rig.quick.DeleteExperiment(pb.DeleteExperimentRequest(ref=ref))
    with store.client() as client:

        def num_unlinked() -> int:
            return int(client.info("commandstats")["cmdstat_unlink"]["calls"])

        before = num_unlinked()
        rig.proxy.release()
        wait_until(lambda: num_unlinked() > before, "the blocks to be unlinked")
        wait_until(lambda: client.keys("evosample:{*") == [], "nothing to be left")


@pytest.mark.parametrize("lost", ["nothing", "the answer", "a block"])
def test_a_turn_comes_to_the_same_whatever_becomes_of_its_staged_blocks(
    rig: Rig, store: StandaloneStore, lost: str
) -> None:
    ref, twin = rig.create("e"), rig.create("twin")
    for made in (twin, ref):
        member = rig.join(made)
        plan_id = rig.plan_id(member, 0)
        rig.quick.ReportLosses(rig.report(member, plan_id, rig.losses))
        if made == twin:
            rig.finish(member, 0, plan_id)
            rig.plan_id(member, 1)
    with store.client() as client:
        key = next(key for key in client.keys("evosample:{default/e}:*:score:0"))
        request = pb.FinishEpochRequest(member=member, plan_id=plan_id)
        keeping = b":score:0:staged\r\n$%d\r\n" % len(key)  # what the script is given
        rig.held(keeping, lambda: rig.slow.FinishEpoch(request)).result(20)
        staged = client.keys("*:staged")
        assert len(staged) == 8, "six columns of scores, two of the table"
        assert all(0 < client.pttl(block) <= 120_000 for block in staged), "what a dead writer leaves expires"
        if lost == "the answer":  # to the same script, sent before
            for block in staged:
                client.rename(block, block.removesuffix(b":staged"))
                client.persist(block.removesuffix(b":staged"))
        elif lost == "a block":
            client.delete(staged[0])
        rig.proxy.release()
        rig.plan_id(member, 1)
        assert rig.scores(ref) == rig.scores(twin)
        assert all(client.pttl(block) > 0 for block in client.keys("*:staged"))
        plans = client.keys("evosample:{default/e}:*:plans")[0]
        wait_until(lambda: client.hlen(plans) == 2, "only the retained epochs to be left")
        blocks = client.keys("evosample:{default/e}:*:score:0")
        assert len(blocks) == 2
        assert all(client.pttl(block) == -1 for block in blocks)
