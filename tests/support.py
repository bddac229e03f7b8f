"""What tests share: real servers as child processes, and a training job without a model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import trustme
from numpy.typing import NDArray

import evosample

ROOT_TOKEN = "the-root-token-of-these-tests-alone"


class ServerProcess:
    """An `evosample-server` with an embedded store, over a real socket."""

    def __init__(
        self, data_dir: Path, *options: str, listen: str = "127.0.0.1:0", python_path: Path | None = None
    ) -> None:
        self._data_dir = data_dir
        self._options = options
        paths = [*filter(None, [python_path, os.environ.get("PYTHONPATH")])]
        self._environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
        self.address = ""
        self.start(listen)

    def start(self, listen: str) -> None:
        """Start on the same data directory."""
        command = [sys.executable, "-m", "evosample_server", "--listen", listen, "--data-dir", str(self._data_dir)]
        self._log = (self._data_dir.parent / f"{self._data_dir.name}.log").open("ab")
        self.process = subprocess.Popen(
            [*command, *self._options], stdout=subprocess.PIPE, stderr=self._log, env=self._environment
        )
        assert self.process.stdout is not None
        ready = self.process.stdout.readline().decode()
        assert ready.startswith("listening on "), self.log
        self.address = ready.removeprefix("listening on ").strip()

    @property
    def log(self) -> str:
        """What it has written to stderr."""
        return Path(self._log.name).read_text()

    @property
    def store_pid(self) -> int:
        """The process of its embedded store."""
        pid = self.process.pid
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(child)

    @property
    def store_socket(self) -> str:
        """The unix socket of its embedded store, as its process title tells it."""
        title = Path(f"/proc/{self.store_pid}/cmdline").read_text()
        return title.rpartition("unixsocket:")[2].strip("\0 ")

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self._closed()

    def stop(self) -> int:
        """End it with SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self._closed()

    def restart(self) -> None:
        """Start it again where it was."""
        self.start(self.address)

    def _closed(self) -> int:
        code = self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()
        return code


class Guarded(ServerProcess):
    """A server that asks for tokens, and what it takes to reach it.

    Attributes:
        tls: what its clients go by.
        ca: the authority that has signed its certificate, if it has one.
    """

    def __init__(self, folder: Path, *options: str, has_tls: bool = False) -> None:
        (folder / "root-token").write_text(f"{ROOT_TOKEN}\n")
        options += ("--tokens", "--root-token-file", str(folder / "root-token"))
        self.ca = folder / "ca.pem"
        self.tls: evosample.Tls | bool = False
        if has_tls:
            authority = trustme.CA()
            issued = authority.issue_cert("127.0.0.1")
            authority.cert_pem.write_to_path(self.ca)
            issued.private_key_pem.write_to_path(folder / "key.pem")
            issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
            options += ("--tls-cert", str(folder / "cert.pem"), "--tls-key", str(folder / "key.pem"))
            self.tls = evosample.Tls(ca=self.ca)
        super().__init__(folder / "data", *options)

    def connect(self, token: str = "") -> evosample.Client:
        return evosample.connect(self.address, token=token, tls=self.tls)

    @contextmanager
    def channel(self) -> Iterator[grpc.Channel]:
        if isinstance(self.tls, evosample.Tls):
            channel = grpc.secure_channel(self.address, self.tls.channel_credentials())
        else:
            channel = grpc.insecure_channel(self.address)
        with channel:
            yield channel

    def new_token(self, role: evosample.wire.Role, project: str = "mine", **options: Any) -> str:
        with self.connect(ROOT_TOKEN) as root:
            return root.create_token(role, project=project, **options)[1]

    def revoke(self, token: str, project: str = "mine") -> None:
        with self.connect(ROOT_TOKEN) as root:
            root.revoke_token(token.split("_")[1], project=project)


def log_lines(server: ServerProcess) -> list[dict[str, Any]]:
    """What a server has written that logs in JSON."""
    complete, _, _ = server.log.rpartition("\n")
    return [json.loads(line) for line in complete.splitlines()]


def metrics_address(server: ServerProcess) -> str:
    """Where a server that logs in JSON serves its metrics."""
    return str(next(line["address"] for line in log_lines(server) if line["event"] == "metrics are served"))


def fixed_losses(num_samples: int, num_epochs: int) -> NDArray[np.float32]:
    """A loss for each epoch and sample, [num_epochs, num_samples]: what a model would say, but the same every time."""
    return np.random.default_rng(7).gamma(2, 1, (num_epochs, num_samples)).astype(np.float32)


def columns_of(policy: evosample.Policy, losses: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """What a policy has reported beside losses, made up from these."""
    known = {"correct": (losses < 2).astype(np.float32), "confidence": np.exp(-losses / 4)}
    return {name: known[name] for name in policy.reported_columns}


class Visit:
    """What one rank met in one step."""

    def __init__(self, rank: int, batch: evosample.Batch, chosen: evosample.MiniBatch, losses: NDArray[Any]) -> None:
        self.rank, self.epoch, self.step = rank, batch.epoch, batch.step
        self.sample_ids = batch.sample_ids.copy()
        self.positions = chosen.positions
        self.importance_weights = chosen.importance_weights
        self.losses = losses

    def key(self) -> tuple[Any, ...]:
        """For comparing runs bit by bit."""
        chosen = (self.positions.tolist(), self.importance_weights.tobytes())
        return (self.epoch, self.step, self.rank, self.sample_ids.tolist(), *chosen)


def train(
    experiment: evosample.Experiment,
    losses: NDArray[np.float32],
    *,
    before_step: Callable[[evosample.Batch], None] = lambda _: None,
    **run: Any,
) -> list[Visit]:
    """Go through all that is left of an experiment as one rank, with the losses of `fixed_losses`."""
    visits = []
    with_rank = run.get("rank", 0)
    for epoch in experiment.epochs(**run):
        for batch in epoch:
            before_step(batch)
            batch_losses = losses[batch.epoch, batch.sample_ids]
            chosen = batch.select(batch_losses, **columns_of(experiment.spec.policy, batch_losses))
            visits.append(Visit(with_rank, batch, chosen, batch_losses))
    return visits


def process(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of the command `evosample` as a process."""
    command = [sys.executable, "-c", "from evosample.cli import main; main()", *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr
