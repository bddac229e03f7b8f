from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def output_of(*command: str | Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("example", ["numpy", "jax"])
def test_without_a_framework_of_its_own_the_core_client_is_enough(example: str) -> None:
    said = output_of(EXAMPLES / example / "train.py", "--samples=5000", "--epochs=8")
    found = re.search(r"test accuracy (\S+)%, back-propagated (\S+)%", said)
    assert found, said
    accuracy, share = map(float, found.groups())
    assert accuracy > 80  # half is guessing
    assert share < 50


def test_two_processes_train_on_their_parts_of_one_experiment() -> None:
    torchrun = (
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    )
    said = output_of(*torchrun, EXAMPLES / "ddp/train.py", "--samples=5000", "--epochs=8")
    found = re.search(r"test accuracy (\S+)% with 2 processes", said)
    assert found, said
    assert float(found[1]) > 80
