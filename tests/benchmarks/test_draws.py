from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_of_draws_tells_which_are_unbiased() -> None:
    options = ["--num-draws=1000", "--max-samples=1000", "--num-train=2000", "--num-seeds=1"]
    done = subprocess.run([sys.executable, ROOT / "benchmarks/draws.py", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^│ (\w+) +│(.+)│$", done.stdout, re.MULTILINE)
    tables = [rows[begin : begin + 4] for begin in range(0, len(rows), 4)]
    assert [[name for name, _ in table] for table in tables] == 3 * [
        ["successive", "systematic", "top_k", "with_replacement"]
    ]
    bias = {name: float(cells.split("│")[-2]) for name, cells in tables[0]}
    assert bias.pop("top_k") < -10
    assert all(abs(percent) < 5 for percent in bias.values())
    assert all(90 > float(cells.split("│")[0].split()[0]) > 20 for _, cells in tables[2])
