"""What no honest client sends: it is refused with a reason, and harms neither the server nor anybody else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status

from evosample.v1 import selection_pb2 as pb
from evosample.v1 import selection_pb2_grpc as pb_grpc
from faults.fuzz import check_own_server
from faults.malformed import N, small_spec
from support import ServerProcess

METHODS = [
    method
    for file, service in [(pb, "SelectionService"), (health_pb2, "Health"), (reflection_pb2, "ServerReflection")]
    for method in file.DESCRIPTOR.services_by_name[service].methods
]

UNDECODABLE = {
    "no tag": b"\xff",
    "a length beyond the end": b"\x0a\xff\xff\xff\x7f",
    "a wire type that there is not": b"\x0f",
    "a group without an end": b"\x0b",
    "groups in groups": b"\x0b" * 4_000,
}


@pytest.fixture
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as opened:
        yield opened


def call(channel: grpc.Channel, method: Any, *payloads: bytes) -> Callable[[], Any]:
    """A call of a method with bytes as they are."""
    requests, responses = ("stream" if s else "unary" for s in (method.client_streaming, method.server_streaming))
    path = f"/{method.containing_service.full_name}/{method.name}"
    prepared: Any = getattr(channel, f"{requests}_{responses}")(path)

    def run() -> Any:
        answer = prepared(iter(payloads) if method.client_streaming else payloads[0], timeout=20)
        return list(answer) if method.server_streaming else answer

    return run


def refused(run: Callable[[], Any]) -> tuple[str, str]:
    """Code and message of a call that must fail for what it carries."""
    with pytest.raises(grpc.RpcError) as caught:
        run()
    error: Any = caught.value
    (detail,) = rpc_status.from_call(error).details
    bad_request = error_details_pb2.BadRequest()
    assert detail.Unpack(bad_request)
    assert bad_request.field_violations[0].description == error.details()
    return error.code().name, error.details()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
@pytest.mark.parametrize("what", UNDECODABLE)
def test_bytes_that_are_no_message_are_an_invalid_argument(channel: grpc.Channel, method: Any, what: str) -> None:
    code, message = refused(call(channel, method, UNDECODABLE[what]))
    assert code == "INVALID_ARGUMENT"
    assert method.input_type.full_name in message
    assert "code generated from the .proto file" in message


def test_text_that_is_not_utf8_is_an_invalid_argument(channel: grpc.Channel) -> None:
    get = pb.DESCRIPTOR.services_by_name["SelectionService"].methods_by_name["GetExperiment"]
    good = pb.GetExperimentRequest(ref=pb.ExperimentRef(name="name")).SerializeToString()
    assert refused(call(channel, get, good))[0] == "NOT_FOUND"
    code, message = refused(call(channel, get, good.replace(b"name", b"n\xe4me")))
    assert code == "INVALID_ARGUMENT"
    assert "UTF-8" in message


def test_a_stream_that_breaks_off_in_garbage_has_no_effect(channel: grpc.Channel, name: str) -> None:
    stub = pb_grpc.SelectionServiceStub(channel)
    create = pb.CreateExperimentRequest(ref=pb.ExperimentRef(name=name), spec=small_spec(warm_start=True))
    ref = stub.CreateExperiment(create).experiment.ref
    before = list(stub.ExportScores(pb.ExportScoresRequest(ref=ref)))
    half = np.ones(N // 2, "<f4").tobytes()
    first = pb.ImportScoresRequest(ref=ref, num_samples=N, scores=half, sampling_weights=half)
    second = pb.ImportScoresRequest(first_sample=N // 2, scores=half, sampling_weights=half)
    method = pb.DESCRIPTOR.services_by_name["SelectionService"].methods_by_name["ImportScores"]
    sent = [first.SerializeToString(), second.SerializeToString()]
    assert refused(call(channel, method, sent[0], b"\xff", sent[1]))[0] == "INVALID_ARGUMENT"
    assert list(stub.ExportScores(pb.ExportScoresRequest(ref=ref))) == before
    call(channel, method, *sent)()
    assert list(stub.ExportScores(pb.ExportScoresRequest(ref=ref))) != before


def test_a_message_over_the_limit_of_the_transport_is_refused_and_others_are_served(channel: grpc.Channel) -> None:
    get = pb.DESCRIPTOR.services_by_name["SelectionService"].methods_by_name["GetExperiment"]
    for _ in range(3):
        with pytest.raises(grpc.RpcError) as caught:
            call(channel, get, b"\0" * 20_000_000)()
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    pb_grpc.SelectionServiceStub(channel).ListExperiments(pb.ListExperimentsRequest())


@pytest.mark.parametrize("character", ["x", "ü", "\U0001f600", "\0"])
def test_an_error_reaches_its_caller_however_long_a_value_it_quotes(
    channel: grpc.Channel, name: str, character: str
) -> None:
    stub = pb_grpc.SelectionServiceStub(channel)
    ref = pb.ExperimentRef(name=name)
    stub.CreateExperiment(pb.CreateExperimentRequest(ref=ref, spec=small_spec()))
    for length in (100, 1_000, 10_000, 100_000):
        ref.uid = character * length
        code, message = refused(lambda: stub.GetExperiment(pb.GetExperimentRequest(ref=ref)))
        assert code == "NOT_FOUND"
        assert message.startswith(f"ref.uid='{character}" if character != "\0" else "ref.uid=")
        assert message.endswith("get the one of that name anew")


def test_no_request_makes_the_server_fail_leak_or_change_what_it_does_not_own(tmp_path: Path) -> None:
    counts = check_own_server(tmp_path, num_requests=10_000, seed=1)
    assert counts.total() >= 10_000
