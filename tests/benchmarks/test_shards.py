from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks/shards.py"


def test_a_pruned_epoch_reads_no_more_than_its_samples() -> None:
    done = subprocess.run([sys.executable, str(BENCHMARK), "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    shares = [line.split()[-4] for line in done.stdout.splitlines() if "bytes of all samples" in line]
    assert len(shares) == 2  # of files, and by HTTP
    assert all(0.6 < float(share) <= 0.7 for share in shares)  # 2,048 of 3,000 samples
