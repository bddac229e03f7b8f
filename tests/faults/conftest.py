from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.harness import SETTINGS, Outcome, ReplicatedServer, run_job
from stores import StandaloneStore
from support import ServerProcess


@pytest.fixture(scope="session")
def undisturbed(server: ServerProcess) -> Callable[..., Outcome]:
    """What comes of a job that nothing happens to, worked out once for equal arguments."""
    known: dict[str, Outcome] = {}

    def find(*, world_size: int = 2, settings: dict[str, Any] = SETTINGS) -> Outcome:
        key = f"{world_size} {settings}"
        if key not in known:
            known[key] = run_job(server.address, f"undisturbed-{len(known)}", world_size=world_size, settings=settings)
        return known[key]

    return find


@pytest.fixture
def store(tmp_path: Path) -> Iterator[StandaloneStore]:
    """A stand-alone Valkey with its append-only file."""
    process = StandaloneStore(tmp_path / "store")
    yield process
    process.close()


@pytest.fixture
def start_replica(store: StandaloneStore, tmp_path: Path) -> Iterator[Callable[..., ReplicatedServer]]:
    """Starts servers on the store."""
    started: list[ReplicatedServer] = []

    def start(*options: str, redis_url: str | None = None) -> ReplicatedServer:
        started.append(ReplicatedServer(tmp_path / f"replica{len(started)}", redis_url or store.url, *options))
        return started[-1]

    yield start
    for server in started:
        server.resume()
        server.stop()
