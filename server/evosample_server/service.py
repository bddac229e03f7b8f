"""The gRPC face: every method decodes, makes one call, and encodes."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from functools import wraps
from typing import Any

import grpc
import numpy as np

from evosample.errors import UnavailableError, UnimplementedError
from evosample.sampling import Table
from evosample.v1 import selection_pb2 as pb
from evosample.v1 import selection_pb2_grpc as pb_grpc
from evosample.wire import (
    DEFAULT_PROJECT,
    Position,
    column_bytes,
    name_from_proto,
    spec_from_proto,
    status_to_proto,
)
from evosample_server import status
from evosample_server.experiments import EpochRows, EpochStart, EpochWait, Experiments, ScoreRows
from evosample_server.store import Member

Context = grpc.aio.ServicerContext[Any, Any]


def _translated(method: Callable[..., Any]) -> Callable[..., Any]:
    """Answer with the status of whatever a unary or a streaming method raises."""

    async def fail(error: Exception, context: Context) -> None:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        await context.abort_with_status(status.to_grpc(error))

    if inspect.isasyncgenfunction(method):

        @wraps(method)
        async def streaming(self: Any, request: Any, context: Context) -> AsyncIterator[Any]:
            try:
                async for response in method(self, request, context):
                    yield response
            except Exception as error:  # noqa: BLE001  # the boundary: everything becomes a status
                await fail(error, context)

        return streaming

    @wraps(method)
    async def unary(self: Any, request: Any, context: Context) -> Any:
        try:
            return await method(self, request, context)
        except Exception as error:  # noqa: BLE001  # the boundary: everything becomes a status
            await fail(error, context)

    return unary


def _member(message: pb.Member) -> Member:
    return Member(message.generation, message.rank, message.claim)


class SelectionService(pb_grpc.SelectionServiceServicer):
    """`evosample.v1.SelectionService` over the use cases."""

    def __init__(self, experiments: Experiments, stopping: asyncio.Event) -> None:
        self._experiments = experiments
        self._stopping = stopping

    @_translated
    async def CreateExperiment(self, request: pb.CreateExperimentRequest, context: Context) -> Any:
        created = await self._experiments.create(
            name_from_proto(request.ref), request.ref.uid, spec_from_proto(request.spec)
        )
        return pb.CreateExperimentResponse(experiment=status_to_proto(created))

    @_translated
    async def GetExperiment(self, request: pb.GetExperimentRequest, context: Context) -> Any:
        found = await self._experiments.get(name_from_proto(request.ref), request.ref.uid)
        return pb.GetExperimentResponse(experiment=status_to_proto(found))

    @_translated
    async def ListExperiments(self, request: pb.ListExperimentsRequest, context: Context) -> Any:
        page, next_page_token = await self._experiments.list_page(
            request.project or DEFAULT_PROJECT, request.page_size, request.page_token
        )
        return pb.ListExperimentsResponse(experiments=map(status_to_proto, page), next_page_token=next_page_token)

    @_translated
    async def DeleteExperiment(self, request: pb.DeleteExperimentRequest, context: Context) -> Any:
        await self._experiments.delete(name_from_proto(request.ref), request.ref.uid)
        return pb.DeleteExperimentResponse()

    @_translated
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

    @_translated
    async def StreamEpoch(self, request: pb.StreamEpochRequest, context: Context) -> Any:
        events = self._experiments.stream(
            name_from_proto(request.member.ref),
            request.member.ref.uid,
            _member(request.member),
            epoch=request.epoch,
            first_step=request.first_step,
            max_steps=request.max_steps,
        )
        async for event in self._until_stopping(events):
            yield _epoch_event(event)

    async def _until_stopping(self, events: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """The events, ended with UNAVAILABLE when the server stops: clients go on elsewhere, or when it is back."""
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            while True:
                following = asyncio.ensure_future(anext(events, None))
                # If the call ends before it does, nobody is left to hear what it raises.
                following.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
                try:
                    await asyncio.wait([following, stopping], return_when=asyncio.FIRST_COMPLETED)
                    if not following.done():
                        raise UnavailableError("the server is stopping")
                finally:
                    following.cancel()  # no effect on one that is done
                event = following.result()
                if event is None:
                    return
                yield event
        finally:
            stopping.cancel()

    @_translated
    async def ReportLosses(self, request: pb.ReportLossesRequest, context: Context) -> Any:
        num_non_finite = await self._experiments.report(
            name_from_proto(request.member.ref),
            request.member.ref.uid,
            _member(request.member),
            plan_id=request.plan_id,
            first_step=request.first_step,
            num_steps=request.num_steps,
            losses=request.losses,
        )
        return pb.ReportLossesResponse(non_finite_losses=num_non_finite)

    @_translated
    async def SelectMiniBatch(self, request: pb.SelectMiniBatchRequest, context: Context) -> Any:
        mini_batch, num_non_finite = await self._experiments.select(
            name_from_proto(request.member.ref),
            request.member.ref.uid,
            _member(request.member),
            plan_id=request.plan_id,
            step=request.step,
            losses=request.losses,
        )
        return pb.SelectMiniBatchResponse(
            positions=column_bytes(mini_batch.positions.astype(np.uint32)),
            importance_weights=column_bytes(mini_batch.importance_weights),
            non_finite_losses=num_non_finite,
        )

    @_translated
    async def FinishEpoch(self, request: pb.FinishEpochRequest, context: Context) -> Any:
        finish = await self._experiments.finish(
            name_from_proto(request.member.ref),
            request.member.ref.uid,
            _member(request.member),
            epoch=request.epoch,
            plan_id=request.plan_id,
            reported_rows=request.reported_rows if request.HasField("reported_rows") else None,
            expected_checksum=request.checksum if request.HasField("checksum") else None,
        )
        missing_steps = [pb.StepRange(first_step=first, num_steps=count) for first, count in finish.missing_steps]
        return pb.FinishEpochResponse(missing_steps=missing_steps, waiting_for_ranks=finish.waiting_for_ranks)

    @_translated
    async def ForceFinishEpoch(self, request: pb.ForceFinishEpochRequest, context: Context) -> Any:
        skipped = await self._experiments.force_finish(name_from_proto(request.ref), request.ref.uid, request.epoch)
        return pb.ForceFinishEpochResponse(skipped_ranks=skipped)

    @_translated
    async def PinEpoch(self, request: pb.PinEpochRequest, context: Context) -> Any:
        epoch = request.epoch if request.HasField("epoch") else None
        await self._experiments.pin(name_from_proto(request.ref), request.ref.uid, request.pin, epoch)
        return pb.PinEpochResponse()

    @_translated
    async def ImportScores(self, request: AsyncIterator[pb.ImportScoresRequest], context: Context) -> Any:
        first = await anext(request, pb.ImportScoresRequest())

        async def columns() -> AsyncIterator[ScoreRows]:
            yield _score_rows(first)
            async for message in request:
                yield _score_rows(message)

        ref = first.ref
        await self._experiments.import_scores(name_from_proto(ref), ref.uid, first.num_samples, columns())
        return pb.ImportScoresResponse()

    @_translated
    async def ExportScores(self, request: pb.ExportScoresRequest, context: Context) -> Any:
        rows = self._experiments.export(
            name_from_proto(request.ref),
            request.ref.uid,
            request.epoch if request.HasField("epoch") else None,
        )
        async for epoch, first_sample, scores in rows:
            yield pb.ExportScoresResponse(
                epoch=epoch,
                first_sample=first_sample,
                scores=column_bytes(scores.scores),
                sampling_weights=column_bytes(scores.sampling_weights),
                num_visits=column_bytes(scores.num_visits),
            )

    @_translated
    async def WatchExperiment(self, request: pb.WatchExperimentRequest, context: Context) -> Any:
        raise UnimplementedError("WatchExperiment is not implemented yet: poll GetExperiment")


def _score_rows(message: pb.ImportScoresRequest) -> ScoreRows:
    return ScoreRows(message.first_sample, message.scores, message.sampling_weights, message.num_visits)


def _epoch_event(event: EpochWait | EpochStart | EpochRows) -> pb.StreamEpochResponse:
    match event:
        case EpochWait(waiting_for_ranks):
            return pb.StreamEpochResponse(wait=pb.EpochWait(waiting_for_ranks=waiting_for_ranks))
        case EpochStart(plan_id, shape, table_checksum, new_rows, skipped_ranks):
            return pb.StreamEpochResponse(
                start=pb.EpochStart(
                    plan_id=plan_id,
                    num_steps=shape.num_steps,
                    step_rows=shape.step_rows,
                    trained_rows=shape.trained_rows,
                    table_checksum=table_checksum,
                    new_rows=new_rows,
                    skipped_ranks=skipped_ranks,
                )
            )
        case EpochRows(first_step, Table(sample_ids, prior_scores, importance_weights)):
            return pb.StreamEpochResponse(
                rows=pb.EpochRows(
                    first_step=first_step,
                    num_steps=len(sample_ids),
                    sample_ids=column_bytes(sample_ids),
                    prior_scores=column_bytes(prior_scores),
                    importance_weights=b"" if importance_weights is None else column_bytes(importance_weights),
                )
            )
