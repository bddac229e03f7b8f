"""Spans as an OpenTelemetry collector gets them: over a real socket, in OTLP's own protobuf."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

import evosample
from evosample.v1 import selection_pb2 as pb
from evosample.v1 import selection_pb2_grpc as pb_grpc
from evosample_server.metrics import TURN_PHASES
from support import ServerProcess, fixed_losses, train

SETTINGS: dict[str, Any] = {"num_samples": 200, "num_epochs": 4, "meta_batch_size": 20, "mini_batch_size": 5}
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(http.server.ThreadingHTTPServer):
    """Takes spans as the path /v1/traces of a collector does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.services: set[str] = set()
        self.spans: list[trace_pb2.Span] = []

    def take(self, data: bytes) -> None:
        request = trace_service_pb2.ExportTraceServiceRequest.FromString(data)
        for resource in request.resource_spans:
            self.services.add(attributes(resource.resource)["service.name"])
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:  # the name that http.server calls
        assert self.path == "/v1/traces"
        self.server.take(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def attributes(holder: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, str(a.value.WhichOneof("value"))) for a in holder.attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_calls_and_phases_of_turns_are_spans(start_server: Callable[..., ServerProcess], collector: Collector) -> None:
    server = start_server("--otlp-endpoint", collector.url)
    with evosample.connect(server.address) as client:
        train(client.create_experiment("e", **SETTINGS, project="p"), fixed_losses(200, 4))
        with pytest.raises(evosample.NotFoundError):
            client.get_experiment("there-is-none")
    assert server.stop() == 0, "having sent all spans"
    assert collector.services == {"evosample-server"}
    spans = {span.span_id: span for span in collector.spans}
    service = "evosample.v1.SelectionService"
    calls = [span for span in spans.values() if span.name.startswith(f"{service}/")]
    methods = [span.name.rpartition("/")[2] for span in calls]
    assert methods.count("FinishEpoch") == 4
    assert {"CreateExperiment", "JoinRun", "StreamEpoch", "GetExperiment"} <= set(methods)
    for call in calls:
        found = attributes(call)
        assert call.kind == trace_pb2.Span.SPAN_KIND_SERVER
        assert (found["rpc.system"], found["rpc.service"]) == ("grpc", service)
        assert found["rpc.grpc.status_code"] == (5 if found["rpc.method"] == "GetExperiment" else 0)
        assert call.status.code == trace_pb2.Status.STATUS_CODE_UNSET, "what a client asks amiss is no fault"
        assert found["evosample.request_id"]
    turns = [span for span in spans.values() if span.name == "turn"]
    assert sorted(attributes(turn)["evosample.epoch"] for turn in turns) == [0, 0, 1, 2, 3]
    for turn in turns:
        assert (attributes(turn)["evosample.project"], attributes(turn)["evosample.experiment"]) == ("p", "e")
        assert spans[turn.parent_span_id].name.rpartition("/")[2] in ("CreateExperiment", "FinishEpoch", "StreamEpoch")
    phases = [span for span in spans.values() if span.name in TURN_PHASES]
    assert {span.name for span in phases} == set(TURN_PHASES)
    for phase in phases:
        turn = spans[phase.parent_span_id]
        assert turn.name == "turn"
        assert turn.start_time_unix_nano <= phase.start_time_unix_nano <= phase.end_time_unix_nano
        assert phase.end_time_unix_nano <= turn.end_time_unix_nano


def test_a_call_is_part_of_its_callers_trace(start_server: Callable[..., ServerProcess], collector: Collector) -> None:
    server = start_server("--otlp-endpoint", f"{collector.url}/")
    with grpc.insecure_channel(server.address) as channel:
        metadata = (("traceparent", f"00-{TRACE_ID}-{SPAN_ID}-01"),)
        pb_grpc.SelectionServiceStub(channel).ListExperiments(pb.ListExperimentsRequest(), metadata=metadata)
    server.stop()
    (span,) = collector.spans
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, SPAN_ID)


def test_a_fault_of_the_server_is_marked(start_server: Callable[..., ServerProcess], collector: Collector) -> None:
    server = start_server("--otlp-endpoint", collector.url)
    with grpc.insecure_channel(server.address) as channel:
        stub = pb_grpc.SelectionServiceStub(channel)
        with evosample.connect(server.address) as client:
            ref = client.create_experiment("e", **SETTINGS).ref
        answer = stub.JoinRun(pb.JoinRunRequest(ref=ref, run_id="r", rank=0, world_size=1))
        member = pb.Member(ref=ref, generation=answer.generation, rank=0, claim=answer.claim)
        waiting = stub.StreamEpoch(pb.StreamEpochRequest(member=member, epoch=1))
        next(waiting)
        server.stop()  # it tells those who wait that it is UNAVAILABLE
        with pytest.raises(grpc.RpcError):
            next(waiting)
    (span,) = [span for span in collector.spans if span.name.endswith("/StreamEpoch")]
    assert span.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    assert attributes(span)["rpc.grpc.status_code"] == 14


def test_a_collector_that_is_away_costs_nothing_but_its_spans(start_server: Callable[..., ServerProcess]) -> None:
    with Collector() as closed:
        url = closed.url
    server = start_server("--otlp-endpoint", url)
    with evosample.connect(server.address) as client:
        assert len(train(client.create_experiment("e", **SETTINGS), fixed_losses(200, 4))) == 40
