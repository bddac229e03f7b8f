"""Data-parallel jobs of real processes, which talk to each other by gloo and share one experiment."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import evosample
from evosample.torch import Loader
from samples import Ids
from stores import wait_until
from support import ServerProcess, fixed_losses, train

N, EPOCHS, B, MINI = 240, 4, 24, 8
STEPS = N // B
SETTINGS: dict[str, Any] = {"num_samples": N, "num_epochs": EPOCHS, "meta_batch_size": B, "mini_batch_size": MINI}
JOB = Path(__file__).parents[1] / "ddp_job.py"

Step = tuple[int, int]


class Ranks:
    """The processes of one start of a job."""

    def __init__(
        self, server: ServerProcess, experiment: str, directory: Path, world_size: int, *options: str | Path
    ) -> None:
        directory.mkdir(exist_ok=True)
        (directory / "rendezvous").unlink(missing_ok=True)
        self.directory = directory
        self.processes = []
        for rank in range(world_size):
            command: list[str | Path] = [sys.executable, JOB, server.address, experiment, directory]
            command += [f"--rank={rank}", f"--world-size={world_size}", *options]
            with (directory / f"rank-{rank}.log").open("w") as log:
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
            self.processes.append(process)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            with process:  # closes its pipes
                process.wait()

    def finish(self) -> None:
        for rank, process in enumerate(self.processes):
            process.wait(timeout=120)
            assert process.returncode == 0, self.log(rank)

    def log(self, rank: int) -> str:
        return (self.directory / f"rank-{rank}.log").read_text()

    def lines(self, rank: int) -> list[dict[str, Any]]:
        path = self.directory / f"rank-{rank}.jsonl"
        complete = path.read_text().rpartition("\n")[0] if path.exists() else ""
        return [json.loads(line) for line in complete.splitlines()]

    def steps(self, rank: int, column: str = "ids") -> dict[Step, Any]:
        """What a rank did in each step."""
        return {(line["step"][0], line["step"][1]): line[column] for line in self.lines(rank)}

    def parameters(self, rank: int) -> dict[str, Any]:
        with np.load(self.directory / f"rank-{rank}.npz") as saved:
            return dict(saved)


@pytest.fixture
def start(server: ServerProcess, client: evosample.Client, name: str, tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    """Starts jobs; of experiments that are created where they are not there yet."""
    started: list[Ranks] = []

    def start_ranks(which: str, world_size: int, *options: str | Path, **changes: Any) -> Ranks:
        client.create_experiment(f"{name}-{which}", **(SETTINGS | changes))
        directory = tmp_path / f"{which}-{len(started)}"
        started.append(Ranks(server, f"{name}-{which}", directory, world_size, *options))
        return started[-1]

    yield start_ranks
    for ranks in started:
        ranks.kill()


def global_steps(ranks: Ranks, size: int) -> dict[Step, list[int]]:
    """The ids of each step, the parts of ranks put together."""
    parts = [ranks.steps(rank) for rank in range(size)]
    return {step: [sample for part in parts for sample in part[step]] for step in parts[0]}


def planned(experiment: evosample.Experiment) -> dict[Step, list[int]]:
    """The ids of each step as one process gets them that has the same losses."""
    visits = train(experiment, np.broadcast_to(fixed_losses(N, 1)[0], (EPOCHS, N)))
    return {(visit.epoch, visit.step): visit.sample_ids.tolist() for visit in visits}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(value, other[key], err_msg=key)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_parts_of_the_ranks_are_the_global_batch_and_their_scores_those_of_one_process(
    client: evosample.Client, name: str, start: Callable[..., Ranks], world_size: int
) -> None:
    policy = evosample.EvolvedSampling(prune_ratio=0.3)
    ranks = start("job", world_size, "--micro-batch-size=2", policy=policy)
    ranks.finish()
    twin = client.create_experiment(f"{name}-twin", **SETTINGS | {"policy": policy})
    assert global_steps(ranks, world_size) == planned(twin)
    for column, expected in zip(
        client.get_experiment(f"{name}-job").export_scores()[:5], twin.export_scores()[:5], strict=True
    ):
        np.testing.assert_array_equal(column, expected)
    for rank in range(world_size):
        for key, value in ranks.parameters(rank).items():
            if "running" not in key:  # BatchNorm's are each rank's own until the next forward pass
                np.testing.assert_array_equal(value, ranks.parameters(0)[key], err_msg=key)
        # Gradients went out once a step, whatever the number of micro-batches.
        assert set(ranks.steps(rank, "num_syncs").values()) == {1}
        # Every step began with process 0's buffers, as without scoring.
        assert ranks.steps(rank, "buffer") == ranks.steps(0, "buffer")


def test_ranks_that_leave_an_epoch_together_go_on_in_it_together(
    client: evosample.Client, name: str, start: Callable[..., Ranks]
) -> None:
    ranks = start("job", 2, "--break-every=7")
    ranks.finish()
    twin = client.create_experiment(f"{name}-twin", **SETTINGS)
    assert global_steps(ranks, 2) == planned(twin)
    status = client.get_experiment(f"{name}-job").status()
    assert status.generation > 4
    assert status.unreported_rows == 0
    np.testing.assert_array_equal(
        client.get_experiment(f"{name}-job").export_scores().scores, twin.export_scores().scores
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--create", json.dumps(SETTINGS), "--own-servers"], "Use evosample.torch.connect()"),
        (
            ["--data-parallel-size=4"],
            "torch.distributed has 2 processes, which do not divide into so many equal groups",
        ),
    ],
)
def test_what_would_have_ranks_wait_for_each_other_in_vain_is_told_at_once(
    start: Callable[..., Ranks], options: list[str], said: str
) -> None:
    ranks = start("job", 2, *options)
    assert ranks.processes[1].wait(60) != 0
    assert said in ranks.log(1)


@pytest.mark.parametrize("world_size_after", [2, 1, 4])
def test_killed_ranks_resume_from_the_position_as_if_nothing_had_happened(
    client: evosample.Client, name: str, start: Callable[..., Ranks], world_size_after: int
) -> None:
    broken = start("broken", 2)
    wait_until(lambda: len(broken.lines(1)) >= STEPS + 6, "the job to get into its second epoch")
    broken.kill()
    assert len(broken.lines(1)) < EPOCHS * STEPS
    ranks = start("broken", world_size_after, "--checkpoint", broken.directory / "checkpoint")
    ranks.finish()
    twin = client.create_experiment(f"{name}-twin", **SETTINGS)
    resumed = global_steps(ranks, world_size_after)
    first = min(resumed)
    assert first > (1, 0)
    assert resumed == {step: ids for step, ids in planned(twin).items() if step >= first}
    np.testing.assert_array_equal(
        client.get_experiment(f"{name}-broken").export_scores().scores, twin.export_scores().scores
    )
    if world_size_after == 2:
        undisturbed = start("undisturbed", 2)
        undisturbed.finish()
        for rank in range(2):
            trained = undisturbed.steps(rank, "trained")
            assert ranks.steps(rank, "trained") == {step: ids for step, ids in trained.items() if step >= first}
            assert_same(ranks.parameters(rank), undisturbed.parameters(rank))


def test_a_rank_that_dies_is_reported_to_the_others_within_the_straggler_timeout(
    start: Callable[..., Ranks],
) -> None:
    """Without collectives in the steps, whose failure would end them: whoever has those hears it from them."""
    options = ("--alone", "--straggler-timeout-s=1.5", f"--pause-after={STEPS // 2}")
    ranks = start("job", 2, *options)
    for process in ranks.processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"paused\n"
    ranks.processes[1].kill()
    assert ranks.processes[0].stdin is not None
    ranks.processes[0].stdin.close()
    wait_until(lambda: "epoch 0 has ended without the ranks [1]" in ranks.log(0), "the dead rank to be reported")
    wait_until(lambda: len(ranks.lines(0)) == EPOCHS * STEPS, "the other rank to go on to the end")
    for epoch in range(EPOCHS - 1):
        assert f"epoch {epoch} has ended without the ranks [1]" in ranks.log(0)


def test_a_sharded_model_learns_as_an_unsharded_one(start: Callable[..., Ranks]) -> None:
    """FSDP2, in micro-batches: its parameters are gathered in every scoring pass, gradients scattered once a step."""
    sharded, plain = (
        start(which, 2, "--micro-batch-size=4", *options) for which, *options in (("fsdp", "--fsdp"), ("ddp",))
    )
    for ranks in (sharded, plain):
        ranks.finish()
    assert global_steps(sharded, 2) == global_steps(plain, 2)
    for key, value in sharded.parameters(0).items():
        if "running" not in key:
            np.testing.assert_allclose(value, plain.parameters(0)[key], rtol=1e-4, atol=1e-6, err_msg=key)


def test_processes_that_share_their_data_train_on_the_same_rows_and_count_once(
    client: evosample.Client, name: str, start: Callable[..., Ranks]
) -> None:
    ranks = start("job", 4, "--data-parallel-size=2")
    ranks.finish()
    for column in ("ids", "trained"):
        assert ranks.steps(0, column) == ranks.steps(2, column)
        assert ranks.steps(1, column) == ranks.steps(3, column)
    twin = client.create_experiment(f"{name}-twin", **SETTINGS)
    assert global_steps(ranks, 2) == planned(twin)
    np.testing.assert_array_equal(
        client.get_experiment(f"{name}-job").export_scores().scores, twin.export_scores().scores
    )


def test_without_an_address_all_processes_share_a_private_server(
    client: evosample.Client, name: str, start: Callable[..., Ranks]
) -> None:
    ranks = start("job", 2, "--create", json.dumps(SETTINGS))
    ranks.finish()
    assert client.get_experiment(f"{name}-job").status().generation == 0  # it was not this server's
    assert global_steps(ranks, 2) == planned(client.create_experiment(f"{name}-twin", **SETTINGS))
    (line,) = ranks.log(0).splitlines()
    assert "which saves about 17%" in line


def test_one_of_rank_and_size_alone_is_refused(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    with pytest.raises(evosample.InvalidArgumentError, match="pass both, or neither") as told:
        Loader(Ids(N), experiment, model=torch.nn.Linear(1, 1), score=lambda ids: ids, data_parallel_rank=1)
    assert told.value.field == "data_parallel_rank"


@pytest.mark.parametrize(
    ("options", "field", "said"),
    [
        ({"data_parallel_rank": 2, "data_parallel_size": 2}, "data_parallel_rank", "expected an integer from 0 to 1"),
        ({"data_parallel_rank": 0, "data_parallel_size": 5}, "world_size", "expected"),
        ({"run_options": {"rank": 1}}, "run_options", "pass data_parallel_rank"),
    ],
)
def test_a_place_that_cannot_be_is_told_before_anyone_waits(
    client: evosample.Client, name: str, options: dict[str, Any], field: str, said: str
) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    with pytest.raises(evosample.InvalidArgumentError, match=said) as told:
        Loader(Ids(N), experiment, model=torch.nn.Linear(1, 1), score=lambda ids: ids, **options)
    assert told.value.field == field
