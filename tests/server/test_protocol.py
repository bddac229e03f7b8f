"""The protocol as a client in any language meets it: over a raw channel, without evosample's own client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

import evosample
from evosample.sampling import ExperimentSpec, checksum, initial_scores, part, plan_epoch
from evosample.v1 import selection_pb2 as pb
from evosample.v1 import selection_pb2_grpc as pb_grpc
from evosample.wire import spec_to_proto
from support import ServerProcess, fixed_losses, train

N, B, CHOSEN = 200, 24, 6


@pytest.fixture
def stub(server: ServerProcess) -> Iterator[pb_grpc.SelectionServiceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield pb_grpc.SelectionServiceStub(channel)


def spec(**changes: Any) -> pb.ExperimentSpec:
    message = pb.ExperimentSpec(num_samples=N, num_epochs=4, meta_batch_size=B, mini_batch_size=CHOSEN, seed=3)
    message.evolved_sampling.prune_ratio = 0.25
    for path, value in changes.items():
        *parents, field = path.split("__")
        target: Any = message
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, field, value)
    return message


class Job:
    """One rank of a run on an experiment of its own."""

    def __init__(self, stub: pb_grpc.SelectionServiceStub, name: str, *, run_id: str = "run", **joining: Any) -> None:
        self.stub = stub
        self.ref = stub.CreateExperiment(
            pb.CreateExperimentRequest(ref=pb.ExperimentRef(name=name), spec=spec())
        ).experiment.ref
        joined = stub.JoinRun(
            pb.JoinRunRequest(ref=self.ref, run_id=run_id, rank=0, world_size=joining.get("world_size", 1))
        )
        self.member = pb.Member(ref=self.ref, generation=joined.generation, rank=0, claim=joined.claim)

    def stream(self, epoch: int, **request: Any) -> tuple[pb.EpochStart, list[pb.EpochRows]]:
        responses = list(
            self.stub.StreamEpoch(pb.StreamEpochRequest(member=self.member, epoch=epoch, **request), timeout=20)
        )
        starts = [response.start for response in responses if response.WhichOneof("event") == "start"]
        rows = [response.rows for response in responses if response.WhichOneof("event") == "rows"]
        return (starts or [pb.EpochStart()])[0], rows

    def report(self, plan_id: str, losses: Any, first_step: int = 0, num_steps: int | None = None) -> Any:
        return self.stub.ReportLosses(
            pb.ReportLossesRequest(
                member=self.member,
                plan_id=plan_id,
                first_step=first_step,
                num_steps=len(losses) // B if num_steps is None else num_steps,
                losses=np.asarray(losses, "<f4").tobytes(),
            )
        )

    def finish(self, epoch: int, plan_id: str, **request: Any) -> pb.FinishEpochResponse:
        return self.stub.FinishEpoch(pb.FinishEpochRequest(member=self.member, epoch=epoch, plan_id=plan_id, **request))

    def export(self, **request: Any) -> list[bytes]:
        responses = list(self.stub.ExportScores(pb.ExportScoresRequest(ref=self.ref, **request)))
        return [b"".join(getattr(r, c) for r in responses) for c in ("scores", "sampling_weights", "num_visits")]


def refused(call: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[str, str, str]:
    """Code, field or reason, and message of a call that must fail."""

    def complete() -> None:
        result = call(*arguments, **named)
        if hasattr(result, "__next__"):
            list(result)

    with pytest.raises(grpc.RpcError) as caught:
        complete()
    error: Any = caught.value
    (detail,) = rpc_status.from_call(error).details
    bad_request, info = error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo()
    if detail.Unpack(bad_request):
        assert bad_request.field_violations[0].description == error.details()
        return error.code().name, bad_request.field_violations[0].field, error.details()
    detail.Unpack(info)
    assert info.domain == "evosample"
    return error.code().name, info.reason, error.details()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 2**63}, "num_samples"),
        ({"num_epochs": 0}, "num_epochs"),
        ({"num_epochs": 2**31}, "num_epochs"),
        ({"meta_batch_size": 0}, "meta_batch_size"),
        ({"meta_batch_size": N + 1}, "meta_batch_size"),
        ({"mini_batch_size": 0}, "mini_batch_size"),
        ({"mini_batch_size": B + 1}, "mini_batch_size"),
        ({"evolved_sampling__prune_ratio": 1.0}, "prune_ratio"),
        ({"evolved_sampling__prune_ratio": float("nan")}, "prune_ratio"),
        ({"evolved_sampling__beta1": -0.1}, "beta1"),
        ({"evolved_sampling__beta2": 1.5}, "beta2"),
        ({"evolved_sampling__annealing": 2.0}, "annealing"),
        ({"evolved_sampling__annealing": 0.6}, "num_epochs"),
        ({"importance_weight": 17}, "importance_weight"),
        ({"mini_batch_size": B, "evolved_sampling__prune_ratio": 0.0}, "policy"),
        ({"mini_batch_size": B, "evolved_sampling__set_draw": pb.DRAW_METHOD_TOP_K}, "set_draw"),
    ],
)
def test_a_bad_spec_is_refused_with_its_field_and_creates_nothing(
    stub: pb_grpc.SelectionServiceStub, name: str, changes: dict[str, Any], field: str
) -> None:
    ref = pb.ExperimentRef(name=name)
    request = pb.CreateExperimentRequest(ref=ref, spec=spec(**changes))
    code, refused_field, message = refused(stub.CreateExperiment, request)
    assert (code, refused_field) == ("INVALID_ARGUMENT", field)
    assert f"{field}=" in message
    assert "expected" in message
    assert refused(stub.GetExperiment, pb.GetExperimentRequest(ref=ref))[0] == "NOT_FOUND"


def test_a_spec_without_a_policy_is_refused(stub: pb_grpc.SelectionServiceStub, name: str) -> None:
    message = spec()
    message.ClearField("evolved_sampling")
    request = pb.CreateExperimentRequest(ref=pb.ExperimentRef(name=name), spec=message)
    assert refused(stub.CreateExperiment, request)[:2] == ("INVALID_ARGUMENT", "policy")


@pytest.mark.parametrize("bad", ["", "a{b}", "a/b", "a\nb", "a\0b", "-a", "a b", "ü", "a" * 129])
def test_names_that_could_not_be_keys_are_refused(stub: pb_grpc.SelectionServiceStub, bad: str) -> None:
    refs = {"name": pb.ExperimentRef(name=bad)}
    if bad:
        refs["project"] = pb.ExperimentRef(project=bad, name="good")
    for field, ref in refs.items():
        create = pb.CreateExperimentRequest(ref=ref, spec=spec())
        assert refused(stub.CreateExperiment, create)[:2] == ("INVALID_ARGUMENT", field)
        get = pb.GetExperimentRequest(ref=ref)
        assert refused(stub.GetExperiment, get)[:2] == ("INVALID_ARGUMENT", field)


def test_unknown_experiments_and_stale_uids_are_not_found(stub: pb_grpc.SelectionServiceStub, name: str) -> None:
    unknown = pb.ExperimentRef(name=name)
    for call in (
        lambda: stub.GetExperiment(pb.GetExperimentRequest(ref=unknown)),
        lambda: stub.DeleteExperiment(pb.DeleteExperimentRequest(ref=unknown)),
        lambda: stub.ExportScores(pb.ExportScoresRequest(ref=unknown)),
    ):
        assert refused(call)[:2] == ("NOT_FOUND", "ref.name")
    job = Job(stub, name)
    plan_id = job.stream(0)[0].plan_id
    stub.DeleteExperiment(pb.DeleteExperimentRequest(ref=job.ref))
    Job(stub, name)
    for stale in (
        lambda: stub.GetExperiment(pb.GetExperimentRequest(ref=job.ref)),
        lambda: stub.DeleteExperiment(pb.DeleteExperimentRequest(ref=job.ref)),
        lambda: stub.JoinRun(pb.JoinRunRequest(ref=job.ref, run_id="r", world_size=1)),
        lambda: stub.StreamEpoch(pb.StreamEpochRequest(member=job.member)),
        lambda: job.report(plan_id, np.ones(B)),
        lambda: job.finish(0, plan_id),
        job.export,
    ):
        code, field, message = refused(stale)
        assert (code, field) == ("NOT_FOUND", "ref.uid")
        assert job.ref.uid in message


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"world_size": 0}, "world_size"),
        ({"world_size": 5}, "world_size"),
        ({"world_size": 8}, "world_size"),
        ({"world_size": 2, "rank": 2}, "rank"),
        ({"run_id": ""}, "run_id"),
        ({"run_id": "a/b"}, "run_id"),
        ({"position": pb.Position(epoch=99)}, "position.epoch"),
        ({"position": pb.Position(epoch=0, step=10_000)}, "position.step"),
    ],
)
def test_a_bad_join_is_refused_and_supersedes_nobody(
    stub: pb_grpc.SelectionServiceStub, name: str, changes: dict[str, Any], field: str
) -> None:
    job = Job(stub, name)
    joining: dict[str, Any] = {"ref": job.ref, "run_id": "other", "rank": 0, "world_size": 1}
    request = pb.JoinRunRequest(**(joining | changes))
    assert refused(stub.JoinRun, request)[:2] == ("INVALID_ARGUMENT", field)
    assert job.stream(0)[0].num_steps == N // B


def test_ranks_of_a_run_must_agree_on_world_size_and_position(stub: pb_grpc.SelectionServiceStub, name: str) -> None:
    job = Job(stub, name, world_size=2)
    for world_size, step, field in [(3, 0, "world_size"), (2, 1, "position")]:
        request = pb.JoinRunRequest(
            ref=job.ref, run_id="run", rank=1, world_size=world_size, position=pb.Position(epoch=0, step=step)
        )
        assert refused(stub.JoinRun, request)[:2] == ("INVALID_ARGUMENT", field)


def test_bad_losses_are_refused_and_change_nothing(stub: pb_grpc.SelectionServiceStub, name: str) -> None:
    job = Job(stub, name)
    start, _ = job.stream(0)
    step = fixed_losses(B, 1)[0]
    negative = step.copy()
    negative[5] = -0.5
    for losses, changes, field in [
        (step[:-1], {"num_steps": 1}, "losses"),
        (step, {"num_steps": 2}, "losses"),
        (step, {"num_steps": 0}, "num_steps"),
        (step, {"first_step": start.num_steps, "num_steps": 1}, "first_step"),
        (np.tile(step, 2), {"first_step": start.num_steps - 1}, "num_steps"),
        (negative, {}, "losses"),
    ]:
        code, refused_field, message = refused(job.report, start.plan_id, losses, **changes)
        assert (code, refused_field) == ("INVALID_ARGUMENT", field)
        assert "expected" in message
    assert "minus a constant" in message
    select = pb.SelectMiniBatchRequest(member=job.member, plan_id=start.plan_id, losses=negative.tobytes())
    assert refused(stub.SelectMiniBatch, select)[:2] == ("INVALID_ARGUMENT", "losses")
    for _ in range(2):
        missing = job.finish(0, start.plan_id, reported_rows=start.num_steps * B).missing_steps
        assert [(steps.first_step, steps.num_steps) for steps in missing] == [(0, start.num_steps)]


def test_a_report_sent_twice_counts_once(stub: pb_grpc.SelectionServiceStub, name: str) -> None:
    exports = []
    for times, each in [(1, f"{name}-once"), (3, f"{name}-thrice")]:
        job = Job(stub, each)
        start, _ = job.stream(0)
        losses = fixed_losses(start.num_steps * B, 1)[0]
        for _ in range(times):
            for first_step in range(0, start.num_steps, 3):
                stop = min(first_step + 3, start.num_steps)
                job.report(start.plan_id, losses[first_step * B : stop * B], first_step)
        for _ in range(times):
            finished = job.finish(0, start.plan_id, reported_rows=len(losses), checksum=checksum(losses))
            assert not finished.missing_steps
        job.stream(1)
        for _ in range(times):
            assert not job.finish(0, start.plan_id).missing_steps
        exports.append(job.export())
        assert np.frombuffer(exports[-1][2], "<u2").max() == 1
    assert exports[0] == exports[1]


def test_finishing_with_other_losses_than_were_recorded_names_what_to_send_again(
    stub: pb_grpc.SelectionServiceStub, name: str
) -> None:
    job = Job(stub, name)
    start, _ = job.stream(0)
    losses = fixed_losses(start.num_steps * B, 1)[0]
    for step in (0, 1, 4, 6):
        job.report(start.plan_id, losses[step * B : (step + 1) * B], step)
    told = {"reported_rows": len(losses), "checksum": checksum(losses)}
    missing = job.finish(0, start.plan_id, **told).missing_steps
    assert [(steps.first_step, steps.num_steps) for steps in missing] == [(2, 2), (5, 1), (7, 1)]
    job.report(start.plan_id, losses + 1)  # as many as announced, but others
    missing = job.finish(0, start.plan_id, **told).missing_steps
    assert [(steps.first_step, steps.num_steps) for steps in missing] == [(0, start.num_steps)]
    job.report(start.plan_id, losses)
    assert not job.finish(0, start.plan_id, **told).missing_steps


def test_the_last_report_may_come_with_the_end_of_an_epoch_and_again(
    stub: pb_grpc.SelectionServiceStub, name: str
) -> None:
    exported = []
    for is_last_apart in (True, False):
        job = Job(stub, f"{name}-{is_last_apart}")
        start, _ = job.stream(0)
        losses = fixed_losses(start.num_steps * B, 1)[0]
        first, count = start.num_steps - 3, 3
        job.report(start.plan_id, losses[: first * B])
        told: dict[str, Any] = {"reported_rows": len(losses), "checksum": checksum(losses)}
        if is_last_apart:
            job.report(start.plan_id, losses[first * B :], first)
        else:
            bad = pb.ReportLossesRequest(first_step=first, num_steps=count, losses=b"123")
            assert refused(job.finish, 0, start.plan_id, last_report=bad)[:2] == ("INVALID_ARGUMENT", "losses")
            last = losses[first * B :].tobytes()
            told["last_report"] = pb.ReportLossesRequest(first_step=first, num_steps=count, losses=last)
        assert not job.finish(0, start.plan_id, **told).missing_steps
        assert not job.finish(0, start.plan_id, **told).missing_steps, "the answer may have got lost"
        job.stream(1)
        assert not job.finish(0, start.plan_id, **told).missing_steps, "also once the next epoch has begun"
        exported.append(job.export())
    assert exported[0] == exported[1]


def test_the_last_report_of_a_rank_without_which_an_epoch_has_ended_is_refused(
    stub: pb_grpc.SelectionServiceStub, name: str
) -> None:
    job = Job(stub, name, world_size=2)
    joined = stub.JoinRun(pb.JoinRunRequest(ref=job.ref, run_id="run", rank=1, world_size=2))
    late = pb.Member(ref=job.ref, generation=joined.generation, rank=1, claim=joined.claim)
    start, _ = job.stream(0)
    report = pb.ReportLossesRequest(num_steps=1, losses=np.ones(B // 2, "<f4").tobytes())
    request = pb.FinishEpochRequest(member=late, plan_id=start.plan_id, last_report=report)
    job.finish(0, start.plan_id)
    stub.ForceFinishEpoch(pb.ForceFinishEpochRequest(ref=job.ref, epoch=0))
    assert refused(stub.FinishEpoch, request)[:2] == ("FAILED_PRECONDITION", "EPOCH_CLOSED")
    job.stream(1)
    assert refused(stub.FinishEpoch, request)[:2] == ("FAILED_PRECONDITION", "EPOCH_CLOSED")


def test_losses_for_an_epoch_that_is_over_are_refused(stub: pb_grpc.SelectionServiceStub, name: str) -> None:
    job = Job(stub, name)
    start, _ = job.stream(0)
    job.finish(0, start.plan_id)
    job.stream(1)
    before = job.export()
    assert refused(job.report, start.plan_id, np.ones(B))[:2] == ("FAILED_PRECONDITION", "EPOCH_CLOSED")
    select = pb.SelectMiniBatchRequest(member=job.member, plan_id=start.plan_id, losses=np.ones(B, "<f4").tobytes())
    assert refused(stub.SelectMiniBatch, select)[:2] == ("FAILED_PRECONDITION", "EPOCH_CLOSED")
    assert refused(job.stream, 0)[:2] == ("FAILED_PRECONDITION", "EPOCH_CLOSED")
    assert job.export() == before


def test_what_an_older_run_or_an_older_process_of_a_rank_sends_is_refused(
    stub: pb_grpc.SelectionServiceStub, name: str
) -> None:
    first = Job(stub, name)
    plan_id = first.stream(0)[0].plan_id
    second = Job(stub, name)  # the same run and rank: another process
    third = Job(stub, name, run_id="another")
    for old, what in [(first, "run 1"), (second, "run 1")]:
        for call in (
            partial(old.stream, 0),
            partial(old.report, plan_id, np.ones(B)),
            partial(old.finish, 0, plan_id),
        ):
            code, reason, message = refused(call)
            assert (code, reason) == ("ABORTED", "SUPERSEDED")
            assert what in message
    third.report(plan_id, np.ones(B))


def test_a_restarted_rank_has_not_finished_what_its_earlier_process_had(
    stub: pb_grpc.SelectionServiceStub, name: str
) -> None:
    earlier = Job(stub, name, world_size=2)
    plan_id = earlier.stream(0)[0].plan_id
    assert earlier.finish(0, plan_id).waiting_for_ranks == [1]
    restarted = Job(stub, name, world_size=2)
    joined = stub.JoinRun(pb.JoinRunRequest(ref=restarted.ref, run_id="run", rank=1, world_size=2))
    other = pb.Member(ref=restarted.ref, generation=joined.generation, rank=1, claim=joined.claim)
    finished = stub.FinishEpoch(pb.FinishEpochRequest(member=other, plan_id=plan_id))
    assert finished.waiting_for_ranks == [0]
    restarted.report(plan_id, np.ones(B // 2), num_steps=1)


def test_which_of_many_ranks_have_finished_is_told(stub: pb_grpc.SelectionServiceStub, name: str) -> None:
    of_many = spec(meta_batch_size=20, mini_batch_size=10)
    request = pb.CreateExperimentRequest(ref=pb.ExperimentRef(name=name), spec=of_many)
    ref = stub.CreateExperiment(request).experiment.ref
    members = []
    for rank in range(10):
        joined = stub.JoinRun(pb.JoinRunRequest(ref=ref, run_id="run", rank=rank, world_size=10))
        members.append(pb.Member(ref=ref, generation=joined.generation, rank=rank, claim=joined.claim))

    def start_of(epoch: int) -> pb.EpochStart:
        responses = stub.StreamEpoch(pb.StreamEpochRequest(member=members[0], epoch=epoch), timeout=20)
        return next(response.start for response in responses if response.HasField("start"))

    plan_id = start_of(0).plan_id
    for rank in (9, 0, 8):
        answer = stub.FinishEpoch(pb.FinishEpochRequest(member=members[rank], plan_id=plan_id))
    assert list(answer.waiting_for_ranks) == [1, 2, 3, 4, 5, 6, 7]
    assert list(stub.GetExperiment(pb.GetExperimentRequest(ref=ref)).experiment.finished_ranks) == [0, 8, 9]
    forced = stub.ForceFinishEpoch(pb.ForceFinishEpochRequest(ref=ref, epoch=0))
    assert list(forced.skipped_ranks) == list(start_of(1).skipped_ranks) == [1, 2, 3, 4, 5, 6, 7]
    for rank in range(9):
        answer = stub.FinishEpoch(pb.FinishEpochRequest(member=members[rank], epoch=1, plan_id=start_of(1).plan_id))
    assert list(answer.waiting_for_ranks) == [9]


def test_a_thin_client_gets_the_choices_that_other_clients_draw_themselves(
    client: evosample.Client, stub: pb_grpc.SelectionServiceStub, name: str
) -> None:
    settings: dict[str, Any] = {
        "num_samples": N,
        "num_epochs": 4,
        "meta_batch_size": B,
        "mini_batch_size": CHOSEN,
        "seed": 3,
    }
    policy = evosample.EvolvedSampling(prune_ratio=0.25)
    losses = fixed_losses(N, 4)
    local = client.create_experiment(f"{name}-local", **settings, policy=policy)
    expected = [visit.key() for visit in train(local, losses)]
    job = Job(stub, name)
    met = []
    for epoch in range(4):
        start, chunks = job.stream(epoch)
        ids = np.concatenate([np.frombuffer(chunk.sample_ids, "<u4") for chunk in chunks]).reshape(-1, B)
        for step in range(start.num_steps):
            request = pb.SelectMiniBatchRequest(
                member=job.member, plan_id=start.plan_id, step=step, losses=losses[epoch, ids[step]].tobytes()
            )
            chosen = stub.SelectMiniBatch(request)
            positions = np.frombuffer(chosen.positions, "<u4").tolist()
            met.append((epoch, step, 0, ids[step].tolist(), positions, chosen.importance_weights))
        job.finish(epoch, start.plan_id)
    assert met == expected
    job.stream(4)
    np.testing.assert_array_equal(np.frombuffer(job.export()[0], "<f4"), local.export_scores().scores)


def test_one_message_carries_many_steps_up_to_about_half_a_mebibyte(
    stub: pb_grpc.SelectionServiceStub, name: str
) -> None:
    ref = pb.ExperimentRef(name=name)
    big = spec(num_samples=1_000_000, meta_batch_size=256)
    ref = stub.CreateExperiment(pb.CreateExperimentRequest(ref=ref, spec=big)).experiment.ref
    joined = stub.JoinRun(pb.JoinRunRequest(ref=ref, run_id="run", world_size=2))
    member = pb.Member(ref=ref, generation=joined.generation, rank=0, claim=joined.claim)
    responses = list(stub.StreamEpoch(pb.StreamEpochRequest(member=member)))
    sizes = [response.ByteSize() for response in responses[1:]]
    assert responses[0].start.num_steps == sum(response.rows.num_steps for response in responses[1:]) == 3906
    assert len(sizes) == 8
    assert max(sizes) < 1.01 * 2**19
    assert min(sizes[:-1]) > 0.99 * 2**19
    stub.DeleteExperiment(pb.DeleteExperimentRequest(ref=ref))


def test_a_stream_may_begin_and_end_at_any_step(stub: pb_grpc.SelectionServiceStub, name: str) -> None:
    job = Job(stub, name)
    whole = b"".join(chunk.sample_ids for chunk in job.stream(0)[1])
    _, (middle,) = job.stream(0, first_step=2, max_steps=3)
    assert (middle.first_step, middle.num_steps) == (2, 3)
    assert middle.sample_ids == whole[2 * B * 4 : 5 * B * 4]
    assert job.stream(0, first_step=N // B)[1] == []


def test_who_is_waited_for_is_said(stub: pb_grpc.SelectionServiceStub, name: str) -> None:
    job = Job(stub, name, world_size=2)
    start, _ = job.stream(0)
    assert job.finish(0, start.plan_id).waiting_for_ranks == [1]
    waiting = stub.StreamEpoch(pb.StreamEpochRequest(member=job.member, epoch=1), timeout=20)
    assert next(waiting).wait.waiting_for_ranks == [1]
    waiting.cancel()


def test_creating_is_idempotent_and_another_spec_names_what_differs(
    stub: pb_grpc.SelectionServiceStub, name: str
) -> None:
    ref = pb.ExperimentRef(name=name)
    first = stub.CreateExperiment(pb.CreateExperimentRequest(ref=ref, spec=spec()))
    assert stub.CreateExperiment(pb.CreateExperimentRequest(ref=ref, spec=spec())) == first
    other = pb.CreateExperimentRequest(ref=ref, spec=spec(seed=4, evolved_sampling__prune_ratio=0.1))
    code, _, message = refused(stub.CreateExperiment, other)
    assert code == "ALREADY_EXISTS"
    assert "seed is 3, not 4" in message
    assert "prune_ratio=0.25" in message


def test_listing_is_paged_and_in_order(stub: pb_grpc.SelectionServiceStub) -> None:
    for i in (2, 0, 1):
        ref = pb.ExperimentRef(project="paged", name=f"e{i}")
        stub.CreateExperiment(pb.CreateExperimentRequest(ref=ref, spec=spec()))
    first = stub.ListExperiments(pb.ListExperimentsRequest(project="paged", page_size=2))
    second = stub.ListExperiments(
        pb.ListExperimentsRequest(project="paged", page_size=2, page_token=first.next_page_token)
    )
    assert [e.ref.name for e in first.experiments] == ["e0", "e1"]
    assert [e.ref.name for e in second.experiments] == ["e2"]
    assert not second.next_page_token
    bad = pb.ListExperimentsRequest(project="paged", page_size=10_000)
    assert refused(stub.ListExperiments, bad)[:2] == ("INVALID_ARGUMENT", "page_size")


def test_a_page_of_experiments_with_very_many_shards_stays_within_a_message(
    stub: pb_grpc.SelectionServiceStub,
) -> None:
    many = pb.ExperimentSpec(num_samples=100_000, num_epochs=4, meta_batch_size=B, uniform=pb.Uniform())
    many.shard_sizes.extend([1] * 100_000)
    for i in range(5):
        ref = pb.ExperimentRef(project="sharded", name=f"e{i}")
        stub.CreateExperiment(pb.CreateExperimentRequest(ref=ref, spec=many))
    found, token = [], ""
    while True:
        page = stub.ListExperiments(pb.ListExperimentsRequest(project="sharded", page_token=token))
        assert page.ByteSize() < 2**21
        found += [e.ref.name for e in page.experiments]
        token = page.next_page_token
        if not token:
            break
    assert found == [f"e{i}" for i in range(5)]
    other = pb.CreateExperimentRequest(ref=pb.ExperimentRef(project="sharded", name="e0"), spec=many)
    other.spec.shard_sizes[:2] = [2]
    code, _, message = refused(stub.CreateExperiment, other)
    assert code == "ALREADY_EXISTS"
    assert message.count("1") < 1000
    assert "shard_sizes is (1, 1" in message


def test_what_is_sent_again_does_not_set_a_rank_s_progress_back(stub: pb_grpc.SelectionServiceStub, name: str) -> None:
    job = Job(stub, name)
    plan_id = job.stream(0)[0].plan_id
    losses = np.arange(1, 6 * B + 1)
    job.report(plan_id, losses)
    job.report(plan_id, losses[: 2 * B])
    (watched,) = stub.WatchExperiment(pb.WatchExperimentRequest(ref=job.ref, once=True))
    (rank,) = watched.ranks
    assert (rank.rank, rank.epoch, rank.step) == (0, 0, 6)
    assert rank.mean_loss == losses[: 2 * B].mean()
    job.report(plan_id, np.full(B, np.nan), first_step=6)
    (watched,) = stub.WatchExperiment(pb.WatchExperimentRequest(ref=job.ref, once=True))
    (rank,) = watched.ranks
    assert rank.step == 7
    assert not rank.HasField("mean_loss")


def test_health_and_reflection_are_served(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "evosample.v1.SelectionService"):
            status = health.Check(health_pb2.HealthCheckRequest(service=service)).status
            assert status == health_pb2.HealthCheckResponse.SERVING
        assert "evosample.v1.SelectionService" in ProtoReflectionDescriptorDatabase(channel).get_services()


def test_scores_of_epochs_that_are_no_longer_retained_are_refused(
    stub: pb_grpc.SelectionServiceStub, name: str
) -> None:
    job = Job(stub, name)
    for epoch in range(3):
        job.finish(epoch, job.stream(epoch)[0].plan_id)
    job.stream(3)
    for epoch in (2, 3):
        assert len(job.export(epoch=epoch)[0]) == 4 * N
    code, _, message = refused(job.export, epoch=1)
    assert code == "FAILED_PRECONDITION"
    assert "2, 3" in message
    old = pb.JoinRunRequest(ref=job.ref, run_id="back", world_size=1, position=pb.Position(epoch=1))
    code, _, message = refused(stub.JoinRun, old)
    assert code == "FAILED_PRECONDITION"
    assert "keeps the scores of epochs 2, 3" in message


@pytest.mark.parametrize("world_size", [1, 2])
def test_rows_are_encoded_as_protobuf_encodes_them(server: ServerProcess, name: str, world_size: int) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = pb_grpc.SelectionServiceStub(channel)
        of_weights = spec(importance_weight=pb.IMPORTANCE_WEIGHT_UNBIASED)
        created = stub.CreateExperiment(pb.CreateExperimentRequest(ref=pb.ExperimentRef(name=name), spec=of_weights))
        ref = created.experiment.ref
        join = pb.JoinRunRequest(ref=ref, run_id="run", rank=world_size - 1, world_size=world_size)
        joined = stub.JoinRun(join)
        member = pb.Member(ref=ref, generation=joined.generation, rank=world_size - 1, claim=joined.claim)
        stream: Any = channel.unary_stream("/evosample.v1.SelectionService/StreamEpoch")
        messages = list(stream(pb.StreamEpochRequest(member=member).SerializeToString(), timeout=20))
        assert [pb.StreamEpochResponse.FromString(data).SerializeToString() for data in messages] == messages
        (rows,) = (r.rows for r in map(pb.StreamEpochResponse.FromString, messages) if r.HasField("rows"))
        assert len(rows.importance_weights) == len(rows.prior_scores) == 4 * (N // B * B) // world_size


@pytest.mark.parametrize(("step_rows", "world_sizes"), [(1_000, (1, 4)), (1_024, (1, 512)), (100_000, (1, 2))])
def test_parts_are_cut_out_of_blocks_that_steps_do_not_fit_into(
    stub: pb_grpc.SelectionServiceStub, name: str, step_rows: int, world_sizes: tuple[int, ...]
) -> None:
    n = 1_300_500
    spec = ExperimentSpec(num_samples=n, num_epochs=4, meta_batch_size=step_rows, mini_batch_size=step_rows // 2)
    table = plan_epoch(spec, 0, initial_scores(spec.num_samples)).table
    request = pb.CreateExperimentRequest(ref=pb.ExperimentRef(name=name), spec=spec_to_proto(spec))
    ref = stub.CreateExperiment(request).experiment.ref
    for world_size in world_sizes:
        for rank in (0, world_size // 2, world_size - 1):
            join = pb.JoinRunRequest(ref=ref, run_id=f"of-{world_size}", rank=rank, world_size=world_size)
            joined = stub.JoinRun(join)
            member = pb.Member(ref=ref, generation=joined.generation, rank=rank, claim=joined.claim)
            for first_step in (0, 1):
                stream = pb.StreamEpochRequest(member=member, first_step=first_step)
                rows = [response.rows for response in stub.StreamEpoch(stream) if response.HasField("rows")]
                for column, values in (("sample_ids", table.sample_ids), ("prior_scores", table.prior_scores)):
                    expected = part(values, step_rows, rank, world_size)[first_step:]
                    assert b"".join(getattr(some, column) for some in rows) == expected.tobytes()
