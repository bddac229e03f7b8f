"""How soon there is something: a server, an import, and what training on MNIST saves."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    """The demo: the time that scoring saves against training on all that it loads, measured and predicted."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(_DEMO), "--report-dir", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = json.loads((Path(folder) / "report.json").read_text())
    costs = {name: list(found["setup"][name].values()) for name in ("score_seconds", "train_step_seconds")}
    (score_s,), (full_s, _) = costs["score_seconds"], costs["train_step_seconds"]
    for data_set in ("eight domains", "long-tailed MNIST"):

        def of(way: str, data_set: str = data_set) -> list[dict[str, Any]]:
            return [run for run in found["runs"] if (run["data_set"], run["way"]) == (data_set, way)]

        measured, predicted = [], []
        for run, ordinary in zip(of("ES with scoring"), of("ordinary training"), strict=True):
            # What forward and backward passes leave out (loading, calls) takes a step as long as in ordinary training.
            rest_s = (ordinary["train_seconds"] - ordinary["predicted_s"]) / ordinary["num_steps"]
            whole_s = run["num_steps"] * (full_s + rest_s)
            measured.append(100 * (1 - run["train_seconds"] / whole_s))
            predicted.append(100 * (1 - (run["predicted_s"] + run["num_steps"] * rest_s) / whole_s))
        yield Row(
            f"training time saved by ES with scoring, {data_set}",
            measured,
            "%",
            compared_with="as predicted from forward and backward passes",
            compared=predicted,
            ratio_target=0.8,
            ratio_most=1.25,
            note=f"against training on all that it loads; a scoring pass takes {score_s / full_s:.2f} of a step on all",
        )
