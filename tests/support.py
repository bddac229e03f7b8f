"""What tests share: real servers as child processes, and a training job without a model."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import evosample


class ServerProcess:
    """An `evosample-server` with an embedded store, over a real socket."""

    def __init__(self, data_dir: Path, *options: str) -> None:
        self._data_dir = data_dir
        self._options = options
        self.address = ""
        self.start("127.0.0.1:0")

    def start(self, listen: str) -> None:
        """Start on the same data directory."""
        command = [sys.executable, "-m", "evosample_server", "--listen", listen, "--data-dir", str(self._data_dir)]
        self._log = (self._data_dir.parent / f"{self._data_dir.name}.log").open("ab")
        self.process = subprocess.Popen([*command, *self._options], stdout=subprocess.PIPE, stderr=self._log)
        assert self.process.stdout is not None
        ready = self.process.stdout.readline().decode()
        assert ready.startswith("listening on "), Path(self._log.name).read_text()
        self.address = ready.removeprefix("listening on ").strip()

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


def fixed_losses(num_samples: int, num_epochs: int) -> NDArray[np.float32]:
    """A loss for each epoch and sample, [num_epochs, num_samples]: what a model would say, but the same every time."""
    return np.random.default_rng(7).gamma(2, 1, (num_epochs, num_samples)).astype(np.float32)


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
            visits.append(Visit(with_rank, batch, batch.select(batch_losses), batch_losses))
    return visits
