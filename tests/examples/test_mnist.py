from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parents[2] / "examples/mnist/demo.py"
WAYS = ["ordinary training", "random subsets", "ES with scoring", "ES"]


def test_the_demo_reports_a_row_a_run(tmp_path: Path) -> None:
    command = [sys.executable, str(DEMO), "--quick", "--report-dir", str(tmp_path / "report")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report/report.json").read_text())
    runs = report["runs"]
    assert [(run["data_set"], run["way"], run["seed"]) for run in runs] == [
        (data_set, way, 0) for data_set in ("eight domains", "long-tailed MNIST") for way in WAYS
    ]
    # 2,048 samples make 32 steps of 64; a quarter of them 8. Four ordinary epochs are 128 steps.
    for run in runs:
        if run["way"] != "ES with scoring":  # how long that trains depends on how fast the machine is
            assert (run["num_steps"], run["samples_backpropagated"]) == (128, 128 * 64)
        assert run["train_seconds"] > 0
        assert run["way"] in done.stdout
    assert runs[0]["test_accuracy"] > 0.3  # a tenth is guessing
    assert {(each["data_set"], each["way"], each["against"]) for each in report["differences"]} >= {
        ("eight domains", "ES", "ordinary training"),
        ("long-tailed MNIST", "ES", "random subsets"),
    }
    assert "are sets where selection pays" in " ".join(done.stdout.split())
    assert (tmp_path / "report/accuracy.png").read_bytes().startswith(b"\x89PNG")
