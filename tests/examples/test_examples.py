from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import ServerProcess

EXAMPLES = Path(__file__).parents[2] / "examples"


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")


def output_of(*command: str | Path) -> str:
    environment = {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("example", ["numpy", "jax"])
def test_without_a_framework_of_its_own_the_core_client_is_enough(example: str) -> None:
    said = output_of(EXAMPLES / example / "train.py", "--samples=5000", "--epochs=32")
    # 32 epochs of 4 steps of 256
    found = re.search(r"test accuracy (\S+)%, trained on 32,768 samples: 6.55 passes over the data", said)
    assert found, said
    assert float(found[1]) > 80  # half is guessing


def test_two_processes_train_on_their_parts_of_one_experiment() -> None:
    said = output_of(*TORCHRUN, EXAMPLES / "ddp/train.py", "--samples=5000", "--epochs=32")
    found = re.search(r"test accuracy (\S+)% with 2 processes", said)
    assert found, said
    assert float(found[1]) > 80


def test_lightning_trains_on_what_is_selected() -> None:
    said = output_of(EXAMPLES / "lightning/train.py", "--samples=3000", "--epochs=16")
    found = re.search(r"test accuracy (\S+)% after 32 steps", said)  # two of 256 an epoch
    assert found, said
    assert float(found[1]) > 70  # a tenth is guessing


@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["one process", "two processes"])
def test_the_hugging_face_trainer_trains_on_what_is_selected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = output_of(*launcher, EXAMPLES / "huggingface/train_with_trainer.py", "--samples=3200", "--epochs=16")
    found = re.search(r"test accuracy (\S+)% after 96 steps", said)  # six of 128 an epoch
    assert found, said
    assert float(found[1]) > 58  # half is guessing; the standard error is 1.6


def test_two_processes_of_accelerate_train_on_their_parts_of_one_experiment() -> None:
    said = output_of(*TORCHRUN, EXAMPLES / "huggingface/train_with_accelerate.py", "--samples=3200", "--epochs=16")
    found = re.search(r"test accuracy (\S+)% with 2 processes", said)
    assert found, said
    assert float(found[1]) > 58


def test_a_job_of_accelerate_goes_on_where_it_has_stopped(tmp_path: Path) -> None:
    # 9 epochs of 4 steps: half of them ends within an epoch
    command = (EXAMPLES / "huggingface/train_with_accelerate.py", "--samples=2048", "--epochs=9")
    undisturbed = output_of(*command)
    server = ServerProcess(tmp_path / "data")
    try:
        addressed = (*command, f"--address={server.address}", f"--checkpoint={tmp_path / 'checkpoint'}")
        assert "saved at Position(epoch=4, step=2)" in output_of(*addressed)
        resumed = output_of(*addressed)
    finally:
        server.stop()
    assert "epoch 4" in resumed
    assert "epoch 3" not in resumed
    assert resumed.splitlines()[-1] == undisturbed.splitlines()[-1]  # the accuracy, of 1,000 test samples
