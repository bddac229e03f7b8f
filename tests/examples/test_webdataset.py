from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from mnist_shards import write_shards

TRAIN = Path(__file__).parents[2] / "examples/webdataset/train.py"


def losses_printed(*arguments: str) -> list[float]:
    done = subprocess.run([sys.executable, str(TRAIN), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [float(loss) for loss in re.findall(r"mean training loss ([\d.]+)", done.stdout)]


def test_the_example_learns_from_shards_that_it_writes() -> None:
    first, *_, last = losses_printed("--num-samples", "2000", "--num-epochs", "16")
    assert last < first / 2


def test_the_example_takes_shards_of_yours(tmp_path: Path) -> None:
    write_shards(tmp_path, 300, samples_per_shard=100)
    assert len(losses_printed(f"{tmp_path}/mnist-{{000..002}}.tar", "--num-epochs", "3")) == 3
    assert len(list(tmp_path.glob("*.idx.npy"))) == 3
