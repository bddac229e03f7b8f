"""The command line: what it shows, to people and to programs, and how it fails."""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import grpc
import numpy as np
import pytest
import trustme
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import HealthServicer
from typer.testing import CliRunner

import evosample
from evosample import cli
from evosample.v1 import administration_pb2 as pb
from stores import StandaloneStore
from support import Guarded, ServerProcess, fixed_losses, process

StartServer = Callable[..., ServerProcess]
SETTINGS: dict[str, Any] = {
    "num_samples": 100,
    "num_epochs": 3,
    "meta_batch_size": 10,
    "mini_batch_size": 5,
    "policy": evosample.EvolvedSampling(prune_ratio=0.2),
}


def run(server: ServerProcess, *arguments: str, **options: Any) -> str:
    environment = {"EVOSAMPLE_ADDRESS": server.address, "COLUMNS": "160"}
    result = CliRunner().invoke(cli.app, list(arguments), env=environment, **options)
    assert result.exit_code == 0, result.output
    return result.stdout


def json_of(server: ServerProcess, *arguments: str) -> Any:
    return json.loads(run(server, *arguments, "--json"))


def train(experiment: evosample.Experiment) -> None:
    for epoch in experiment.epochs():
        for batch in epoch:
            batch.select(fixed_losses(100, 3)[batch.epoch, batch.sample_ids])


# Experiments


def test_an_experiment_is_created_once(server: ServerProcess, client: evosample.Client, name: str) -> None:
    command = ["create", name, "--samples=100", "--epochs=3", "--meta-batch-size=10", "--mini-batch-size=5"]
    made = json_of(server, *command, "--policy=evolved-sampling,prune_ratio=0.2")
    assert made["spec"]["policy"] == {
        "kind": "EvolvedSampling",
        "beta1": 0.2,
        "beta2": 0.8,
        "prune_ratio": 0.2,
        "annealing": 0.05,
        "set_draw": "successive",
        "batch_draw": "successive",
    }
    assert client.create_experiment(name, **SETTINGS).uid == made["uid"]
    assert name in run(server, *command, "--policy=evolved_sampling,prune_ratio=0.2")
    code, _, said = process(*command, EVOSAMPLE_ADDRESS=server.address)
    assert code == 1
    assert "prune_ratio=0.0" in said


def test_experiments_are_listed_and_shown(server: ServerProcess, client: evosample.Client, name: str) -> None:
    train(client.create_experiment(name, **SETTINGS))
    (listed,) = [each for each in json_of(server, "list") if each["name"] == name]
    assert listed["epoch"] == 3 or listed["state"] == "sealed"
    assert name in run(server, "list")
    client.get_experiment(name).export_scores()
    shown = json_of(server, "show", name)
    assert [each["summary"]["epoch"] for each in shown["epochs"]] == [0, 1, 2]
    assert shown["status"]["state"] == "finished"
    assert datetime.datetime.fromisoformat(shown["epochs"][0]["end_time"]).tzinfo is not None
    assert "finished" in run(server, "show", name)


def test_an_experiment_is_watched_until_it_ends(server: ServerProcess, client: evosample.Client, name: str) -> None:
    train(client.create_experiment(name, **SETTINGS))
    looks = [json.loads(line) for line in run(server, "watch", name, "--interval=0.1", "--json").splitlines()]
    assert looks[-1]["status"]["state"] == "finished"
    seen = run(server, "watch", name, "--interval=0.1")
    assert "100.0%" in seen
    assert "epochs" in seen


def test_deleting_asks_first(server: ServerProcess, client: evosample.Client, name: str) -> None:
    uid = client.create_experiment(name, **SETTINGS).uid
    environment = {"EVOSAMPLE_ADDRESS": server.address}
    refused = CliRunner().invoke(cli.app, ["delete", name], env=environment, input="n\n")
    assert refused.exit_code == 1
    assert client.get_experiment(name).uid == uid
    assert json_of(server, "delete", name, "--yes")["uid"] == uid


def test_every_command_answers_programs_too() -> None:
    def commands(app: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        found = [
            (*path, command.name or command.callback.__name__.replace("_", "-")) for command in app.registered_commands
        ]
        for group in app.registered_groups:
            found += commands(group.typer_instance, (*path, group.name) if isinstance(group.name, str) else path)
        return found

    everything = commands(cli.app)
    assert {path[0] for path in everything} >= {"status", "list", "show", "watch", "create", "doctor", "token"}
    for path in everything:
        if path in (("index",), ("token", "revoke")):
            continue
        said = CliRunner().invoke(cli.app, [*path, "--help"], env={"COLUMNS": "200"}).output
        assert "--json" in said, path


# Exit codes


def test_exit_codes_say_what_kind_of_failure_it_was(server: ServerProcess, start_server: StartServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    guarded = start_server("--tokens")
    for arguments, at, expected in [
        (["list"], server.address, 0),
        (["list", "--no-such-option"], server.address, 2),
        (["show", "no-such-experiment"], server.address, 3),
        (["list"], guarded.address, 4),
        (["list"], address, 5),
    ]:
        code, _, said = process(*arguments, EVOSAMPLE_ADDRESS=at)
        assert code == expected, said


def test_a_wrong_call_is_told_from_a_failure(
    server: ServerProcess,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    create = ["create", name, "--samples=100", "--epochs=3", "--meta-batch-size=10"]
    np.savez(tmp_path / "whole.npz", scores=np.ones(100))
    whole = (tmp_path / "whole.npz").read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(np.ones(100).tobytes())] ^= 1
    np.save(tmp_path / "array.npy", np.ones(100))
    (tmp_path / "damaged.npz").write_bytes(damaged)
    (tmp_path / "cut-off.npz").write_bytes(whole[:-10])
    (tmp_path / "text.npz").write_text("scores")
    (tmp_path / "empty.npz").touch()
    np.savez(tmp_path / "others.npz", losses=np.ones(100))
    run(server, *create, "--mini-batch-size=5")
    monkeypatch.setenv("EVOSAMPLE_ADDRESS", server.address)
    for arguments, expected, reason in [
        ([*create, "--policy=uniform,prune_ratio=0.5"], 2, "'prune_ratio=0.5' is no setting of uniform; expected none"),
        ([*create, "--policy=ucb,c"], 2, "'c' is no setting of ucb; expected alpha=VALUE or c=VALUE or prune_ratio"),
        ([*create, "--policy=best"], 2, "there is no policy 'best' here; expected one of evolved-sampling, uniform"),
        ([*create, "--policy=ucb,prune_ratio=1.5"], 2, "prune_ratio=1.5: expected a number"),
        ([*create, "--policy=ucb,prune_ratio=nan"], 2, "prune_ratio=nan: expected a number"),
        ([*create, "--policy=ucb,c=much"], 2, "c='much': expected a number"),
        (["token", "create", "--role=reader", f"--expires-in={10**20}w"], 2, "expected a number of s, m, h, d or w"),
        (["token", "create", "--role=reader", "--expires-in=999999999w"], 2, "expected an integer from 1 to"),
        (["index", "x.tar", "--header=Authorization"], 2, "expected 'NAME: VALUE'"),
        (["index", "train-{0..3.tar"], 2, "Unbalanced braces: 'train-{0..3.tar'"),
        (["import", name, f"{tmp_path}/array.npy"], 2, "array.npy is no .npz file, or is damaged"),
        (["import", name, f"{tmp_path}/damaged.npz"], 2, "damaged.npz is no .npz file, or is damaged"),
        (["import", name, f"{tmp_path}/cut-off.npz"], 2, "cut-off.npz is no .npz file, or is damaged"),
        (["import", name, f"{tmp_path}/text.npz"], 2, "text.npz is no .npz file, or is damaged"),
        (["import", name, f"{tmp_path}/empty.npz"], 2, "empty.npz is no .npz file, or is damaged"),
        (["import", name, f"{tmp_path}/others.npz"], 2, "has no array `scores`"),
        (["import", name, f"{tmp_path}/no-such.npz"], 2, "no-such.npz: No such file"),
        (["import", name, f"{tmp_path}/whole.npz"], 0, ""),
        (["export", name, f"{tmp_path}/no/such/folder.npz"], 1, "no/such/folder.npz: No such file"),
    ]:
        monkeypatch.setattr(sys, "argv", ["evosample", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr().err
        assert (ended.value.code, reason in said) == (expected, True), said
        assert said.count("\n") == (expected != 0), said


# What is written where


def test_what_the_encoding_has_not_is_escaped(server: ServerProcess, name: str) -> None:
    made = json_of(server, "token", "create", "--role=reader", f"--project={name}", "--note=für 日本")
    for encoding, expected in [
        ("ascii", r"f\xfcr \u65e5\u672c"),
        ("latin-1", r"r \u65e5\u672c"),
        ("utf-8", "für 日本"),
    ]:
        command = [sys.executable, "-c", "from evosample.cli import main; main()", "token", "list", f"--project={name}"]
        environment = os.environ | {"EVOSAMPLE_ADDRESS": server.address, "PYTHONIOENCODING": encoding, "COLUMNS": "160"}
        said = subprocess.run(command, env=environment, capture_output=True, check=True).stdout.decode(encoding)
        assert made["id"] in said
        assert expected in said


def test_questions_do_not_mix_with_json(server: ServerProcess, client: evosample.Client, name: str) -> None:
    uid = client.create_experiment(name, **SETTINGS).uid
    command = [sys.executable, "-c", "from evosample.cli import main; main()", "delete", name, "--json"]
    environment = os.environ | {"EVOSAMPLE_ADDRESS": server.address}
    done = subprocess.run(command, env=environment, capture_output=True, check=True, text=True, input="y\n")
    assert json.loads(done.stdout)["uid"] == uid
    assert "Delete experiment" in done.stderr


def test_a_full_disk_is_told_in_a_line(server: ServerProcess) -> None:
    command = [sys.executable, "-c", "from evosample.cli import main; main()"]
    for arguments in (["status"], ["status", "--json"]):
        with Path("/dev/full").open("w") as full:
            environment = os.environ | {"EVOSAMPLE_ADDRESS": server.address}
            done = subprocess.run(
                [*command, *arguments], env=environment, stdout=full, stderr=subprocess.PIPE, text=True
            )
        assert done.returncode == 1
        assert done.stderr == "evosample: [Errno 28] No space left on device\n"


@contextmanager
def watching(address: str, name: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], IO[str], IO[str]]]:
    """`evosample watch` as a process, with its output and its errors."""
    command = [sys.executable, "-c", "from evosample.cli import main; main()", "watch", name, *options]
    environment = os.environ | {"EVOSAMPLE_ADDRESS": address}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        yield process, process.stdout, process.stderr


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_what_is_watched_through_a_pipe_is_shown_at_once_and_ends_with_it(
    server: ServerProcess, client: evosample.Client, name: str, options: list[str]
) -> None:
    client.create_experiment(name, **SETTINGS)
    with watching(server.address, name, "--interval=0.1", *options) as (process, output, errors):
        assert name in output.readline()
        output.close()
        assert process.wait(30) == 1
        assert errors.read() == ""


def test_ctrl_c_ends_a_watch_without_a_traceback(server: ServerProcess, client: evosample.Client, name: str) -> None:
    client.create_experiment(name, **SETTINGS)
    with watching(server.address, name, "--json") as (process, output, errors):
        output.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert errors.read() == ""


def test_a_newer_server_s_answer_is_no_traceback() -> None:
    with other_server(role=99) as address:
        code, _, said = process("status", EVOSAMPLE_ADDRESS=address)
    assert code == 1
    assert said.count("\n") == 1, said


# What stands in square brackets


def test_what_looks_like_markup_is_shown_as_it_is(server: ServerProcess, name: str) -> None:
    note = "[/x] [red]for[/red] :smile: 100%"
    token_id = json_of(server, "token", "create", "--role=reader", f"--project={name}", f"--note={note}")["id"]
    (row,) = [line for line in run(server, "token", "list", f"--project={name}").splitlines() if token_id in line]
    assert note in row
    for wrong in ("[/x]", "[bold]"):
        code, _, said = process("show", wrong, EVOSAMPLE_ADDRESS=server.address)
        assert (code, said.count("\n")) == (2, 1), said
        assert said.startswith(f"evosample: name='{wrong}': expected")
    check, said = diagnosed("[/x].invalid:1")
    assert check == "address"
    assert "no host of the name [/x].invalid" in said


# The server


def test_the_state_of_a_server_is_shown(server: ServerProcess) -> None:
    assert evosample.__version__ in run(server, "status")
    assert json_of(server, "status")["store_error"] == ""


def diagnosed(address: str, *options: str, **environment: str) -> tuple[str, str]:
    """The check that fails, and what is said of it; by the command as a process."""
    code, said, errors = process("doctor", "--address", address, *options, **environment)
    wrong = re.findall(r"^wrong (.+?): (.+)$", said, re.MULTILINE)
    assert (code, len(wrong)) in ((0, 0), (1, 1)), said + errors
    return wrong[0] if wrong else ("", "")


@contextmanager
def other_server(*, off_s: float = 0, is_older: bool = False, **changes: Any) -> Iterator[str]:
    """Where a server of another version listens, or on a machine of another time."""

    def answer(request: pb.GetServerRequest, context: grpc.ServicerContext) -> pb.GetServerResponse:
        fields: dict[str, Any] = {"version": evosample.__version__, "role": pb.ROLE_READER} | changes
        response = pb.GetServerResponse(**fields)
        response.server_time.FromDatetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=off_s))
        return response

    get_server = grpc.unary_unary_rpc_method_handler(
        answer, pb.GetServerRequest.FromString, pb.GetServerResponse.SerializeToString
    )
    methods = {} if is_older else {"GetServer": get_server}
    administration = grpc.method_handlers_generic_handler("evosample.v1.AdministrationService", methods)
    server = grpc.server(ThreadPoolExecutor(4))
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(), server)
    server.add_generic_rpc_handlers((administration,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_a_doctor_finds_nothing_wrong_where_nothing_is(server: ServerProcess) -> None:
    assert diagnosed(server.address) == ("", "")
    said = run(server, "doctor")
    for check in ("address", "TLS", "token", "version", "clock", "store", "latency"):
        assert check in said
    assert "wrong" not in said
    assert all(finding["is_ok"] for finding in json_of(server, "doctor"))


def test_a_doctor_finds_a_wrong_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    check, said = diagnosed(f"127.0.0.1:{port}")
    assert check == "address"
    assert f"nothing listens on 127.0.0.1:{port}: start the server there" in said
    assert "no host of the name no-such-host.invalid" in diagnosed("no-such-host.invalid:50051")[1]
    assert "is no socket" in diagnosed("unix:/no/such/socket")[1]


def test_a_doctor_finds_what_is_no_selection_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        check, said = diagnosed(f"127.0.0.1:{other.getsockname()[1]}")
    assert check == "server"
    assert "no answer of a selection server" in said


def test_a_doctor_finds_what_is_wrong_with_tls_and_tokens(start_server: StartServer, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    cert, key, ca, other = (str(tmp_path / each) for each in ("server.pem", "server.key", "ca.pem", "other.pem"))
    certificate.cert_chain_pems[0].write_to_path(cert)
    certificate.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(ca)
    trustme.CA().cert_pem.write_to_path(other)
    root = tmp_path / "root-token"
    root.write_text("root" * 10)
    server = start_server("--tls-cert", cert, "--tls-key", key, "--root-token-file", str(root))
    address = server.address
    assert diagnosed(address, "--tls-ca", ca, "--token-file", str(root)) == ("", "")
    check, said = diagnosed(address)
    assert check == "TLS"
    assert "it speaks TLS, and this client does not" in said
    open_server = start_server()
    check, said = diagnosed(open_server.address, "--tls-ca", ca)
    assert check == "TLS"
    assert "it does not speak TLS: start it with --tls-cert and --tls-key, or leave out tls" in said
    check, said = diagnosed(address, "--tls-ca", other)
    assert check == "TLS"
    assert "is signed by no authority that this client knows" in said
    check, said = diagnosed(address, "--tls-ca", ca)
    assert check == "token"
    assert "none came with the call" in said
    check, said = diagnosed(address, "--tls-ca", ca, EVOSAMPLE_TOKEN="evo_abcdefghijkl_" + "x" * 43)
    assert check == "token"
    assert "the token is not valid" in said
    assert "xxxx" not in said


def test_a_doctor_finds_what_is_wrong_with_the_store(
    start_server: StartServer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store = StandaloneStore(tmp_path / "store")
    request.addfinalizer(store.close)
    server = start_server("--redis-url", f"redis://127.0.0.1:{store.port}/0")
    assert diagnosed(server.address) == ("", "")
    with store.client() as redis:
        for setting, value, remedy in [
            ("maxmemory", "1mb", "It is full: give Redis more memory (maxmemory)"),
            ("min-replicas-to-write", "1", "It takes no writes without its replicas: start them"),
        ]:
            redis.config_set(setting, value)
            check, said = diagnosed(server.address)
            assert check == "store"
            assert remedy in said
            redis.config_set(setting, "0")
        redis.execute_command("REPLICAOF", "127.0.0.1", "1")
        check, said = diagnosed(server.address)
        assert check == "store"
        assert "It is read-only: is --redis-url a replica?" in said
        redis.execute_command("REPLICAOF", "NO", "ONE")
    assert diagnosed(server.address) == ("", "")
    store.close()
    check, said = diagnosed(server.address)
    assert check == "store"
    assert "Is Redis running, where --redis-url says?" in said
    code, said, _ = process("status", "--json", EVOSAMPLE_ADDRESS=server.address)
    assert code == 5
    assert str(store.port) in json.loads(said)["store_error"]


def test_a_doctor_does_not_wait_for_a_store_that_hangs_again_and_again(
    start_server: StartServer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store = StandaloneStore(tmp_path / "store")
    request.addfinalizer(store.close)
    server = start_server("--redis-url", store.url)
    store.pause()
    code, said, _ = process("doctor", "--json", EVOSAMPLE_ADDRESS=server.address)
    assert code == 1
    assert json.loads(said)[-1]["check"] == "store"


def test_a_doctor_finds_that_the_store_is_away_where_tokens_are_in_it(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store = StandaloneStore(tmp_path / "store")
    request.addfinalizer(store.close)
    guarded = Guarded(tmp_path, "--redis-url", store.url)
    request.addfinalizer(guarded.stop)
    token, unused = guarded.new_token("reader"), guarded.new_token("reader")
    assert diagnosed(guarded.address, EVOSAMPLE_TOKEN=token) == ("", "")
    store.kill()
    check, said = diagnosed(guarded.address, EVOSAMPLE_TOKEN=unused)
    assert check == "store"
    assert said.endswith("can't use its store: its log says why. Is Redis running, where --redis-url says?")
    code, _, said = process("list", EVOSAMPLE_ADDRESS=guarded.address, EVOSAMPLE_TOKEN=token)
    assert code == 5
    assert "can't use its store" in said
    assert "is the address right" not in said, "a server has answered"


def test_options_of_tls_go_before_the_environment_file_by_file(start_server: StartServer, tmp_path: Path) -> None:
    authority, of_clients, other = trustme.CA(), trustme.CA(), trustme.CA()
    issued, mine = authority.issue_cert("127.0.0.1"), of_clients.issue_cert("me@example.org")
    for name, pem in [
        ("ca", authority.cert_pem),
        ("cert", issued.cert_chain_pems[0]),
        ("key", issued.private_key_pem),
        ("client-ca", of_clients.cert_pem),
        ("my-cert", mine.cert_chain_pems[0]),
        ("my-key", mine.private_key_pem),
        ("other", other.cert_pem),
    ]:
        pem.write_to_path(str(tmp_path / name))
    files = {name: str(tmp_path / name) for name in ("ca", "cert", "key", "client-ca", "my-cert", "my-key", "other")}
    options = [f"--tls-{name}={files[name]}" for name in ("cert", "key", "client-ca")]
    server = start_server(*options, "--no-tokens", "--insecure")
    right = {
        "EVOSAMPLE_ADDRESS": server.address,
        "EVOSAMPLE_TLS_CA": files["ca"],
        "EVOSAMPLE_TLS_CERT": files["my-cert"],
        "EVOSAMPLE_TLS_KEY": files["my-key"],
    }
    for arguments, changes in [
        ([], {}),
        (["--tls"], {}),
        (["--tls"], {"EVOSAMPLE_TLS": "0"}),
        ([f"--tls-ca={files['ca']}"], {"EVOSAMPLE_TLS_CA": files["other"]}),
        ([f"--tls-ca={files['ca']}"], {"EVOSAMPLE_TLS": "0"}),
        ([f"--tls-cert={files['my-cert']}"], {"EVOSAMPLE_TLS_CERT": ""}),
    ]:
        code, _, said = process("list", *arguments, **(right | changes))
        assert code == 0, (arguments, changes, said)
    code, _, said = process("list", "--no-tls", **right)
    assert code == 5
    assert "it speaks TLS, and this client does not" in said


@pytest.mark.parametrize(("version", "older"), [("99.0.0", "client"), ("0.0.9", "server"), ("0.1.7", "")])
def test_a_doctor_finds_that_versions_differ(version: str, older: str) -> None:
    with other_server(version=version) as address:
        check, said = diagnosed(address)
    assert check == ("version" if older else "")
    assert not older or said == f"client {evosample.__version__}, server {version}: upgrade the {older}"


def test_a_doctor_finds_that_versions_are_too_far_apart_to_talk() -> None:
    with other_server(is_older=True) as address:
        assert "it is an older server" in dict([diagnosed(address)])["version"]
    with other_server(role=99) as address:
        assert "upgrade the client" in dict([diagnosed(address)])["version"]


@pytest.mark.parametrize(("off_s", "expected"), [(-3600, r"36\d\d s behind"), (90, r"[89]\d s ahead of"), (2, "")])
def test_a_doctor_finds_that_clocks_differ(off_s: float, expected: str) -> None:
    with other_server(off_s=off_s) as address:
        check, said = diagnosed(address)
    assert check == ("clock" if expected else "")
    assert re.search(expected, said)
    assert not expected or "Let both machines keep time (NTP)" in said
