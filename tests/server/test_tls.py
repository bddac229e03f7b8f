"""Certificates: which are taken, what is said of those that are not, and renewing them; and who must have one."""

from __future__ import annotations

import datetime
import gc
import os
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

import evosample
from dashboards import dashboard_url
from evosample import diagnosis
from evosample_server.settings import Settings
from support import ServerProcess, fixed_losses, train

SETTINGS: dict[str, Any] = {"num_samples": 100, "num_epochs": 3, "meta_batch_size": 10, "mini_batch_size": 5}
LONG_AGO = datetime.datetime(2020, 1, 1)  # noqa: DTZ001  # as trustme takes it


class Certificates:
    """PEM files of certificates that two authorities have signed: `ours`, and one that nobody trusts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ours, self._strange = trustme.CA(), trustme.CA()
        self.ca = folder / "ca.pem"
        self.strange_ca = folder / "strange-ca.pem"
        self._ours.cert_pem.write_to_path(self.ca)
        self._strange.cert_pem.write_to_path(self.strange_ca)

    def issue(self, name: str, *, host: str = "127.0.0.1", is_ours: bool = True, expired: bool = False) -> None:
        authority = self._ours if is_ours else self._strange
        issued = authority.issue_cert(host, not_after=LONG_AGO if expired else None)
        issued.cert_chain_pems[0].write_to_path(self.cert(name))
        issued.private_key_pem.write_to_path(self.key(name))

    def cert(self, name: str) -> Path:
        return self._folder / f"{name}.pem"

    def key(self, name: str) -> Path:
        return self._folder / f"{name}.key"

    def options(self, name: str) -> list[str]:
        return ["--tls-cert", str(self.cert(name)), "--tls-key", str(self.key(name))]

    def tls(self, name: str | None = None) -> evosample.Tls:
        """What a client that trusts `ours` goes by, with a certificate of its own or without."""
        return evosample.Tls(self.ca) if name is None else evosample.Tls(self.ca, self.cert(name), self.key(name))


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


def refusal(address: str, tls: evosample.Tls | bool) -> str:
    """What a client says of a server that it can't use, within much less than its time-outs."""
    began_s = time.monotonic()
    with (
        evosample.connect(address, tls=tls, connect_timeout_s=60) as client,
        pytest.raises(evosample.UnavailableError) as caught,
    ):
        client.create_experiment("e", **SETTINGS)
    assert time.monotonic() - began_s < 30, "it has waited for what can't come"
    return str(caught.value)


@pytest.mark.parametrize(
    ("issued", "said"),
    [
        ({"expired": True}, "its certificate has expired"),
        ({"host": "example.org"}, "its certificate is not for this address"),
        ({"is_ours": False}, "its certificate is signed by no authority that this client knows"),
    ],
    ids=["expired", "another host's", "of a strange authority"],
)
def test_a_certificate_that_is_not_right_is_refused_at_once_and_why(
    certificates: Certificates, start_server: Callable[..., ServerProcess], issued: dict[str, Any], said: str
) -> None:
    certificates.issue("server", **issued)
    server = start_server(*certificates.options("server"), "--no-tokens")
    assert f"can't use the server at {server.address}: {said}" in refusal(server.address, certificates.tls())


def test_tls_and_plain_text_that_meet_are_told_from_a_server_that_is_away(
    certificates: Certificates, server: ServerProcess, start_server: Callable[..., ServerProcess]
) -> None:
    certificates.issue("server")
    with_tls = start_server(*certificates.options("server"), "--no-tokens")
    assert "it speaks TLS, and this client does not" in refusal(with_tls.address, False)
    assert "signed by no authority that this client knows" in refusal(with_tls.address, True)
    assert "it does not speak TLS" in refusal(server.address, certificates.tls())
    both = f"{server.address},{with_tls.address}"
    with evosample.connect(both, tls=certificates.tls()) as client:
        assert client.server_status().role == "administrator", "the one that can be used is"


def test_clients_show_certificates_where_they_are_asked_to(
    certificates: Certificates, start_server: Callable[..., ServerProcess]
) -> None:
    certificates.issue("server")
    certificates.issue("client", host="trainer")
    certificates.issue("expired", host="trainer", expired=True)
    certificates.issue("strange", host="trainer", is_ours=False)
    options = [*certificates.options("server"), "--tls-client-ca", str(certificates.ca), "--no-tokens"]
    server = start_server(*options)
    with evosample.connect(server.address, tls=certificates.tls("client")) as client:
        train(client.create_experiment("e", **SETTINGS), fixed_losses(100, 3))
        assert client.get_experiment("e").status().state == "finished"
    assert "it asks clients for a certificate: pass one with" in refusal(server.address, certificates.tls())
    for name in ("expired", "strange"):
        said = refusal(server.address, certificates.tls(name))
        assert "it turns down this client's certificate" in said
        assert f"{name}.pem" in said


@pytest.mark.parametrize("tls", [None, evosample.Tls()], ids=["in plain text", "over TLS"])
def test_nothing_is_said_of_a_server_that_resets_connections(tls: evosample.Tls | None) -> None:
    """As one that is killed: what came of it depends on how far the connection was, so it is tried often."""

    def reset_all() -> None:
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        resetting = threading.Thread(target=reset_all)
        resetting.start()
        try:
            address = "127.0.0.1:{1}".format(*listener.getsockname())
            assert {diagnosis.refusal(address, tls) for _ in range(300)} == {None}
            gc.collect()
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            resetting.join()


def test_browsers_show_certificates_where_clients_do_and_renewed_authorities_hold_at_once(
    certificates: Certificates, start_server: Callable[..., ServerProcess]
) -> None:
    certificates.issue("server")
    for name, is_ours in (("client", True), ("strange", False)):
        certificates.issue(name, host="browser", is_ours=is_ours)
    authorities = certificates.ca.with_name("authorities.pem")
    shutil.copy(certificates.ca, authorities)
    options = [*certificates.options("server"), "--tls-client-ca", str(authorities), "--no-tokens"]
    url = dashboard_url(start_server(*options, "--http", "127.0.0.1:0"))

    def gets_in(name: str | None) -> bool:
        context = ssl.create_default_context(cafile=certificates.ca)
        if name is not None:
            context.load_cert_chain(certificates.cert(name), certificates.key(name))
        try:
            return httpx.get(url, verify=context).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    assert [gets_in(name) for name in (None, "client", "strange")] == [False, True, False]
    certificates.strange_ca.replace(authorities)
    assert [gets_in(name) for name in (None, "client", "strange")] == [False, False, True]


def test_a_certificate_is_renewed_without_a_restart_and_a_broken_one_is_left_alone(
    certificates: Certificates, start_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    def shown() -> str:
        host, port = server.address.split(":")
        return ssl.get_server_certificate((host, int(port)))

    certificates.issue("server")
    first = certificates.cert("server").read_text()
    server = start_server(*certificates.options("server"), "--no-tokens")
    with evosample.connect(server.address, tls=certificates.tls()) as client:
        experiment = client.create_experiment("e", **SETTINGS)
        certificates.issue("next")
        shutil.copy(certificates.cert("next"), certificates.cert("server"))  # as yet without its key
        assert shown() == first
        assert shown() == first
        certificates.key("next").replace(certificates.key("server"))
        assert shown() == certificates.cert("next").read_text() != first
        certificates.key("server").unlink()
        assert shown() == certificates.cert("next").read_text()
        train(experiment, fixed_losses(100, 3))
        assert experiment.status().state == "finished"
    log = (tmp_path / "data0.log").read_text()
    assert log.count("can't use the renewed certificate") == 2, "said once for each time that the files have changed"
    assert "KEY_VALUES_MISMATCH" in log
    assert "No such file" in log


def test_a_renewed_certificate_that_can_t_be_used_is_tried_again_with_every_connection(
    certificates: Certificates, start_server: Callable[..., ServerProcess]
) -> None:
    """What has kept a server from it may go without a trace in the files: here their times are set back."""

    def shown() -> str:
        host, port = server.address.split(":")
        return ssl.get_server_certificate((host, int(port)))

    certificates.issue("server")
    server = start_server(*certificates.options("server"), "--no-tokens")
    certificates.issue("next")
    cert, key, new_cert = certificates.cert("server"), certificates.key("server"), certificates.cert("next").read_text()
    certificates.key("next").replace(key)
    cert.write_text(" " * len(new_cert))
    before = cert.stat()
    assert shown() != new_cert
    cert.write_text(new_cert)
    os.utime(cert, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert shown() == new_cert
    assert server.log.count("can't use the renewed certificate") == 1


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--listen", "0.0.0.0:0"], 2, "others can reach this server"),
        (["--listen", "[::]:0", "--tls-cert", "server.pem", "--tls-key", "server.key", "--no-tokens"], 2, "--insecure"),
        (["--listen", "0.0.0.0:0", "--tokens"], 2, "Give it a certificate"),
        (["--tls-cert", "server.pem"], 2, "--tls-cert and --tls-key belong together"),
        (["--tls-client-ca", "ca.pem"], 2, "--tls-client-ca needs --tls-cert"),
        (["--listen", "unix:/tmp/x", "--tls-cert", "server.pem", "--tls-key", "server.key"], 2, "on a unix socket"),
        (["--root-token-file", "root"], 2, "say --tokens"),
        (["--tls-cert", "server.pem", "--tls-key", "other.key"], 1, "KEY_VALUES_MISMATCH"),
        (["--tls-cert", "server.pem", "--tls-key", "nowhere.key"], 1, "No such file or directory: nowhere.key"),
        (["--tls-cert", "server.key", "--tls-key", "server.key"], 1, "can't use the server's certificate"),
    ],
)
def test_a_server_that_would_let_others_in_by_mistake_does_not_start(
    certificates: Certificates, tmp_path: Path, options: list[str], code: int, said: str
) -> None:
    certificates.issue("server")
    certificates.issue("other")
    command = [sys.executable, "-m", "evosample_server", "--listen", "127.0.0.1:0", *options]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False)
    assert refused.returncode == code
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("options", "needs_tokens"), [(["--insecure"], False), (["--insecure", "--tokens"], True)], ids=["open", "tokens"]
)
def test_a_server_may_be_insecure_if_it_is_told_so(tmp_path: Path, options: list[str], needs_tokens: bool) -> None:
    (tmp_path / "root").write_text(40 * "x")
    if needs_tokens:
        options = [*options, "--root-token-file", str(tmp_path / "root")]
    server = ServerProcess(tmp_path / "data", *options, listen="0.0.0.0:0")
    port = server.address.rpartition(":")[2]
    try:
        with evosample.connect(f"127.0.0.1:{port}", token=40 * "x") as client:
            assert client.server_status().needs_tokens == needs_tokens
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("settings", "needs_tokens"),
    [
        ({"listen": "127.0.0.1:0"}, False),
        ({"listen": "[::1]:0"}, False),
        ({"listen": "unix:/folder/socket"}, False),
        ({"listen": "localhost:0", "tokens": True}, True),
        ({"listen": "127.0.0.1:0", "tls_cert": "cert", "tls_key": "key"}, True),
        ({"listen": "127.0.0.1:0", "tls_cert": "cert", "tls_key": "key", "tokens": False}, False),
        ({"listen": "0.0.0.0:0", "tls_cert": "cert", "tls_key": "key"}, True),
        ({"listen": "0.0.0.0:0", "tls_cert": "cert", "tls_key": "key", "insecure": True}, False),
    ],
)
def test_tokens_are_asked_for_where_others_come_in(settings: dict[str, Any], needs_tokens: bool) -> None:
    assert Settings(**settings).needs_tokens == needs_tokens


def test_files_that_are_no_certificates_are_named_before_anything_is_sent(tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("nothing")
    for tls in (
        evosample.Tls(ca=tmp_path / "no.pem"),
        evosample.Tls(ca=tmp_path / "nowhere.pem"),
        evosample.Tls(cert=tmp_path / "no.pem", key=tmp_path / "no.pem"),
    ):
        with pytest.raises(
            evosample.InvalidArgumentError, match=r"tls: can't use .*no(where)?\.pem.*Expected PEM files"
        ):
            evosample.connect("127.0.0.1:1", tls=tls)
    with pytest.raises(evosample.InvalidArgumentError, match="belong together"):
        evosample.Tls(cert=tmp_path / "no.pem")
