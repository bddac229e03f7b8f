"""Starting and stopping: real processes, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis
from grpc_health.v1 import health_pb2, health_pb2_grpc

import evosample
from evosample.sampling import EvolvedSampling
from evosample.v1 import selection_pb2 as pb
from evosample.v1 import selection_pb2_grpc as pb_grpc
from evosample_server.__main__ import is_zen_4
from support import ServerProcess, fixed_losses, train

SETTINGS: dict[str, Any] = {"num_samples": 100, "num_epochs": 3, "meta_batch_size": 10, "mini_batch_size": 5}


def processes_with(text: str) -> list[int]:
    """Running processes whose command line contains a text."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if text in command and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def wait_until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.05)


def run_server(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A server that must end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "evosample_server", *options],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
        check=False,
    )


def test_sigterm_stops_the_server_in_order(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server()
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(health).status == health_pb2.HealthCheckResponse.SERVING
        stub = pb_grpc.SelectionServiceStub(channel)
        spec = pb.ExperimentSpec(uniform=pb.Uniform(), num_samples=4, num_epochs=2, meta_batch_size=2)
        ref = stub.CreateExperiment(
            pb.CreateExperimentRequest(ref=pb.ExperimentRef(name="e"), spec=spec)
        ).experiment.ref
        joined = stub.JoinRun(pb.JoinRunRequest(ref=ref, run_id="run", world_size=1))
        member = pb.Member(ref=ref, generation=joined.generation, claim=joined.claim)
        waiting = stub.StreamEpoch(pb.StreamEpochRequest(member=member, epoch=1))
        assert next(waiting).WhichOneof("event") == "wait"
        server.process.send_signal(signal.SIGTERM)
        assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            list(waiting)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "the server is stopping" in str(caught.value.details())
    assert server.process.wait(30) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_embedded_store_ends_with_its_server(
    start_server: Callable[..., ServerProcess], number: signal.Signals
) -> None:
    server = start_server()
    store = Path(f"/proc/{server.store_pid}")
    assert store.exists()
    server.process.send_signal(number)
    server.process.wait(30)
    wait_until(lambda: not store.exists())


def test_a_second_server_on_a_data_directory_is_refused(
    start_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    first = start_server()
    second = run_server("--listen", "127.0.0.1:0", "--data-dir", str(tmp_path / "data0"))
    assert second.returncode == 1
    assert "another server uses the data directory" in second.stderr
    with evosample.connect(first.address) as client:
        assert not list(client.list_experiments())


def test_options_may_come_from_the_environment(tmp_path: Path) -> None:
    refused = run_server(EVOSAMPLE_REDIS_URL="redis://127.0.0.1:1", EVOSAMPLE_LISTEN="127.0.0.1:0")
    assert refused.returncode == 1
    assert "can't use Redis at redis://127.0.0.1:1" in refused.stderr


def test_a_password_does_not_show_in_errors() -> None:
    refused = run_server("--redis-url", "redis://user:secret@127.0.0.1:1/0")
    assert "can't use Redis at redis://127.0.0.1:1/0" in refused.stderr
    assert "secret" not in refused.stderr


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--max-samples", "many"], 2, "--max-samples='many'"),
        (["--frobnicate"], 2, "--frobnicate"),
        (["--redis-url", "http://x"], 1, "Expected redis://"),
        (["--listen", "127.0.0.1:99999"], 2, "a port from 0 to 65535"),
    ],
)
def test_bad_options_are_explained(options: list[str], code: int, said: str) -> None:
    refused = run_server(*options)
    assert refused.returncode == code
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr


def test_an_address_in_use_is_explained(start_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    server = start_server()
    refused = run_server("--listen", server.address, "--data-dir", str(tmp_path / "other"))
    assert refused.returncode == 1
    assert f"can't listen on {server.address}" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_health_socket_in_no_folder_is_explained(tmp_path: Path) -> None:
    socket = tmp_path / "missing" / "health.sock"
    refused = run_server(
        "--listen", "127.0.0.1:0", "--data-dir", str(tmp_path / "data"), "--health-socket", str(socket)
    )
    assert refused.returncode == 1
    assert f"can't listen on --health-socket {socket}: is its folder there?" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_an_embedded_store_that_was_killed_is_started_again(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server()
    with evosample.connect(server.address) as client:
        experiment = client.create_experiment("e", **SETTINGS)
        os.kill(server.store_pid, signal.SIGKILL)
        train(experiment, fixed_losses(100, 3))
        assert experiment.status().state == "finished"


def test_a_server_whose_store_ends_again_and_again_ends_and_says_so(
    start_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    server = start_server()
    for file in (tmp_path / "data0" / "appendonlydir").glob("*.manifest"):
        file.write_text("nonsense")
    os.kill(server.store_pid, signal.SIGKILL)
    assert server.process.wait(30) == 1
    assert "ends as soon as it has started" in (tmp_path / "data0.log").read_text()


def test_a_redis_of_ones_own_serves_as_well_and_is_left_running(start_server: Callable[..., ServerProcess]) -> None:
    store = start_server()  # only its embedded store is used
    other = start_server("--redis-url", f"unix://{store.store_socket}")
    with evosample.connect(store.address) as here, evosample.connect(other.address) as there:
        experiment = here.create_experiment("shared", **SETTINGS)
        assert there.get_experiment("shared").uid == experiment.uid
        assert other.stop() == 0
        train(experiment, fixed_losses(100, 3))


def test_redis_that_evicts_is_refused(start_server: Callable[..., ServerProcess]) -> None:
    store = start_server()
    redis.Redis(unix_socket_path=store.store_socket).config_set("maxmemory-policy", "allkeys-lru")
    refused = run_server("--redis-url", f"unix://{store.store_socket}", "--listen", "127.0.0.1:0")
    assert refused.returncode == 1
    assert "set it to noeviction" in refused.stderr


def test_a_private_server_ends_with_its_parent(tmp_path: Path) -> None:
    script = f"""
import os, signal, evosample
client = evosample.connect(data_dir={str(tmp_path)!r})
print(client.address)
client.create_experiment("e", num_samples=10, num_epochs=1, meta_batch_size=2, policy=evosample.Uniform())
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script], check=False, timeout=60, capture_output=True, text=True)
    folder = Path(killed.stdout.strip().removeprefix("unix:")).parent
    assert folder.name.startswith("evosample-")
    wait_until(lambda: not processes_with(str(tmp_path)) and not folder.exists())
    assert (tmp_path / "appendonlydir").exists(), "the scores stay where they were to be kept"


def test_a_private_server_keeps_its_scores_where_it_is_told(tmp_path: Path) -> None:
    with evosample.connect(data_dir=tmp_path / "scores") as client:
        experiment = client.create_experiment("e", **SETTINGS)
        train(experiment, fixed_losses(100, 3))
        before = experiment.export_scores()
    assert not processes_with(str(tmp_path))
    with evosample.connect(data_dir=tmp_path / "scores") as client:
        after = client.get_experiment("e").export_scores()
    assert (before.scores == after.scores).all()


def test_a_private_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        evosample.UnavailableError, match=r"the private server could not start: .*can't keep data in .*file"
    ):
        evosample.connect(data_dir=tmp_path / "file")


def test_deleting_and_finishing_leave_no_keys_behind(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server()
    store = redis.Redis(unix_socket_path=server.store_socket)
    with evosample.connect(server.address) as client:
        experiment = client.create_experiment("e", **SETTINGS, policy=EvolvedSampling(prune_ratio=0.2))
        train(experiment, fixed_losses(100, 3))
        names = sorted(str(key).split(":")[-2] for key in store.keys("*"))
        assert names.count("score") == 2, "two epochs are retained"
        assert names.count("sample_id") == 0, "no epoch is open any more"
        assert len(list(client.list_experiments())) == 1
        client.delete_experiment("e")
        assert not list(client.list_experiments())
    assert store.keys("*") == []


@pytest.mark.parametrize(
    ("vendor", "family", "flags", "is_slow"),
    [
        ("AuthenticAMD", 25, "fpu avx2 avx512f avx512vl", True),
        ("AuthenticAMD", 25, "fpu avx2", False),  # Zen 3
        ("AuthenticAMD", 26, "fpu avx2 avx512f avx512vl", False),  # Zen 5
        ("GenuineIntel", 6, "fpu avx2 avx512f avx512vl", False),
    ],
)
def test_numpy_is_kept_from_instructions_that_are_slow(vendor: str, family: int, flags: str, is_slow: bool) -> None:
    core = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nflags\t\t: {flags}\nbugs\t\t:\n\n"
    assert is_zen_4((core + core).splitlines(keepends=True)) == is_slow
    assert not is_zen_4([])
