"""What a server tells Prometheus, read from its listener while real jobs train."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

import evosample
from evosample.v1 import selection_pb2 as pb
from evosample.v1 import selection_pb2_grpc as pb_grpc
from evosample.wire import ExperimentName
from evosample_server.metrics import TURN_PHASES, Metrics
from stores import wait_until
from support import ROOT_TOKEN, Guarded, ServerProcess, fixed_losses, metrics_address, train

N, EPOCHS, B = 400, 4, 40
SETTINGS: dict[str, Any] = {
    "num_samples": N,
    "num_epochs": EPOCHS,
    "meta_batch_size": B,
    "mini_batch_size": 10,
    "policy": evosample.EvolvedSampling(prune_ratio=0.2),
}
OPTIONS = ("--metrics", "127.0.0.1:0", "--log-format", "json")

Figures = dict[tuple[str, ...], float]


def figures_of(text: str) -> Figures:
    """Every sample by its name and the values of its labels, in the order of the labels' names."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape_text(server: ServerProcess) -> str:
    with urllib.request.urlopen(f"http://{metrics_address(server)}/metrics", timeout=20) as response:
        text: str = response.read().decode()
        return text


def scrape(server: ServerProcess) -> Figures:
    return figures_of(scrape_text(server))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with metrics."""
    process = ServerProcess(tmp_path_factory.mktemp("watched") / "data", *OPTIONS)
    yield process
    process.stop()


@pytest.fixture
def watched_client(watched: ServerProcess) -> Iterator[evosample.Client]:
    with evosample.connect(watched.address) as connected:
        yield connected


def test_figures_are_what_a_job_did(watched: ServerProcess, watched_client: evosample.Client, name: str) -> None:
    losses = fixed_losses(N, EPOCHS)
    losses[1, :30] = np.nan
    losses[2, 7] = np.inf
    rows = [N, N * 4 // 5, N * 4 // 5, N]
    before = scrape(watched)
    num_non_finite = 0
    at_half: Figures = {}

    def look(batch: evosample.Batch) -> None:
        nonlocal at_half, num_non_finite
        num_non_finite += int(np.count_nonzero(~np.isfinite(losses[batch.epoch, batch.sample_ids])))
        if batch.epoch == 2 and batch.step == 0:
            at_half = scrape(watched)

    experiment = watched_client.create_experiment(name, **SETTINGS)
    train(experiment, losses, before_step=look)
    in_turns = ("evosample_turn_seconds_count", "collect")  # the job may see the last epoch's end before the turn's
    wait_until(lambda: scrape(watched)[in_turns] - before.get(in_turns, 0) == EPOCHS + 1, "the last turn to end")
    after = scrape(watched)

    def grown(*key: str) -> float:
        return after.get(key, 0) - before.get(key, 0)

    assert num_non_finite > 20
    assert grown("evosample_streamed_rows_total") == sum(rows)
    assert grown("evosample_streamed_bytes_total") == sum(rows) * 8  # a uint32 id and a float32 score
    assert grown("evosample_reported_rows_total") == sum(rows)
    assert grown("evosample_reported_bytes_total") == sum(rows) * 4
    assert grown("evosample_non_finite_losses_total") == num_non_finite
    assert grown("evosample_turns_total", "made") == EPOCHS + 1
    assert grown("evosample_turns_total", "failed") == 0
    assert [grown("evosample_turn_seconds_count", phase) for phase in TURN_PHASES] == [4, 4, 4, 5, 5, 5]
    assert all(grown("evosample_turn_seconds_sum", phase) > 0 for phase in TURN_PHASES)
    for method, calls in {"CreateExperiment": 1, "JoinRun": 1, "FinishEpoch": EPOCHS}.items():
        assert grown("evosample_rpc_seconds_count", "OK", method) == calls
    assert grown("evosample_rpc_seconds_sum", "OK", "FinishEpoch") > 0
    assert grown("evosample_store_seconds_count", "commit") == EPOCHS + 1
    assert after["evosample_store_up",] == 1
    assert grown("evosample_cache_hits_total") > 0
    assert at_half["evosample_cache_bytes",] > after["evosample_cache_bytes",]  # its table, which is gone at the end
    assert after["evosample_streams",] == 0
    assert after["evosample_connected_ranks",] - before["evosample_connected_ranks",] == 1

    label = (name, "default")
    assert at_half["evosample_experiment_epoch", *label] == 2
    assert after["evosample_experiment_epoch", *label] == after["evosample_experiment_epochs", *label] == EPOCHS
    assert at_half["evosample_experiment_progress_ratio", *label] == 0.5
    assert after["evosample_experiment_progress_ratio", *label] == 1
    assert after["evosample_experiment_reported_rows_total", *label] == sum(rows)
    assert after["evosample_experiment_non_finite_losses_total", *label] == num_non_finite
    age_s = time.time() - after["evosample_experiment_last_report_timestamp_seconds", *label]
    assert 0 <= age_s < 100


def test_progress_is_seen_within_an_epoch(watched: ServerProcess, watched_client: evosample.Client, name: str) -> None:
    run = watched_client.create_experiment(name, **SETTINGS).epochs()
    batches = iter(next(run))
    for _ in range(3):
        batch = next(batches)
        batch.select(np.ones(len(batch.sample_ids), np.float32))
    run.flush()
    assert scrape(watched)["evosample_experiment_progress_ratio", name, "default"] == pytest.approx(0.3 / EPOCHS)


def test_streams_are_counted_while_they_are_open(
    watched: ServerProcess, watched_client: evosample.Client, name: str
) -> None:
    experiment = watched_client.create_experiment(name, **SETTINGS)
    with grpc.insecure_channel(watched.address) as channel:
        stub = pb_grpc.SelectionServiceStub(channel)
        ref = pb.ExperimentRef(name=name, uid=experiment.uid)
        joined = stub.JoinRun(pb.JoinRunRequest(ref=ref, run_id="job", rank=0, world_size=1))
        member = pb.Member(ref=ref, generation=joined.generation, rank=0, claim=joined.claim)
        waiting = stub.StreamEpoch(pb.StreamEpochRequest(member=member, epoch=1))
        next(waiting)  # a message that says that it waits
        assert scrape(watched)["evosample_streams",] == 1
        waiting.cancel()
        while scrape(watched)["evosample_streams",]:
            time.sleep(0.05)


def send(channel: grpc.Channel, method: str, data: bytes) -> None:
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
        f"/evosample.v1.SelectionService/{method}", bytes, bytes
    )
    call(data, timeout=20)


def test_failed_calls_are_counted_by_their_code(watched: ServerProcess, watched_client: evosample.Client) -> None:
    before = scrape(watched)
    with pytest.raises(evosample.NotFoundError):
        watched_client.get_experiment("there-is-none")
    with grpc.insecure_channel(watched.address) as channel:
        stub = pb_grpc.SelectionServiceStub(channel)
        for number in range(50):
            with pytest.raises(grpc.RpcError):
                send(channel, f"Guess{number}", b"")
        watched_client.create_experiment("watched-for-long", **SETTINGS)
        watching = stub.WatchExperiment(pb.WatchExperimentRequest(ref=pb.ExperimentRef(name="watched-for-long")))
        next(watching)
        watching.cancel()
        with pytest.raises(grpc.RpcError):
            send(channel, "GetExperiment", b"\xff")
    expected = {
        ("evosample_rpc_seconds_count", "NOT_FOUND", "GetExperiment"): 1,
        ("evosample_rpc_seconds_count", "INVALID_ARGUMENT", "GetExperiment"): 1,
        ("evosample_rpc_seconds_count", "UNIMPLEMENTED", "other"): 50,
        ("evosample_rpc_seconds_count", "CANCELLED", "WatchExperiment"): 1,
    }
    while not expected.keys() <= (after := scrape(watched)).keys():  # a call is counted about when its answer arrives
        time.sleep(0.05)
    assert {key: after[key] - before.get(key, 0) for key in expected} == expected
    assert not any("Guess" in label for key in after for label in key)


def test_only_so_many_experiments_are_told_of_by_name(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(*OPTIONS, "--metrics-experiments", "3")
    with evosample.connect(server.address) as client:
        for number in range(5):
            next(client.create_experiment(f"e{number}", **SETTINGS).epochs()).close()
        figures = scrape(server)
    told = {key[1] for key in figures if key[0] == "evosample_experiment_epoch"}
    assert told == {"e0", "e1", "e2"}
    assert figures["evosample_connected_ranks",] == 5


def test_500_experiments_make_no_more_series_than_100() -> None:
    def series(num_experiments: int) -> int:
        metrics = Metrics(max_experiments=100, max_streams=1, max_project_streams=1)
        for number in range(num_experiments):
            name = ExperimentName("p", f"e{number}")
            metrics.heard(name, f"uid{number}", rank=0, epoch=1, num_epochs=4)
            metrics.reported(name, num_rows=10, num_bytes=40, num_non_finite=1, progress=0.3)
        figures = figures_of(generate_latest(metrics.registry).decode())
        assert figures["evosample_reported_rows_total",] == 10 * num_experiments, "all are in the sums"
        return len(figures)

    assert series(500) == series(100)


def test_silent_experiments_make_room_and_are_forgotten() -> None:
    now_s = 1e9
    metrics = Metrics(max_experiments=2, max_streams=1, max_project_streams=1, now_s=lambda: now_s)

    def hear(name: str, *, uid: str = "u", epoch: int = 0) -> None:
        metrics.heard(ExperimentName("p", name), uid, rank=0, epoch=epoch, num_epochs=4)

    def told() -> set[str]:
        figures = figures_of(generate_latest(metrics.registry).decode())
        return {key[1] for key in figures if key[0] == "evosample_experiment_epoch"}

    hear("a")
    hear("b")
    hear("c")
    assert told() == {"a", "b"}
    now_s += 301
    hear("b")
    hear("c")  # in the place of a
    assert told() == {"b", "c"}
    now_s += 3599
    hear("c")
    assert told() == {"b", "c"}
    now_s += 2
    assert told() == {"c"}


def test_an_experiment_made_anew_and_one_that_goes_back_begin_with_their_own_progress() -> None:
    metrics = Metrics(max_experiments=2, max_streams=1, max_project_streams=1)
    name = ExperimentName("p", "e")

    def progress_after(uid: str, epoch: int, reported: float | None = None) -> float:
        metrics.heard(name, uid, rank=0, epoch=epoch, num_epochs=4)
        if reported is not None:
            metrics.reported(name, num_rows=1, num_bytes=4, num_non_finite=0, progress=reported)
        figures = figures_of(generate_latest(metrics.registry).decode())
        return figures["evosample_experiment_progress_ratio", "e", "p"]

    assert progress_after("first", 2, 0.6) == 0.6
    assert progress_after("first", 2, 0.55) == 0.6, "a rank that lags behind"
    assert progress_after("first", 1) == 0.25
    assert progress_after("second", 0) == 0
    assert progress_after("second", 4) == 1


def listening_ports(pid: int) -> set[int]:
    """TCP ports that a process listens on."""
    sockets = {str(file.readlink()) for file in Path(f"/proc/{pid}/fd").iterdir()}
    lines = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    return {
        int(line[1].rpartition(":")[2], 16) for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in sockets
    }


def test_without_the_option_nobody_can_ask_for_names(
    start_server: Callable[..., ServerProcess], watched: ServerProcess
) -> None:
    server = start_server()
    assert listening_ports(server.process.pid) == {int(server.address.rpartition(":")[2])}
    assert len(listening_ports(watched.process.pid)) == 2


def test_without_names_there_are_none(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(*OPTIONS, "--metrics-experiments", "0")
    with evosample.connect(server.address) as client:
        train(client.create_experiment("confidential", **SETTINGS, project="secret"), fixed_losses(N, EPOCHS))
    text = scrape_text(server)
    assert "evosample_reported_rows_total 1440" in text
    assert not re.search("confidential|secret|default", text)


@pytest.mark.parametrize(
    ("options", "are_told"),
    [
        (("--metrics", "0.0.0.0:0"), False),
        (("--metrics", "0.0.0.0:0", "--metrics-experiments", "5"), True),
        (("--metrics", "127.0.0.1:0"), True),
    ],
)
def test_where_callers_need_tokens_others_learn_no_name_from_metrics_unless_it_was_decided(
    tmp_path: Path, options: tuple[str, ...], are_told: bool
) -> None:
    server = Guarded(tmp_path, "--log-format", "json", *options)
    with server.connect(ROOT_TOKEN) as client:
        train(client.create_experiment("confidential", **SETTINGS, project="secret"), fixed_losses(N, EPOCHS))
    text = scrape_text(server)
    server.stop()
    assert "evosample_reported_rows_total 1440" in text
    assert bool(re.search("confidential|secret", text)) is are_told


def test_without_tokens_metrics_tell_names_to_whoever_they_are_served_to(
    start_server: Callable[..., ServerProcess],
) -> None:
    server = start_server("--metrics", "0.0.0.0:0", "--log-format", "json")
    with evosample.connect(server.address) as client:
        train(client.create_experiment("e", **SETTINGS), fixed_losses(N, EPOCHS))
    assert ("evosample_experiment_epoch", "e", "default") in scrape(server)


def test_idle_connections_to_metrics_are_few_and_soon_closed(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(*OPTIONS)
    host, _, port = metrics_address(server).rpartition(":")

    def num_threads() -> int:
        return len(list(Path(f"/proc/{server.process.pid}/task").iterdir()))

    before = num_threads()
    with contextlib.ExitStack() as open_ones:
        idle = [open_ones.enter_context(socket.create_connection((host, int(port)))) for _ in range(100)]
        for connection in idle[20:]:
            connection.settimeout(60)
            assert not connection.recv(1), "closed at once: there are too many"
        assert num_threads() <= before + 20
        assert not idle[0].recv(1), "closed after a while"
        wait_until(lambda: num_threads() <= before, "their threads to end")
        assert scrape(server)["evosample_store_up",] == 1
    assert "Traceback" not in server.log


def test_metrics_outlive_the_store(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(*OPTIONS)
    with evosample.connect(server.address) as client:
        train(client.create_experiment("e", **SETTINGS), fixed_losses(N, EPOCHS))
        before = scrape(server)
        store_pid = server.store_pid
        os.kill(store_pid, signal.SIGSTOP)
        try:
            while scrape(server)["evosample_store_up",]:
                time.sleep(0.1)
        finally:
            os.kill(store_pid, signal.SIGCONT)
        while not (after := scrape(server))["evosample_store_up",]:
            time.sleep(0.1)
        rows = ("evosample_reported_rows_total",)
        assert after[rows] == before[rows] == 1440
        train(client.create_experiment("f", **SETTINGS), fixed_losses(N, EPOCHS))
        assert scrape(server)[rows] == 2 * 1440


def test_calls_that_fail_for_want_of_a_store_are_faults(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(*OPTIONS)
    with Redis(unix_socket_path=server.store_socket) as store:
        store.config_set("maxmemory", 1)
    request = pb.CreateExperimentRequest(ref=pb.ExperimentRef(name="e"))
    request.spec.uniform.SetInParent()
    request.spec.num_samples, request.spec.num_epochs, request.spec.meta_batch_size = N, EPOCHS, B
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        pb_grpc.SelectionServiceStub(channel).CreateExperiment(request)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    while not (figures := scrape(server))["evosample_faults_total", "UNAVAILABLE"]:
        time.sleep(0.05)
    assert figures["evosample_faults_total", "UNAVAILABLE"] == 1
    assert figures["evosample_faults_total", "INTERNAL"] == 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--metrics", "localhost"), "HOST:PORT"),
        (("--metrics", "unix:/tmp/metrics.sock"), "HOST:PORT"),
        (("--metrics", "192.0.2.1:9464"), "can't serve metrics on 192.0.2.1:9464"),
        (("--metrics-experiments", "-1"), "greater than or equal to 0"),
        (("--otlp-endpoint", "collector:4318"), "http://collector:4318"),
        (("--log-format", "xml"), "human"),
    ],
)
def test_bad_options_are_told(tmp_path: Path, options: tuple[str, ...], complaint: str) -> None:
    command = [sys.executable, "-m", "evosample_server", "--listen", "127.0.0.1:0", "--data-dir", str(tmp_path)]
    ended = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode in (1, 2)
    assert complaint in ended.stderr
    assert "Traceback" not in ended.stderr
