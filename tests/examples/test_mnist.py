from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parents[2] / "examples/mnist/demo.py"


def test_the_demo_reports_its_five_runs_in_order(tmp_path: Path) -> None:
    command = [sys.executable, str(DEMO), "--quick", "--report-dir", str(tmp_path / "report")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report/report.json").read_text())
    runs = report["runs"]
    assert [run["policy"] for run in runs] == [
        "everything",
        "random-subset-same-epochs",
        "random-subset-same-time",
        "ES",
        "ESWP",
    ]
    for run in runs:
        assert set(run) == {
            "policy",
            "test_accuracy",
            "train_seconds",
            "samples_backpropagated",
            "saving",
            "predicted_saving",
        }
        assert run["policy"] in done.stdout
        assert run["train_seconds"] > 0
    assert runs[0]["test_accuracy"] > 0.5  # a tenth is guessing
    # 11 meta-batches of 256 fit into 3,000 samples, 9 into the 2,400 that ESWP keeps; the first and last epochs anneal.
    everything, same_epochs, _, es, eswp = (run["samples_backpropagated"] for run in runs)
    assert everything == 3 * 11 * 256
    assert same_epochs == 3 * 11 * 64
    assert es == 2 * 11 * 256 + 11 * 64
    assert eswp == 2 * 11 * 256 + 9 * 64
    assert (tmp_path / "report/accuracy.png").read_bytes().startswith(b"\x89PNG")
