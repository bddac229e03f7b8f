"""The gRPC face: every method decodes, makes one call, and encodes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np

from evosample.errors import UnavailableError
from evosample.rows import encode_rows
from evosample.v1 import selection_pb2 as pb
from evosample.v1 import selection_pb2_grpc as pb_grpc
from evosample.wire import (
    Position,
    column_bytes,
    name_from_proto,
    spec_from_proto,
    status_to_proto,
    watched_to_proto,
)
from evosample_server.access import audit
from evosample_server.experiments import (
    EpochRows,
    EpochStart,
    EpochWait,
    Experiments,
    GroupRows,
    ReportedSteps,
    ScoreRows,
)
from evosample_server.store import Member
from evosample_server.tasks import cancelled

Context = grpc.aio.ServicerContext[Any, Any]


def _reported_steps(request: pb.ReportLossesRequest) -> ReportedSteps:
    return ReportedSteps(request.first_step, request.num_steps, request.losses, request.columns, request.chosen)


def _member(message: pb.Member) -> Member:
    return Member(message.generation, message.rank, message.claim)


class SelectionService(pb_grpc.SelectionServiceServicer):
    """`evosample.v1.SelectionService` over the use cases."""

    def __init__(self, experiments: Experiments) -> None:
        self._experiments = experiments
        self._has_ended = False
        self._waiting: set[asyncio.Task[Any]] = set()  # those of streams for which there is nothing to send yet

    async def CreateExperiment(self, request: pb.CreateExperimentRequest, context: Context) -> Any:
        created = await self._experiments.create(
            name_from_proto(request.ref), request.ref.uid, spec_from_proto(request.spec)
        )
        return pb.CreateExperimentResponse(experiment=status_to_proto(created))

    async def GetExperiment(self, request: pb.GetExperimentRequest, context: Context) -> Any:
        found = await self._experiments.get(name_from_proto(request.ref), request.ref.uid)
        return pb.GetExperimentResponse(experiment=status_to_proto(found))

    async def ListExperiments(self, request: pb.ListExperimentsRequest, context: Context) -> Any:
        page, next_page_token = await self._experiments.list_page(
            request.project, request.page_size, request.page_token
        )
        return pb.ListExperimentsResponse(experiments=map(status_to_proto, page), next_page_token=next_page_token)

    async def DeleteExperiment(self, request: pb.DeleteExperimentRequest, context: Context) -> Any:
        name = name_from_proto(request.ref)
        await self._experiments.delete(name, request.ref.uid)
        audit("delete experiment", **name._asdict())
        return pb.DeleteExperimentResponse()

    async def JoinRun(self, request: pb.JoinRunRequest, context: Context) -> Any:
        joined = await self._experiments.join(
            name_from_proto(request.ref),
            request.ref.uid,
            run_id=request.run_id,
            rank=request.rank,
            world_size=request.world_size,
            position=Position(request.position.epoch, request.position.step) if request.HasField("position") else None,
            current_if_not_retained=request.current_if_not_retained,
            straggler_timeout_ms=request.straggler_timeout_ms if request.HasField("straggler_timeout_ms") else None,
            rejoining_as=_member(request.rejoining_as) if request.HasField("rejoining_as") else None,
            process_id=request.process_id,
        )
        position = pb.Position(epoch=joined.position.epoch, step=joined.position.step)
        return pb.JoinRunResponse(
            generation=joined.generation,
            claim=joined.claim,
            position=position,
            unreported_rows=joined.unreported_rows,
        )

    async def StreamEpoch(self, request: pb.StreamEpochRequest, context: Context) -> Any:
        events = self._experiments.stream(
            name_from_proto(request.member.ref),
            request.member.ref.uid,
            _member(request.member),
            epoch=request.epoch,
            first_step=request.first_step,
            max_steps=request.max_steps,
        )
        async for event in self._until_ended(events):
            yield _epoch_event(event)

    async def _until_ended(self, events: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """The events, with UNAVAILABLE in the place of what is still to come when `end_streams` is called."""
        task = asyncio.current_task()
        assert task is not None
        while not self._has_ended:
            self._waiting.add(task)
            try:
                event = await anext(events, None)
            except asyncio.CancelledError:
                if not self._has_ended:
                    raise
                task.uncancel()
                break
            finally:
                self._waiting.discard(task)
            if event is None:
                return
            yield event
        raise UnavailableError("the server is stopping")

    async def end_streams(self) -> None:
        """End all streams, also those that wait for something: clients go on elsewhere, or when the server is back."""
        self._has_ended = True
        await cancelled(self._waiting)

    async def ReportLosses(self, request: pb.ReportLossesRequest, context: Context) -> Any:
        num_non_finite = await self._experiments.report(
            name_from_proto(request.member.ref),
            request.member.ref.uid,
            _member(request.member),
            plan_id=request.plan_id,
            steps=_reported_steps(request),
        )
        return pb.ReportLossesResponse(non_finite_losses=num_non_finite)

    async def SelectMiniBatch(self, request: pb.SelectMiniBatchRequest, context: Context) -> Any:
        mini_batch, num_non_finite = await self._experiments.select(
            name_from_proto(request.member.ref),
            request.member.ref.uid,
            _member(request.member),
            plan_id=request.plan_id,
            step=request.step,
            losses=request.losses,
            columns=request.columns,
        )
        return pb.SelectMiniBatchResponse(
            positions=column_bytes(mini_batch.positions.astype(np.uint32)),
            importance_weights=column_bytes(mini_batch.importance_weights),
            non_finite_losses=num_non_finite,
        )

    async def FinishEpoch(self, request: pb.FinishEpochRequest, context: Context) -> Any:
        finish = await self._experiments.finish(
            name_from_proto(request.member.ref),
            request.member.ref.uid,
            _member(request.member),
            epoch=request.epoch,
            plan_id=request.plan_id,
            reported_rows=request.reported_rows if request.HasField("reported_rows") else None,
            expected_checksum=request.checksum if request.HasField("checksum") else None,
            last_steps=_reported_steps(request.last_report) if request.HasField("last_report") else None,
        )
        missing_steps = [pb.StepRange(first_step=first, num_steps=count) for first, count in finish.missing_steps]
        return pb.FinishEpochResponse(missing_steps=missing_steps, waiting_for_ranks=finish.waiting_for_ranks)

    async def ForceFinishEpoch(self, request: pb.ForceFinishEpochRequest, context: Context) -> Any:
        name = name_from_proto(request.ref)
        skipped = await self._experiments.force_finish(name, request.ref.uid, request.epoch)
        audit("end epoch", **name._asdict(), epoch=request.epoch, skipped_ranks=skipped)
        return pb.ForceFinishEpochResponse(skipped_ranks=skipped)

    async def PinEpoch(self, request: pb.PinEpochRequest, context: Context) -> Any:
        epoch = request.epoch if request.HasField("epoch") else None
        await self._experiments.pin(name_from_proto(request.ref), request.ref.uid, request.pin, epoch)
        return pb.PinEpochResponse()

    async def ImportScores(self, request: AsyncIterator[pb.ImportScoresRequest], context: Context) -> Any:
        first = await anext(request, pb.ImportScoresRequest())

        async def columns() -> AsyncIterator[ScoreRows]:
            yield _score_rows(first)
            async for message in request:
                yield _score_rows(message)

        name = name_from_proto(first.ref)
        await self._experiments.import_scores(name, first.ref.uid, first.num_samples, columns())
        audit("import scores", **name._asdict())
        return pb.ImportScoresResponse()

    async def SetGroups(self, request: AsyncIterator[pb.SetGroupsRequest], context: Context) -> Any:
        first = await anext(request, pb.SetGroupsRequest())

        async def columns() -> AsyncIterator[GroupRows]:
            yield GroupRows(first.first_sample, first.groups, first.reference_losses)
            async for message in request:
                yield GroupRows(message.first_sample, message.groups, message.reference_losses)

        name = name_from_proto(first.ref)
        await self._experiments.set_groups(name, first.ref.uid, first.num_samples, columns())
        audit("set groups", **name._asdict())
        return pb.SetGroupsResponse()

    async def ExtendDataset(self, request: pb.ExtendDatasetRequest, context: Context) -> Any:
        name = name_from_proto(request.ref)
        await self._experiments.extend(name, request.ref.uid, request.num_samples, tuple(request.shard_sizes))
        audit("extend dataset", **name._asdict())
        return pb.ExtendDatasetResponse()

    async def ExportScores(self, request: pb.ExportScoresRequest, context: Context) -> Any:
        rows = self._experiments.export(
            name_from_proto(request.ref),
            request.ref.uid,
            request.epoch if request.HasField("epoch") else None,
        )
        async for epoch, first_sample, scores, groups in rows:
            yield pb.ExportScoresResponse(
                epoch=epoch,
                first_sample=first_sample,
                scores=column_bytes(scores.scores),
                sampling_weights=column_bytes(scores.sampling_weights),
                num_visits=column_bytes(scores.num_visits),
                staleness=column_bytes(scores.staleness),
                num_chosen=column_bytes(scores.num_chosen),
                chosen_staleness=column_bytes(scores.chosen_staleness),
                columns={column: column_bytes(values) for column, values in scores.columns.items()},
                groups=b"" if groups is None else column_bytes(groups),
            )

    async def WatchExperiment(self, request: pb.WatchExperimentRequest, context: Context) -> Any:
        figures = self._experiments.watch(
            name_from_proto(request.ref),
            request.ref.uid,
            interval_ms=request.interval_ms or 1000,
            first_epoch=request.first_epoch,
            once=request.once,
        )
        async for watched in self._until_ended(figures):
            yield watched_to_proto(watched)


def _score_rows(message: pb.ImportScoresRequest) -> ScoreRows:
    columns = dict(message.columns)
    return ScoreRows(message.first_sample, message.scores, message.sampling_weights, message.num_visits, columns)


def _epoch_event(event: EpochWait | EpochStart | EpochRows) -> pb.StreamEpochResponse | bytes:
    match event:
        case EpochWait(waiting_for_ranks):
            return pb.StreamEpochResponse(wait=pb.EpochWait(waiting_for_ranks=waiting_for_ranks))
        case EpochStart(plan_id, shape, table_checksum, new_rows, skipped_ranks, learning_rate_factor):
            return pb.StreamEpochResponse(
                start=pb.EpochStart(
                    plan_id=plan_id,
                    num_steps=shape.num_steps,
                    step_rows=shape.step_rows,
                    trained_rows=shape.trained_rows,
                    table_checksum=table_checksum,
                    new_rows=new_rows,
                    skipped_ranks=skipped_ranks,
                    selecting_interval=shape.selecting_interval,
                    num_hidden_steps=shape.num_hidden_steps,
                    learning_rate_factor=learning_rate_factor,
                )
            )
        case EpochRows(first_step, table):
            return encode_rows(first_step, *table)
