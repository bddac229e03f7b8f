from __future__ import annotations

import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "benchmarks/readme.py"


def test_the_loops_of_the_readme_learn_mnist() -> None:
    command = [sys.executable, str(README), "--samples", "1024", "--seeds", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = (float(line.split("│")[2].split("%")[0]) for line in done.stdout.splitlines() if "% (" in line)
    assert min(before, after) > 60  # a tenth is guessing
