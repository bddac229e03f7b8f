from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks/memory.py"


def test_the_store_takes_what_the_manual_reckons_with() -> None:
    done = subprocess.run([sys.executable, BENCHMARK, "--num-samples", "1000000"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [
        (float(taken), float(reckoned)) for taken, reckoned in re.findall(r" ([\d.]+) +reckoned (\d+)", done.stdout)
    ]
    assert [reckoned for _, reckoned in found] == [22, 26, 44, 44, 66]
    for taken, reckoned in found[:-1]:
        assert reckoned <= taken < 1.1 * reckoned
    assert found[-1][1] <= found[-1][0] < found[-1][1] + 20  # and messages on their way
