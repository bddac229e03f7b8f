from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks/accumulation.py"


def test_a_quarter_of_the_backward_passes_is_made_where_a_quarter_of_the_rows_is_chosen() -> None:
    done = subprocess.run([sys.executable, str(BENCHMARK), "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (counts,) = [line.split("│")[2:5] for line in done.stdout.splitlines() if "backward passes" in line]
    assert [float(count) for count in counts] == [32, 8, 0.25]
