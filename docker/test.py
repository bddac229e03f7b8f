"""Builds and runs this folder's deployments, beside any other that runs: `make test-compose`.

Needs Docker with compose, or Podman with podman-compose. Everything is torn down at the end, also after a failure.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import trustme
import yaml
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import evosample
from pages import commands_under

DOCKER = Path(__file__).parent
MANUAL = DOCKER.parent / "docs/operations.md"
MAX_ADDED_BYTES = 250 * 2**20
MAX_START_S = 3.0
BASE_IMAGE = "docker.io/library/python:3.11-slim-bookworm"
SETTINGS: dict[str, Any] = {
    "num_samples": 60_000,
    "num_epochs": 4,
    "meta_batch_size": 256,
    "mini_batch_size": 64,
    "policy": evosample.EvolvedSampling(prune_ratio=0.2),
}

_console = Console(highlight=False)


class Stack:
    """One deployment under a project name of its own."""

    def __init__(self, engine: str, compose: list[str], *overlays: str) -> None:
        self.engine = engine
        self.project = f"evosample-test-{os.getpid()}"
        files = ["compose.yaml", *(f"compose.{overlay}.yaml" for overlay in overlays)]
        self._compose = [*compose, "-p", self.project, "--profile", "demo"]
        for file in files:
            self._compose += ["-f", str(DOCKER / file)]
        self.port, self.http_port, self.prometheus_port = free_port(), free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.tls_folder = DOCKER / "secrets" / self.project  # where the engine, which may be elsewhere, finds it
        self._environment = os.environ | {
            "EVOSAMPLE_PORT": str(self.port),
            "EVOSAMPLE_HTTP_PORT": str(self.http_port),
            "EVOSAMPLE_PUBLIC_PORT": str(free_port()),
            "EVOSAMPLE_PUBLIC_HTTP_PORT": str(free_port()),
            "EVOSAMPLE_TLS_DIR": str(self.tls_folder),
            "PROMETHEUS_PORT": str(self.prometheus_port),
            "PROMETHEUS_IMAGE": os.environ.get("PROMETHEUS_IMAGE", "docker.io/prom/prometheus:latest"),
            "BUILDAH_FORMAT": "docker",  # Podman's own image format drops HEALTHCHECK
        }

    def compose(self, *arguments: str) -> None:
        """Run a command of compose."""
        subprocess.run([*self._compose, *arguments], check=True, env=self._environment)

    def compose_shell(self, arguments: str, folder: str) -> None:
        """Run a command of compose whose arguments are as they stand in a shell."""
        command = f"{shlex.join(self._compose)} {arguments}"
        subprocess.run(["bash", "-c", command], check=True, env=self._environment, cwd=folder)

    def run(self, *arguments: str, check: bool = True) -> str:
        """Run a command of the engine, and return what it prints."""
        done = subprocess.run([self.engine, *arguments], check=False, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return (done.stdout + done.stderr).strip()

    def containers(self, service: str) -> list[str]:
        """The ids of a service's containers."""
        labels = {"project": self.project, "service": service}
        filters = [f"--filter=label=com.docker.compose.{label}={value}" for label, value in labels.items()]
        return self.run("ps", "-aq", *filters).split()

    def is_healthy(self, service: str) -> bool:
        """Whether a service's health check passes."""
        (container,) = self.containers(service)
        if self.engine == "podman":  # by hand: its timers need systemd
            return subprocess.run(["podman", "healthcheck", "run", container], capture_output=True).returncode == 0
        return self.run("inspect", "-f", "{{.State.Health.Status}}", container) == "healthy"

    @contextlib.contextmanager
    def up(self, *services: str) -> Iterator[None]:
        """The services, until the context ends."""
        try:
            self.compose("up", "-d", *services)
            yield
        except BaseException:
            with contextlib.suppress(subprocess.CalledProcessError):
                self.compose("logs")
            raise
        finally:
            self.compose("down", "-v")
            shutil.rmtree(self.tls_folder, ignore_errors=True)

    def query(self, expression: str) -> list[Any]:
        """What Prometheus finds."""
        address = f"http://127.0.0.1:{self.prometheus_port}/api/v1/query?"
        with urllib.request.urlopen(address + urllib.parse.urlencode({"query": expression}), timeout=10) as answer:
            found: list[Any] = json.load(answer)["data"]["result"]
        return found


def main() -> None:
    """Test one deployment after the other."""
    engine, compose = find_engine()
    subprocess.run([DOCKER / "make-secrets.sh"], check=True)
    plain = Stack(engine, compose)
    with step("images"):
        plain.compose("build", "server", "trainer")
        check_image(plain)
    with plain.up("redis", "server", "replica", "prometheus"):
        with step("everything gets healthy"):
            for service in ("redis", "server", "replica"):
                wait_until(functools.partial(plain.is_healthy, service), f"{service} to be healthy")
            check_start(plain)
        with step("a job in a container goes on when its server is killed"):
            check_job(plain)
        with step("the dashboard shows the job"):
            assert "mnist" in httpx.get(f"http://127.0.0.1:{plain.http_port}/").text
        with step("every expression of the dashboards and the alerts returns data"):
            check_expressions(plain)
        with step("scores outlive the containers"):
            check_scores_outlive(plain)
        with step("a job goes on when the store is restored as docs/operations.md says"):
            check_restore(plain)
        with step("a job goes on when servers are replaced as docs/operations.md says"):
            check_upgrade(plain)
        with step("a server stops when it is asked to"):
            (server,) = plain.containers("server")
            plain.run("stop", server)
            code = plain.run("inspect", "-f", "{{.State.ExitCode}}", server)
            assert code == "0", f"the server stopped with code {code}"
    with step("TLS and tokens"):
        check_tls(Stack(engine, compose, "tls"))
    with step("a Redis Cluster"):
        check_cluster(Stack(engine, compose, "cluster"))
    _console.print("[green]docker: passed[/green]")


def find_engine() -> tuple[str, list[str]]:
    """The container engine, and what runs compose."""
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        return "docker", ["docker", "compose"]
    if shutil.which("podman-compose"):
        return "podman", ["podman-compose"]
    sys.exit("make test-compose needs docker compose or podman-compose")


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Say what is done, and how long it took."""
    began_s = time.monotonic()
    yield
    _console.print(f"[green]ok[/green] {what}, {time.monotonic() - began_s:.0f} s")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def wait_until(is_true: Callable[[], object], what: str, timeout_s: float = 90) -> None:
    """Wait for something."""
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline_s, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.5)


def check_image(stack: Stack) -> None:
    """How much the server's image adds to its base."""
    sizes = [int(stack.run("image", "inspect", "-f", "{{.Size}}", image)) for image in ("evosample:local", BASE_IMAGE)]
    added = sizes[0] - sizes[1]
    _console.print(f"   the image adds {added / 2**20:.0f} MiB to its base")
    assert added < MAX_ADDED_BYTES
    assert "torch" not in stack.run(
        "run", "--rm", "--entrypoint=ls", "evosample:local", "/opt/evosample/lib/python3.11/site-packages"
    )


def check_start(stack: Stack) -> None:
    """How soon a server answers after its start."""
    (server,) = stack.containers("server")
    stack.run("stop", server)
    began_s = time.monotonic()
    stack.run("start", server)
    with evosample.connect(stack.address) as client:
        list(client.list_experiments())  # it calls when it is gone through
    started_s = time.monotonic() - began_s
    _console.print(f"   a server answers {started_s:.1f} s after its start")
    assert started_s < MAX_START_S


def check_job(stack: Stack) -> None:
    """A training job in a container, one of whose servers is killed in the midst of it."""
    stack.compose("run", "-d", "trainer", "--address", "servers:50051", "--samples", "10000", "--epochs", "4")
    with evosample.connect(stack.address) as client:
        wait_until(lambda: [e.name for e in client.list_experiments()] == ["mnist"], "the job's experiment")
        experiment = client.get_experiment("mnist")
        wait_until(lambda: experiment.status().epoch >= 1, "the job's second epoch")
        (replica,) = stack.containers("replica")
        stack.run("kill", replica)
        wait_until(lambda: experiment.status().state == "finished", "the job's end", 300)
    (trainer,) = stack.containers("trainer")
    stack.run("wait", trainer)
    logs = stack.run("logs", trainer)
    assert re.search(r"test accuracy 9\d", logs), logs
    stack.run("start", replica)


def check_expressions(stack: Stack) -> None:
    """Whether Prometheus finds something for everything that people will look at."""
    rules = yaml.safe_load((DOCKER / "prometheus/alerts.yaml").read_text())
    alerts = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    panels = [
        target["expr"].replace("$instance", ".*").replace("$__rate_interval", "1m")
        for dashboard in (DOCKER / "grafana/dashboards").glob("*.json")
        for panel in json.loads(dashboard.read_text())["panels"]
        for target in panel.get("targets", ())
    ]
    assert len(panels) > 5
    (prometheus,) = stack.containers("prometheus")
    _console.print(stack.run("exec", prometheus, "promtool", "check", "rules", "/etc/prometheus/alerts.yaml"))
    for expression in [*panels, *map(without_threshold, alerts)]:
        wait_until(functools.partial(stack.query, expression), f"data of {expression}")
    _console.print(f"   {len(panels)} expressions of panels, {len(alerts)} of alerts")


def without_threshold(expression: str) -> str:
    """What an alert compares: it has data also while there is nothing to alert of."""
    return re.split(r"\s(?:[<>]=?|==|!=)\s", expression)[0]


def check_scores_outlive(stack: Stack) -> None:
    """Scores before and after all containers were replaced."""
    with evosample.connect(stack.address) as client:
        experiment = client.create_experiment("kept", **SETTINGS)
        for epoch in experiment.epochs():
            for batch in epoch:
                batch.select(np.random.default_rng().random(len(batch.sample_ids)))
        before = experiment.export_scores()
    assert before.num_visits.min() > 0
    stack.compose("down")
    stack.compose("up", "-d", "redis", "server", "replica", "prometheus")
    with evosample.connect(stack.address, connect_timeout_s=60) as client:
        after = client.get_experiment("kept").export_scores()
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def check_restore(stack: Stack) -> None:
    """A job that runs when its store is backed up, destroyed and restored."""
    back_up, *restore = commands_under(MANUAL, "The containers of docker/")
    with job(stack, "restored") as experiment, tempfile.TemporaryDirectory() as folder:
        run_documented(stack, back_up, folder)
        epoch = experiment.status().epoch
        wait_until(lambda: experiment.status().epoch > epoch, "an epoch after the backup")
        (redis,) = stack.containers("redis")
        stack.run("exec", redis, "rm", "-rf", "/data/appendonlydir")
        for command in restore:
            run_documented(stack, command, folder)


def check_upgrade(stack: Stack) -> None:
    """A job whose servers are replaced one after the other."""
    before = stack.containers("server") + stack.containers("replica")
    with job(stack, "upgraded"):
        # Of an unchanged image no new containers would be made.
        for command in commands_under(MANUAL, "Containers"):
            run_documented(stack, command.replace(" --no-deps", " --no-deps --force-recreate"), ".")
    assert not {*before} & {*stack.containers("server"), *stack.containers("replica")}


@contextlib.contextmanager
def job(stack: Stack, name: str) -> Iterator[evosample.Experiment]:
    """A job of this process that is in its second epoch, and has to come to its end."""
    losses = np.random.default_rng(7).random((SETTINGS["num_epochs"], SETTINGS["num_samples"]), np.float32)

    def train() -> None:
        with evosample.connect(stack.address, connect_timeout_s=60, outage_timeout_s=60) as client:
            for epoch in client.create_experiment(name, **SETTINGS).epochs():
                for batch in epoch:
                    batch.select(losses[batch.epoch, batch.sample_ids])
                    time.sleep(0.05)

    with (
        ThreadPoolExecutor(1) as pool,
        evosample.connect(stack.address, connect_timeout_s=60, outage_timeout_s=60) as client,
    ):
        training = pool.submit(train)
        wait_until(lambda: name in [e.name for e in client.list_experiments()], "the job's experiment")
        experiment = client.get_experiment(name)
        wait_until(lambda: experiment.status().epoch >= 1, "the job's second epoch")
        yield experiment
        assert not training.done(), "the job had ended too early"
        training.result()
        status = experiment.status()
        assert (status.state, status.unreported_rows) == ("finished", 0)


def run_documented(stack: Stack, command: str, folder: str) -> None:
    """Run a command of compose as the documentation has it, on this stack."""
    documented = "docker compose -f docker/compose.yaml"
    assert command.startswith(documented)
    stack.compose_shell(command.removeprefix(documented), folder)


def check_tls(stack: Stack) -> None:
    """A stranger, the root token, and a token that this makes."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1", "servers")
    secrets, folder = DOCKER / "secrets", stack.tls_folder
    folder.mkdir()
    (folder / "server.pem").write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    (folder / "server.key").write_bytes(certificate.private_key_pem.bytes())
    authority.cert_pem.write_to_path(folder / "ca.pem")
    tls = evosample.Tls(ca=folder / "ca.pem")
    with stack.up("redis", "server", "replica"):
        for token, error in ((None, evosample.UnauthenticatedError), ("wrong", evosample.UnauthenticatedError)):
            with evosample.connect(stack.address, tls=tls, token=token, connect_timeout_s=60) as client:
                try:
                    list(client.list_experiments())  # it calls when it is gone through
                except error:
                    continue
                raise AssertionError(f"a stranger got in with token={token!r}")
        with evosample.connect(stack.address, tls=tls, token=(secrets / "root_token").read_text()) as client:
            _, token = client.create_token("writer", project="vision")
        with evosample.connect(stack.address, tls=tls, token=token) as client:
            train_a_little(client)
        check_sign_in(f"https://127.0.0.1:{stack.http_port}", folder / "ca.pem", token)
        wait_until(lambda: stack.is_healthy("server"), "the server to be healthy behind TLS")


def check_sign_in(url: str, ca: Path, token: str) -> None:
    """The dashboard shows nothing to a stranger, and to the token's holder its project."""
    with httpx.Client(base_url=url, verify=ssl.create_default_context(cafile=ca), follow_redirects=True) as http:
        assert "little" not in http.get("/", headers={"accept": "text/html"}).text
        assert http.post("/sign-in", data={"token": "wrong"}).status_code == httpx.codes.UNAUTHORIZED
        assert "little" in http.post("/sign-in", data={"token": token}).text


def check_cluster(stack: Stack) -> None:
    """Experiments on several nodes, which outlive that these come back with each other's addresses."""
    services = ("node-1", "node-2", "redis", "server", "replica")
    names = ("a", "b", "c", "d")
    with stack.up(*services):
        with evosample.connect(stack.address, connect_timeout_s=90) as client:
            for name in names:
                train_a_little(client, name)
        before = addresses(stack, "node-1", "node-2")
        stack.compose("down")
        for service in ("node-2", "node-1"):
            stack.compose("up", "-d", service)
        stack.compose("up", "-d", *services)
        assert addresses(stack, "node-1", "node-2") != before, "the test tests nothing"
        with evosample.connect(stack.address, connect_timeout_s=120) as client:
            for name in names:
                assert client.get_experiment(name).export_scores().num_visits.min() > 0


def addresses(stack: Stack, *services: str) -> list[str]:
    """Of the services' containers within their network."""
    template = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    return [stack.run("inspect", "-f", template, container) for s in services for container in stack.containers(s)]


def train_a_little(client: evosample.Client, name: str = "little") -> None:
    """All epochs of a small experiment."""
    settings = SETTINGS | {"num_samples": 1_000, "meta_batch_size": 100, "mini_batch_size": 25}
    experiment = client.create_experiment(name, **settings)
    for epoch in experiment.epochs():
        for batch in epoch:
            batch.select(np.ones(len(batch.sample_ids)))
    assert experiment.export_scores().num_visits.min() > 0


if __name__ == "__main__":
    main()
