"""What must stay complete and in its place as the code grows."""

from __future__ import annotations

import ast
import inspect
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import grpc
import pytest

import evosample
from evosample import errors, rpc, sampling, webdataset
from evosample.v1 import administration_pb2, selection_pb2
from evosample_server import access, administration, service, status

ROOT = Path(__file__).parents[1]

# What each module may import of the project; everything below it in the picture, nothing beside or above.
SAMPLING = ["evosample.sampling"]
SERVER_MAY_USE = [*SAMPLING, "evosample.v1", "evosample.wire", "evosample.rows", "evosample.errors"]
FLOORS = {
    "client/evosample/sampling": SAMPLING,
    "client/evosample/errors.py": [],
    "client/evosample/wire.py": [*SAMPLING, "evosample.v1"],
    "client/evosample/rows.py": ["evosample.v1"],
    "client/evosample/figures.py": [*SAMPLING, "evosample.wire"],
    "client/evosample/credentials.py": ["evosample.errors"],
    "client/evosample/diagnosis.py": ["evosample.credentials"],
    "client/evosample/rpc.py": [
        "evosample.credentials",
        "evosample.diagnosis",
        "evosample.errors",
        "evosample.private_server",
        "evosample.rows",
        "evosample.v1",
        "evosample.wire",
    ],
    "client/evosample/private_server.py": ["evosample.errors"],
    "client/evosample/epoch.py": SERVER_MAY_USE,
    "client/evosample/run.py": [*SERVER_MAY_USE, "evosample.epoch", "evosample.rpc"],
    "client/evosample/client.py": [
        *SERVER_MAY_USE,
        "evosample.credentials",
        "evosample.epoch",
        "evosample.private_server",
        "evosample.rpc",
        "evosample.run",
    ],
    "client/evosample/torch": [
        "evosample.client",
        "evosample.epoch",
        "evosample.errors",
        "evosample.run",
        "evosample.sampling",
        "evosample.torch",
        "evosample.wire",
    ],
    "client/evosample/lightning.py": ["evosample.client", "evosample.errors", "evosample.torch"],
    "client/evosample/webdataset": [
        "evosample.epoch",
        "evosample.errors",
        "evosample.sampling",
        "evosample.webdataset",
    ],
    "client/evosample/huggingface": [
        "evosample.client",
        "evosample.epoch",
        "evosample.errors",
        "evosample.huggingface",
        "evosample.torch",
    ],
    "server/evosample_server/keys.py": SERVER_MAY_USE,
    "server/evosample_server/metrics.py": ["evosample.errors", "evosample.wire"],
    "server/evosample_server/tracing.py": ["evosample.errors"],
    "server/evosample_server/logs.py": [],
    "server/evosample_server/store.py": [
        *SERVER_MAY_USE,
        "evosample_server.keys",
        "evosample_server.metrics",
        "evosample_server.tasks",
    ],
    "server/evosample_server/planner.py": [
        *SERVER_MAY_USE,
        "evosample_server.metrics",
        "evosample_server.store",
        "evosample_server.tasks",
    ],
    "server/evosample_server/experiments.py": [
        *SERVER_MAY_USE,
        "evosample_server.keys",
        "evosample_server.metrics",
        "evosample_server.planner",
        "evosample_server.store",
        "evosample_server.tasks",
    ],
    "server/evosample_server/connection.py": ["evosample.errors"],
    "server/evosample_server/status.py": SERVER_MAY_USE,
    "server/evosample_server/tls.py": ["evosample.errors"],
    "server/evosample_server/tokens.py": [*SERVER_MAY_USE, "evosample_server.keys", "evosample_server.store"],
    "server/evosample_server/access.py": [*SERVER_MAY_USE, "evosample_server.tokens"],
    "server/evosample_server/interceptor.py": [
        "evosample.errors",
        "evosample_server.access",
        "evosample_server.status",
    ],
    "server/evosample_server/observing.py": ["evosample_server.metrics", "evosample_server.status"],
    "server/evosample_server/probe.py": [],
    "server/evosample_server/dashboard": [
        "evosample.errors",
        "evosample.figures",
        "evosample.sampling",
        "evosample.wire",
        "evosample_server.dashboard",
        "evosample_server.experiments",
        "evosample_server.status",
    ],
    "server/evosample_server/service.py": [
        *SERVER_MAY_USE,
        "evosample_server.access",
        "evosample_server.experiments",
        "evosample_server.store",
        "evosample_server.tasks",
    ],
    "server/evosample_server/administration.py": [
        *SERVER_MAY_USE,
        "evosample_server.access",
        "evosample_server.store",
        "evosample_server.tokens",
    ],
}


def imported(path: Path) -> set[str]:
    """The project's modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            is_package = node.module in ("evosample", "evosample_server")
            found |= {f"{node.module}.{alias.name}" if is_package else node.module for alias in node.names}
    return {module for module in found if module.partition(".")[0] in ("evosample", "evosample_server")}


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_point_down(floor: str) -> None:
    path = ROOT / floor
    for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
        for module in imported(file):
            assert any(module == allowed or module.startswith(f"{allowed}.") for allowed in FLOORS[floor]), (
                f"{file.relative_to(ROOT)} imports {module}"
            )


def test_the_client_never_imports_the_server() -> None:
    for file in (ROOT / "client").rglob("*.py"):
        assert not any(module.startswith("evosample_server") for module in imported(file)), file


def test_importing_the_client_imports_little() -> None:
    script = "import sys, evosample; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert {"numpy", "grpc", "google"} <= set(loaded)
    assert not {"torch", "redis", "typer", "rich", "pydantic", "evosample_server"} & set(loaded)


def test_a_server_without_a_dashboard_does_without_its_libraries() -> None:
    script = "import sys, evosample_server.app; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"nicegui", "fastapi", "uvicorn"} & set(loaded)


@pytest.mark.parametrize("module", [evosample, sampling, webdataset])
def test_all_is_exact(module: object) -> None:
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }
    assert public == set(module.__all__)  # type: ignore[attr-defined]


def leaves(root: type[errors.EvosampleError]) -> list[type[errors.EvosampleError]]:
    return [leaf for child in root.__subclasses__() for leaf in (child, *leaves(child))]


def _failed(sent: grpc.Status) -> Any:
    """A failed call as gRPC would raise it for a status."""
    failed = create_autospec(grpc.Call, instance=True)
    failed.code.return_value, failed.details.return_value = sent.code, sent.details
    failed.trailing_metadata.return_value = sent.trailing_metadata
    return failed


def test_every_error_is_public_and_crosses_the_wire_as_itself() -> None:
    for leaf in leaves(errors.EvosampleError):
        assert getattr(evosample, leaf.__name__) is leaf
        assert leaf.__name__ in (errors.__doc__ or "")
        if leaf.code:
            sent = status.to_grpc(leaf("why"))

            received = rpc.from_grpc(_failed(sent))
            assert type(received) is leaf
            assert "why" in str(received)


@pytest.mark.parametrize("implementation", [service.SelectionService, administration.AdministrationService])
def test_every_rpc_is_implemented(implementation: type) -> None:
    (base,) = implementation.__bases__
    for method in [name for name in vars(base) if not name.startswith("_")]:
        assert getattr(implementation, method) is not getattr(base, method)


def test_every_rpc_needs_a_role() -> None:
    files = (selection_pb2.DESCRIPTOR, administration_pb2.DESCRIPTOR)
    services = [found for file in files for found in file.services_by_name.values()]
    methods = {f"/{found.full_name}/{method.name}" for found in services for method in found.methods}
    assert methods | {access.DASHBOARD} == set(access.ROLE_NEEDED)


@pytest.mark.parametrize("file", sorted((ROOT / "proto").rglob("*.proto")), ids=lambda file: file.name)
def test_every_rpc_of_the_contract_has_a_comment(file: Path) -> None:
    for before, line in itertools.pairwise(file.read_text().splitlines()):
        if line.strip().startswith("rpc "):
            assert before.strip().startswith("//"), line
