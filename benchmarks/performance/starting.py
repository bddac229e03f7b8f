"""How soon there is something: a server, an import, and what training on MNIST saves."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from performance.ranks import serving
from performance.rows import Row, alternate

import evosample

_DEMO = Path(__file__).parents[2] / "examples/mnist/demo.py"


def starting(num_repeats: int) -> Iterator[Row]:
    """From the start of a process to its first answer, or to the end of the import."""

    def python(*arguments: str) -> float:
        began_s = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True)
        return time.perf_counter() - began_s

    def server() -> float:
        began_s = time.perf_counter()
        with serving() as started, evosample.connect(started.address) as client:
            client.list_experiments()
            return time.perf_counter() - began_s

    servers, imports, nothing = alternate(
        num_repeats, server, lambda: python("-c", "import evosample"), lambda: python("-c", "pass")
    )
    yield Row(
        "a server with its own store, from its start to its first answer", servers, "s", 1, higher_is_better=False
    )
    alone = [whole - without for whole, without in zip(imports, nothing, strict=True)]
    yield Row("import evosample", alone, "s", 0.3, higher_is_better=False)


def saving() -> Iterator[Row]:
    """The demo: training time saved, against what the costs of forward and backward passes predict."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(_DEMO), "--report-dir", folder], check=True, stdout=subprocess.DEVNULL)
        runs = json.loads((Path(folder) / "report.json").read_text())["runs"]
    for run in runs:
        if run["policy"] in ("ES", "ESWP"):
            yield Row(
                f"training time saved on MNIST: {run['policy']}",
                [100 * run["saving"]],
                "%",
                compared_with="as predicted from forward and backward passes",
                compared=[100 * run["predicted_saving"]],
                ratio_target=0.9,
                note="against uniform training",
            )
