from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import evosample
from support import ServerProcess

os.environ["HF_HUB_OFFLINE"] = "1"  # tests download nothing


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that tests share: they create experiments under names of their own, and never stop it."""
    process = ServerProcess(tmp_path_factory.mktemp("server") / "data")
    yield process
    process.stop()


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers of a test's own, each on a data directory of its own."""
    started: list[ServerProcess] = []

    def start(*options: str, python_path: Path | None = None) -> ServerProcess:
        started.append(ServerProcess(tmp_path / f"data{len(started)}", *options, python_path=python_path))
        return started[-1]

    yield start
    for process in started:
        process.stop()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[evosample.Client]:
    with evosample.connect(server.address) as connected:
        yield connected


_names = itertools.count()


@pytest.fixture
def name() -> str:
    """A name that no other test of this process uses."""
    return f"experiment-{next(_names)}"
