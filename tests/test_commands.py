"""Every command in the documentation is run; those that need containers, a cluster or a registry are accounted for."""

from __future__ import annotations

import functools
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

import evosample
from pages import PAGES, ROOT, Block, blocks, commands, commands_under
from stores import HOST, StandaloneStore, free_port

# What stands under these headings is run as it stands there by another test.
RUN_BY = {
    "A store that a server has started": "tests/faults/test_backup.py",
    "A Redis or Valkey": "tests/faults/test_backup.py",
    "The containers of docker/": "docker/test.py",
    "Containers": "docker/test.py",
}
# Hosts and ports of the documentation, and what stands for them here.
OUR_HOSTS = {"scores.example.org": "localhost", "collector": HOST}
PORTS = ("50051", "8080", "9464", "4318")
SHELL = ("", "sh", "bash")
JOB = """
import evosample
client = evosample.connect("scores.example.org:50051")
experiment = client.create_experiment("job", num_samples=100, num_epochs=3, meta_batch_size=10, mini_batch_size=5)
for epoch in experiment.epochs():
    for batch in epoch:
        batch.select([1.0] * len(batch.sample_ids))
"""
TRAINING = """
def train(trial):
    experiment = trial.create_experiment(num_samples=100, meta_batch_size=10, mini_batch_size=5)
    with trial.training():
        for epoch in experiment.epochs():
            for batch in epoch:
                batch.select([1.0] * len(batch.sample_ids))
    return {"accuracy": 0.5}
"""


class Shell:
    """Runs the commands of a page one after the other, in a folder and with servers of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ports = {port: str(free_port()) for port in PORTS}
        address = f"{HOST}:{self._ports['50051']}"
        paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
        self._environment = os.environ | {
            "PATH": os.pathsep.join(paths),
            "EVOSAMPLE_LISTEN": address,  # both are the defaults, but for the port
            "EVOSAMPLE_ADDRESS": address,
        }
        self._server: subprocess.Popen[str] | None = None
        self._resources = ExitStack()
        self._log = self._resources.enter_context((folder / "log").open("a"))
        (folder / "train.py").write_text(self._ours(JOB))
        (folder / "my_training.py").write_text(TRAINING)

    def close(self) -> None:
        """End the server, and its store."""
        self._stop()
        self._resources.close()

    def _ours(self, command: str) -> str:
        """The command with the ports and hosts that there are here."""
        for host, ours in OUR_HOSTS.items():
            command = command.replace(host, ours)
        if "redis://redis:6379/0" in command:
            store = StandaloneStore(self.folder / "redis")
            self._resources.callback(store.close)
            command = command.replace("redis://redis:6379/0", store.url)
        return re.sub(rf":({'|'.join(PORTS)})\b", lambda found: f":{self._ports[found[1]]}", command)

    def run(self, command: str) -> None:
        """Run a command to its end; it has to succeed."""
        if command.startswith("evosample ") and self._server is None:
            self.serve("evosample-server")
        done = subprocess.run(
            ["bash", "-c", self._ours(command)],
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    def export(self, command: str) -> None:
        """Have what it sets in the environment of the commands that follow."""
        self._environment |= dict(each.split("=", 1) for each in shlex.split(self._ours(command))[1:])

    def serve(self, command: str) -> None:
        """Start a server in the place of the one before, and see whether what its options promise is there."""
        self._stop()
        command = self._ours(command)
        self._server = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self._server.stdout is not None
        ready = self._server.stdout.readline()
        assert ready.startswith("listening on "), (self.folder / "log").read_text()
        for option, path in (("--metrics", "/metrics"), ("--http", "/")):
            if found := re.search(rf"{option} (\S+)", command):
                with urllib.request.urlopen(f"http://{found[1]}{path}", timeout=10) as answer:
                    assert b"evosample" in answer.read()
        if "--tls-cert" not in command:  # pages look at an experiment of this name
            with evosample.connect(self._environment["EVOSAMPLE_ADDRESS"]) as client:
                client.create_experiment(
                    "mnist", num_samples=60_000, num_epochs=10, meta_batch_size=256, mini_batch_size=64
                )

    def _stop(self) -> None:
        if self._server is not None:
            self._server.send_signal(signal.SIGTERM)
            assert self._server.wait(30) == 0
            assert self._server.stdout is not None
            self._server.stdout.close()
            self._server = None


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    made = Shell(tmp_path)
    yield made
    made.close()


def has_target(command: str) -> None:
    """The targets are run by whoever contributes: here they are there."""
    done = subprocess.run(["bash", "-c", command.replace("make ", "make -n ", 1)], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr


def has_extras(command: str) -> None:
    """Registries are not asked: what is to be installed is what pyproject.toml has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = re.fullmatch(r"pip install\s+'evosample\[([a-z,]+)\]'(\s+#.*)?", command)
    assert found, command
    assert set(found[1].split(",")) <= set(project["optional-dependencies"])


@functools.cache
def compose_test() -> str:
    return (ROOT / "docker/test.py").read_text()


def has_containers(command: str) -> None:
    """`make test-compose` runs these files: they are there, and with them what is named."""
    words = shlex.split(command, comments=True)
    files = [after for before, after in pairwise(words) if before == "-f"]
    services: set[str] = set()
    for file in files:
        services |= set(yaml.safe_load((ROOT / file).read_text())["services"])
        overlay = Path(file).name.removeprefix("compose.").removesuffix(".yaml")
        assert overlay == "yaml" or f'compose, "{overlay}")' in compose_test()
    rest = words[2 + 2 * len(files) :]
    assert files
    assert rest[0] == "up"
    assert {word for word in rest[1:] if not word.startswith("-")} <= services


def has_secrets(command: str) -> None:
    """It makes secrets where the deployment looks for them: `make test-compose` does."""
    assert (ROOT / command).exists()
    assert Path(command).name in compose_test()


def has_manifests(command: str) -> None:
    """There is no cluster of Kubernetes here: what the command names is in the folder of its manifests."""
    words = shlex.split(command)
    if words[:3] == ["kubectl", "apply", "-k"]:
        folder = ROOT / words[3]
        for file in yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]:
            assert (folder / file).exists()
        return
    manifests = "".join(file.read_text() for file in (ROOT / "docker/kubernetes").glob("*.yaml"))
    for kind, name in re.findall(r"(namespace|deployment|secret generic|secret tls) ([a-z-]+)", command):
        known = {"namespace": f"name: {name}", "deployment": f"kind: Deployment\nmetadata:\n  name: {name}\n"}
        assert known.get(kind, f"secretName: {name}") in manifests, command
    for secret in re.findall(r"--from-file=docker/secrets/(\w+)", command):
        assert secret in (ROOT / "docker/make-secrets.sh").read_text()


# What a command begins with, and what is done about it; in a `Shell` it is run.
RUN = re.compile(r"(evosample|openssl|\(umask 077; openssl|EVOSAMPLE_TOKEN_FILE=\S+ python) ")
ACCOUNTED: dict[str, Callable[[str], None]] = {
    "make ": has_target,
    "pip install": has_extras,
    "docker compose ": has_containers,
    "docker/make-secrets.sh": has_secrets,
    "kubectl ": has_manifests,
}


def is_accounted(command: str) -> bool:
    """Whether there is something else to check of a command than what it does; it is checked."""
    for beginning, check in ACCOUNTED.items():
        if command.startswith(beginning):
            check(command)
            return True
    return False


def account(command: str, shell: Shell) -> None:
    """Run a command, or see to it that somebody does."""
    if is_accounted(command):
        return
    if command.startswith("export "):
        shell.export(command)
    elif command.split()[0] == "evosample-server":
        shell.serve(command)
    else:
        assert RUN.match(command), f"no rule says how to test {command!r}: add one"
        shell.run(command)


def shell_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language in SHELL]


@pytest.mark.parametrize("page", [page for page in PAGES if shell_blocks(page)], ids=lambda page: page.name)
def test_commands_do_what_the_page_says(page: Path, shell: Shell) -> None:
    if (
        page.name == "README.md" and page.parent == ROOT
    ):  # whose server has a certificate that it does not tell how to make
        for command in commands_under(ROOT / "docs/security.md", "From nothing to a guarded server"):
            if "openssl" in command:
                shell.run(command)
    for block in shell_blocks(page):
        if (test := RUN_BY.get(block.heading)) is None:
            for command in commands(block):
                account(command, shell)
        else:
            assert f'"{block.heading}"' in (ROOT / test).read_text()


PATH = re.compile(r"`[^`\n]*?\b((?:benchmarks|docker|examples|proto|server|tests)/[\w./-]+)")
INLINE = re.compile(r"`((?:make|pip install|docker|kubectl|evosample|evosample-server|promtool)\s[^`]+)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_a_sentence_name_what_there_is(page: Path) -> None:
    prose = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for path in PATH.findall(prose):
        assert (ROOT / path).exists(), path
    for found in INLINE.findall(prose):
        for command in " ".join(found.split()).split(" && "):
            if is_accounted(command):
                continue
            program, *words = command.split()
            if program == "promtool":  # run by tests/server/test_monitoring.py
                assert (ROOT / words[-1]).exists()
                continue
            known = help_of(program) if program == "evosample-server" else help_of(program, words[0])
            for option in re.findall(r"--[a-z-]+", command):
                assert option in known, command


@functools.cache
def help_of(*command: str) -> str:
    """What a program says of itself; it fails if there is no such command."""
    done = subprocess.run(
        [Path(sys.executable).parent / command[0], *command[1:], "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout
