"""What tests of the dashboard share: servers that have one, and a training job to watch."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

import evosample
from stores import StandaloneStore
from support import ROOT_TOKEN, Guarded, ServerProcess

# Without these it asks hosts of its maker's for updates and the like.
CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def dashboard_url(server: ServerProcess) -> str:
    """Where the dashboard of a server is that has just been started with --http."""
    assert server.process.stdout is not None
    return server.process.stdout.readline().decode().removeprefix("dashboard on ").strip()


class OpenDashboard:
    """A server with a dashboard that everybody may see.

    Attributes:
        url: where the dashboard is.
        client: connected to the server.
    """

    def __init__(self, data_dir: Path, address: str = "127.0.0.1:0") -> None:
        self.server = ServerProcess(data_dir, "--http", address)
        self.url = dashboard_url(self.server)
        self.client = evosample.connect(self.server.address)

    def stop(self) -> int:
        """End it with SIGTERM; returns the exit code."""
        self.client.close()
        return self.server.stop()


class GuardedDashboard:
    """A server with a dashboard that asks for tokens.

    Attributes:
        url: where the dashboard is.
        server: it.
        store: where its experiments and tokens are.
        client: connected to the server, with the root token.
        reader: a token of project "red".
    """

    def __init__(self, folder: Path) -> None:
        self.store = StandaloneStore(folder / "store")
        self.server = Guarded(folder, "--redis-url", self.store.url, "--http", "127.0.0.1:0")
        self.url = dashboard_url(self.server)
        self.client = self.server.connect(ROOT_TOKEN)
        self.reader = self.server.new_token("reader", "red")

    def stop(self) -> int:
        """End it with SIGTERM; returns the exit code."""
        self.client.close()
        code = self.server.stop()
        self.store.close()
        return code


def likely_losses(epoch: int, sample_ids: NDArray[Any], random: np.random.Generator) -> NDArray[np.float32]:
    """Losses as of a model that learns: some samples are hard for ever, and the noise is never the same."""
    spread = (sample_ids * 0.6180339887 + 0.5) % 1  # the golden ratio's multiples fill the interval evenly
    means = -np.log1p(-spread) * (0.2 + 0.8 * 0.85**epoch)
    losses: NDArray[np.float32] = (means * random.gamma(8, 1 / 8, len(sample_ids))).astype(np.float32)
    return losses


class Job:
    """Trains on an experiment, in a thread, while the `with` block runs, or until it has finished."""

    def __init__(self, experiment: evosample.Experiment, *, pause_s: float = 0.01, **run: Any) -> None:
        self._experiment = experiment
        self._run = run
        self._pause_s = pause_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._train)

    def _train(self) -> None:
        random = np.random.default_rng(0)
        for epoch in self._experiment.epochs(**self._run):
            for batch in epoch:
                if self._stopping.is_set():
                    return
                batch.select(likely_losses(batch.epoch, batch.sample_ids, random))
                time.sleep(self._pause_s)

    def wait(self) -> None:
        """Return once the experiment has finished."""
        self._thread.join()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()
