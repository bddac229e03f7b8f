"""Log lines in JSON, and the request id by which those of one call are found."""

from __future__ import annotations

import datetime
import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from redis import Redis

import evosample
from evosample.v1 import selection_pb2 as pb
from evosample.v1 import selection_pb2_grpc as pb_grpc
from evosample.wire import ExperimentName
from evosample_server import keys
from support import ServerProcess, fixed_losses, log_lines, train

N, EPOCHS = 200, 4
SETTINGS: dict[str, Any] = {"num_samples": N, "num_epochs": EPOCHS, "meta_batch_size": 20, "mini_batch_size": 5}


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that logs everything, in JSON."""
    folder = tmp_path_factory.mktemp("logged")
    process = ServerProcess(folder / "data", "--log-format", "json", "--log-level", "debug")
    yield process
    process.stop()


@pytest.fixture
def stub(logged: ServerProcess) -> Iterator[pb_grpc.SelectionServiceStub]:
    with grpc.insecure_channel(logged.address) as channel:
        yield pb_grpc.SelectionServiceStub(channel)


def answered_as(call: Callable[..., Any], request: Any, request_id: str | None) -> str:
    """The request id that comes back with the answer, or with the error."""
    metadata = () if request_id is None else (("x-request-id", request_id),)
    try:
        _, ended = call.with_call(request, metadata=metadata)  # type: ignore[attr-defined]
    except grpc.RpcError as error:
        ended = error
    (found,) = [value for key, value in ended.trailing_metadata() if key == "x-request-id"]
    return str(found)


def lines_of(server: ServerProcess, request_id: str) -> list[dict[str, Any]]:
    """All lines of a call. The last is written about when the answer arrives."""
    while True:
        found = [line for line in log_lines(server) if line.get("request_id") == request_id]
        if found and found[-1]["event"] == "answered":
            return found
        time.sleep(0.01)


def test_every_line_is_an_object_with_time_level_and_event(logged: ServerProcess, name: str) -> None:
    with evosample.connect(logged.address) as client:
        train(client.create_experiment(name, **SETTINGS), fixed_losses(N, EPOCHS))
    lines = log_lines(logged)
    assert "epoch planned" in [line["event"] for line in lines]
    for line in lines:
        assert line["level"] in ("debug", "info", "warning", "error")
        assert isinstance(line["event"], str)
        assert datetime.datetime.fromisoformat(line["timestamp"]).utcoffset() == datetime.timedelta(0)


def test_a_call_has_the_id_that_its_caller_gives_it(
    logged: ServerProcess, stub: pb_grpc.SelectionServiceStub, name: str
) -> None:
    good = pb.CreateExperimentRequest(ref=pb.ExperimentRef(name=name))
    good.spec.uniform.SetInParent()
    good.spec.num_samples, good.spec.num_epochs, good.spec.meta_batch_size = 100, 2, 10
    bad = pb.GetExperimentRequest(ref=pb.ExperimentRef(name="there-is-none"))
    longest = "Az09._-" + "x" * 57
    assert answered_as(stub.CreateExperiment, good, f"create-{name}") == f"create-{name}"
    assert answered_as(stub.GetExperiment, bad, longest) == longest
    assert [line["event"] for line in lines_of(logged, f"create-{name}")] == ["epoch planned", "answered"]
    (failed,) = lines_of(logged, longest)
    assert (failed["method"], failed["code"]) == ("GetExperiment", "NOT_FOUND")


@pytest.mark.parametrize("unfit", [None, "", "a b", 'a"b', "{a}", "x" * 65])
def test_a_call_whose_id_does_not_fit_into_a_log_gets_another(
    stub: pb_grpc.SelectionServiceStub, unfit: str | None
) -> None:
    request = pb.ListExperimentsRequest()
    ids = {answered_as(stub.ListExperiments, request, unfit) for _ in range(3)}
    assert len(ids) == 3
    assert all(re.fullmatch("[0-9a-f]{16}", found) for found in ids)


def test_the_turn_that_a_call_leads_to_has_its_id(
    logged: ServerProcess, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "evosample"), evosample.connect(logged.address) as client:
        run = client.create_experiment(name, **SETTINGS).epochs()
        for batch in next(run):
            batch.report(np.ones(len(batch.sample_ids), np.float32))
        next(run)
    (prefix,) = re.findall(r"request ids ([0-9a-f]{8})-1", caplog.text)
    planned = [line for line in log_lines(logged) if line["event"] == "epoch planned" and line["experiment"] == name]
    assert [line["epoch"] for line in planned] == [0, 1]
    assert all(line["request_id"].startswith(f"{prefix}-") for line in planned)
    assert len({line["request_id"] for line in planned}) == 2


def test_an_error_of_the_server_names_the_request_by_which_the_log_has_it(
    start_server: Callable[..., ServerProcess],
) -> None:
    server = start_server("--log-format", "json")
    with evosample.connect(server.address) as client:
        client.create_experiment("e", **SETTINGS)
        with Redis(unix_socket_path=server.store_socket) as store:
            store.hset(keys.head(ExperimentName("default", "e")), "epoch", "no number")
        with pytest.raises(evosample.InternalError, match=r"request_id=[0-9a-f]{8}-\d+") as caught:
            client.get_experiment("e")
    (request_id,) = re.findall("request_id=([0-9a-f-]+)", str(caught.value))
    (line,) = [line for line in log_lines(server) if line["level"] == "error"]
    assert line["request_id"] == request_id
    assert "no number" in line["exception"]


@pytest.mark.parametrize("log_format", ["human", "json"])
def test_lines_of_libraries_have_the_same_form(log_format: str) -> None:
    script = f"""
import logging, warnings, structlog
from evosample_server.logs import configure_logging
configure_logging("info", {log_format!r})
structlog.contextvars.bind_contextvars(request_id="r1")
logging.getLogger("grpc._cython").error("of %s", "gRPC")
logging.getLogger("redis").debug("too much")
warnings.warn("of Python")
structlog.get_logger().debug("too much")
password = "hunter2"
try:
    raise ValueError("two\\nlines")
except ValueError:
    logging.getLogger("asyncio").exception("of asyncio")
    structlog.get_logger().exception("ours", number=3)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout == ""
    assert "too much" not in ended.stderr
    assert ended.stderr.count("r1") == 4
    assert ended.stderr.count("Traceback") == 2
    assert "hunter2" not in ended.stderr
    if log_format == "json":
        lines = [json.loads(line) for line in ended.stderr.splitlines()]
        told = [(line["level"], line.get("logger"), line["event"].splitlines()[0]) for line in lines]
        assert told[0] == ("error", "grpc._cython", "of gRPC")
        assert told[1][:2] == ("warning", "py.warnings")
        assert told[2:] == [("error", "asyncio", "of asyncio"), ("error", None, "ours")]
        assert all("ValueError: two\nlines" in line["exception"] for line in lines[2:])
