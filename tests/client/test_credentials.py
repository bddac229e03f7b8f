"""Where a client has its token and its certificates from, and where they must not go; and the command line's tokens."""

from __future__ import annotations

import json
import logging
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import evosample
import evosample.torch
from evosample import cli
from support import ROOT_TOKEN, ServerProcess

SETTINGS: dict[str, Any] = {"num_samples": 100, "num_epochs": 3, "meta_batch_size": 10, "mini_batch_size": 5}


@pytest.fixture
def guarded(tmp_path: Path, start_server: Callable[..., ServerProcess]) -> ServerProcess:
    """A server that asks for tokens."""
    (tmp_path / "root").write_text(ROOT_TOKEN)
    return start_server("--tokens", "--root-token-file", str(tmp_path / "root"))


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ADDRESS", "TOKEN", "TOKEN_FILE", "TLS", "TLS_CA", "TLS_CERT", "TLS_KEY"):
        monkeypatch.delenv(f"EVOSAMPLE_{name}", raising=False)


def test_a_server_that_asks_for_a_token_says_how_to_pass_one(guarded: ServerProcess) -> None:
    with (
        evosample.connect(guarded.address) as client,
        pytest.raises(evosample.UnauthenticatedError, match=r"none came with the call.*EVOSAMPLE_TOKEN"),
    ):
        client.create_experiment("e", **SETTINGS)


def test_a_token_comes_from_the_argument_the_environment_or_a_file(
    guarded: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def name(**options: Any) -> Any:
        with evosample.connect(guarded.address, **options) as client:
            return client.server_status().project

    with evosample.connect(guarded.address, token=ROOT_TOKEN) as root:
        tokens = {project: root.create_token("reader", project=project)[1] for project in ("a", "b", "c")}
    (tmp_path / "token").write_text(tokens["a"] + "\n")
    monkeypatch.setenv("EVOSAMPLE_TOKEN_FILE", str(tmp_path / "token"))
    assert name() == "a"
    monkeypatch.setenv("EVOSAMPLE_TOKEN", tokens["b"])
    assert name() == "b"
    assert name(token=tokens["c"]) == "c"
    with pytest.raises(evosample.UnauthenticatedError):
        name(token="")
    monkeypatch.delenv("EVOSAMPLE_TOKEN")
    (tmp_path / "token").unlink()
    with pytest.raises(evosample.InvalidArgumentError, match=r"can't read the token in .*token: No such file"):
        name()


def test_a_role_that_is_too_low_is_named(guarded: ServerProcess) -> None:
    with evosample.connect(guarded.address, token=ROOT_TOKEN) as root:
        token, bearer_token = root.create_token("reader", project="mine")
    with (
        evosample.connect(guarded.address, token=bearer_token) as reader,
        pytest.raises(
            PermissionError, match=f"needs the role writer, and the token {token.id} is of a reader"
        ) as caught,
    ):
        reader.create_experiment("e", **SETTINGS)
    assert isinstance(caught.value, evosample.PermissionDeniedError)


def test_a_pickled_client_finds_its_token_again_and_carries_none_of_the_environment(
    guarded: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOSAMPLE_TOKEN", ROOT_TOKEN)
    with evosample.connect(guarded.address) as client:
        client.create_experiment("e", **SETTINGS)
        pickled = pickle.dumps(client)
    assert ROOT_TOKEN.encode() not in pickled
    script = "import pickle, sys; print(pickle.load(sys.stdin.buffer).get_experiment('e').uid)"
    worker = subprocess.run([sys.executable, "-c", script], input=pickled, capture_output=True, timeout=60, check=False)
    assert worker.returncode == 0, worker.stderr.decode()
    monkeypatch.delenv("EVOSAMPLE_TOKEN")
    with (
        evosample.connect(guarded.address, token=ROOT_TOKEN) as client,
        pickle.loads(pickle.dumps(client)) as copy,
    ):
        assert copy.get_experiment("e").project == "default", "what was passed reaches worker processes"


@pytest.mark.parametrize("token", ["two words", "evo_ä", "line\nbreak", "  "])
def test_what_can_be_no_token_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(evosample.InvalidArgumentError, match="expected a token") as caught:
        evosample.connect("127.0.0.1:1", token=token)
    assert token not in str(caught.value)


def test_a_token_that_others_could_read_on_its_way_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    for host, warnings in (("127.0.0.1", 0), (socket.gethostname(), 1)):
        with (
            caplog.at_level(logging.WARNING, "evosample"),
            evosample.connect(f"{host}:1", token=ROOT_TOKEN, connect_timeout_s=0.5) as client,
            pytest.raises(evosample.UnavailableError),
        ):
            client.server_status()
        assert caplog.text.count("unencrypted") == warnings
    assert ROOT_TOKEN not in caplog.text


def test_a_private_server_and_a_unix_socket_go_by_nothing_of_the_environment(
    guarded: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOSAMPLE_TOKEN_FILE", str(tmp_path / "nowhere"))
    monkeypatch.setenv("EVOSAMPLE_TLS", "1")
    monkeypatch.setenv("EVOSAMPLE_TOKENS", "1")
    with evosample.connect() as client:
        assert not client.server_status().needs_tokens
        with pickle.loads(pickle.dumps(client)) as copy:
            assert copy.server_status().role == "administrator"
        monkeypatch.setenv("EVOSAMPLE_TOKEN", ROOT_TOKEN)
        with evosample.connect(client.share()) as other:
            assert other.server_status().role == "administrator"
    for options in ({"token": ROOT_TOKEN}, {"tls": True}):
        with pytest.raises(evosample.InvalidArgumentError, match="a server that runs elsewhere"):
            evosample.connect(**options)
    with pytest.raises(evosample.InvalidArgumentError, match="no TLS on a unix socket"):
        evosample.connect("unix:/folder/socket", tls=True)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"TLS": "0", "TLS_CA": "ca.pem"}, None),
        ({"TLS": "1"}, evosample.Tls()),
        ({"TLS_CA": "ca.pem"}, evosample.Tls(ca="ca.pem")),
        ({"TLS_CERT": "c.pem", "TLS_KEY": "k.pem"}, evosample.Tls(cert="c.pem", key="k.pem")),
    ],
)
def test_tls_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: evosample.Tls | None
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(f"EVOSAMPLE_{name}", value)
    assert evosample.credentials.tls_to_use(None) == expected
    assert evosample.credentials.tls_to_use(False) is None
    assert evosample.credentials.tls_to_use(True) == evosample.Tls()
    monkeypatch.setenv("EVOSAMPLE_TLS", "perhaps")
    with pytest.raises(evosample.InvalidArgumentError, match="expected 1 or 0"):
        evosample.connect("127.0.0.1:1")


def test_the_address_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, server: ServerProcess, tmp_path: Path, name: str
) -> None:
    monkeypatch.setenv("EVOSAMPLE_ADDRESS", server.address)
    with evosample.connect() as client:
        client.create_experiment(name, **SETTINGS)
    with evosample.torch.connect() as client:
        assert client.get_experiment(name).name == name
    with evosample.connect(data_dir=tmp_path) as client, pytest.raises(evosample.NotFoundError):
        client.get_experiment(name)  # only a private server takes a data_dir


def test_the_command_line_makes_lists_and_revokes_tokens(guarded: ServerProcess, tmp_path: Path) -> None:
    def run(*arguments: str, fails: bool = False, token_file: str = "root") -> Any:
        environment = {"EVOSAMPLE_ADDRESS": guarded.address, "EVOSAMPLE_PROJECT": "mine", "COLUMNS": "200"}
        options = ["--token-file", str(tmp_path / token_file)]
        result = CliRunner().invoke(cli.app, [*arguments, *options], env=environment)
        assert (result.exit_code != 0) == fails, result.output
        return result.exception if fails else result

    made = run("token", "create", "--role", "writer", "--note", "nightly", "--expires-in", "90d")
    (tmp_path / "writer").write_text(made.stdout)
    token = made.stdout.strip()
    id_ = token.split("_")[1]
    assert "opens project mine as writer, until 2" in made.stderr
    assert token not in made.stderr
    run("list", token_file="writer")
    assert "needs the role administrator" in str(run("token", "list", fails=True, token_file="writer"))
    listed = run("token", "list").stdout
    assert id_ in listed
    assert "nightly" in listed
    assert token not in listed
    (as_json,) = json.loads(run("token", "list", "--json").stdout)
    assert (as_json["id"], as_json["role"], as_json["project"]) == (id_, "writer", "mine")
    assert json.loads(run("token", "create", "--role", "reader", "--json").stdout)["token"].startswith("evo_")
    run("token", "revoke", id_)
    time.sleep(1.1)  # for so long a server believes what it has looked up
    assert "not valid" in str(run("list", fails=True, token_file="writer"))
    assert "such as 90d" in str(run("token", "create", "--role", "reader", "--expires-in", "soon", fails=True))
