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
from evosample.v1 import selection_pb2, selection_pb2_grpc
from evosample_server import service, status

ROOT = Path(__file__).parents[1]

# What each module may import of the project; everything below it in the picture, nothing beside or above.
SAMPLING = ["evosample.sampling"]
SERVER_MAY_USE = [*SAMPLING, "evosample.v1", "evosample.wire", "evosample.errors"]
FLOORS = {
    "client/evosample/sampling": SAMPLING,
    "client/evosample/errors.py": [],
    "client/evosample/wire.py": [*SAMPLING, "evosample.v1"],
    "client/evosample/rpc.py": ["evosample.errors", "evosample.private_server", "evosample.v1"],
    "client/evosample/private_server.py": ["evosample.errors"],
    "client/evosample/epoch.py": SERVER_MAY_USE,
    "client/evosample/run.py": [*SERVER_MAY_USE, "evosample.epoch", "evosample.rpc"],
    "client/evosample/client.py": [
        *SERVER_MAY_USE,
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
    "client/evosample/webdataset": [
        "evosample.epoch",
        "evosample.errors",
        "evosample.sampling",
        "evosample.webdataset",
    ],
    "server/evosample_server/keys.py": SERVER_MAY_USE,
    "server/evosample_server/store.py": [*SERVER_MAY_USE, "evosample_server.keys"],
    "server/evosample_server/planner.py": [*SERVER_MAY_USE, "evosample_server.store"],
    "server/evosample_server/experiments.py": [
        *SERVER_MAY_USE,
        "evosample_server.planner",
        "evosample_server.store",
    ],
    "server/evosample_server/connection.py": ["evosample.errors"],
    "server/evosample_server/status.py": SERVER_MAY_USE,
    "server/evosample_server/decoding.py": ["evosample.errors", "evosample_server.status"],
    "server/evosample_server/service.py": [
        *SERVER_MAY_USE,
        "evosample_server.experiments",
        "evosample_server.status",
        "evosample_server.store",
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


def test_every_rpc_is_implemented() -> None:
    for method in selection_pb2.DESCRIPTOR.services_by_name["SelectionService"].methods:
        base = getattr(selection_pb2_grpc.SelectionServiceServicer, method.name)
        assert getattr(service.SelectionService, method.name) is not base


def test_every_field_and_rpc_of_the_contract_has_a_comment() -> None:
    lines = (ROOT / "proto/evosample/v1/selection.proto").read_text().splitlines()
    for before, line in itertools.pairwise(lines):
        if line.strip().startswith("rpc "):
            assert before.strip().startswith("//"), line
