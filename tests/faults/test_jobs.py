"""Training jobs that are killed, resumed and doubled."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import evosample
from faults.harness import SETTINGS, Outcome, exported
from support import ServerProcess

TESTS = Path(__file__).parents[1]


def run_until_killed(
    server: ServerProcess, name: str, folder: Path, world_size: int, run_id: str, num_steps: int
) -> bool:
    """Start the job and kill it after about so many steps; returns whether it got to its end before."""
    command = [sys.executable, "-m", "faults.trainer", server.address, name, str(folder), str(world_size), run_id]
    visits = folder / "visits"
    visits.touch()
    num_lines = visits.read_text().count("\n") + num_steps * world_size
    job = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(TESTS)})
    while job.poll() is None and visits.read_text().count("\n") < num_lines:
        time.sleep(0.005)
    if job.poll() is None:
        job.kill()
        job.wait()
        return False
    assert job.returncode == 0
    return True


@pytest.mark.parametrize("world_sizes", [[1], [2], [2, 1, 5]], ids=str)
def test_a_job_killed_and_resumed_goes_on_as_if_nothing_had_happened(
    undisturbed: Callable[..., Outcome], server: ServerProcess, name: str, tmp_path: Path, world_sizes: list[int]
) -> None:
    rng = random.Random(len(world_sizes))
    for start in range(100):
        world_size = world_sizes[start % len(world_sizes)]
        if run_until_killed(server, name, tmp_path, world_size, f"start-{start}", rng.randint(20, 120)):
            break
    assert start >= 3, "too few kills"
    lines = (tmp_path / "visits").read_text().splitlines()
    visits = [json.loads(line) for line in lines if line.endswith("]")]  # a kill may have cut one off
    rows, choices = {}, {}
    for epoch, step, rank, sample_ids, _, _ in undisturbed(world_size=1).visits:
        assert rank == 0
        rows[epoch, step] = sample_ids
    if len(world_sizes) == 1:
        for epoch, step, rank, _, positions, _ in undisturbed(world_size=world_sizes[0]).visits:
            choices[epoch, step, rank] = positions
    seen = set()
    for ranks, epoch, step, rank, sample_ids, positions in visits:
        num_rows = len(rows[epoch, step]) // ranks
        assert sample_ids == rows[epoch, step][rank * num_rows : (rank + 1) * num_rows], "the global batch is the same"
        assert len(world_sizes) > 1 or positions == choices[epoch, step, rank]
        seen.add((epoch, step))
    assert seen == set(rows)
    with evosample.connect(server.address) as client:
        scores = exported(client.get_experiment(name))
    expected = undisturbed(world_size=world_sizes[0]).scores
    of_losses = ["scores", "sampling_weights", "num_visits", "staleness"]
    same = [*scores] if len(world_sizes) == 1 else of_losses  # choices are drawn by rank
    for column in same:
        assert scores[column] == expected[column], "losses count by sample, whoever reports them"


def test_of_two_processes_that_claim_a_rank_the_later_one_wins(server: ServerProcess, name: str) -> None:
    with evosample.connect(server.address) as here, evosample.connect(server.address) as there:
        first = here.create_experiment(name, **SETTINGS).epochs(run_id="job")
        batches = iter(next(first))
        second = there.create_experiment(name, **SETTINGS).epochs(run_id="job")
        for batch in next(second):
            batch.report([1.0] * len(batch.sample_ids))
        next(batches).report([7.0] * 40)
        with pytest.raises(evosample.SupersededError, match="another process has joined run 'job'"):
            first.flush()
        second.flush()
        assert there.get_experiment(name).export_scores().scores.max() < 1
