"""Outages as a training job sees them: in mid-epoch they cost nothing, and at an epoch's end what it was told."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import evosample
from faults.harness import SETTINGS, Outcome, run_job
from support import ServerProcess, fixed_losses

OUTAGE_S = 30.0


def test_an_outage_of_half_a_minute_in_mid_epoch_blocks_no_step(
    undisturbed: Callable[..., Outcome], start_server: Callable[..., ServerProcess]
) -> None:
    server = start_server()
    outage = {"began_s": 0.0, "steps": 0}

    def step(batch: evosample.Batch) -> None:
        if (batch.epoch, batch.step) == (2, 4):
            time.sleep(0.5)  # the epoch's ids are here by now
            server.kill()
            outage["began_s"] = time.monotonic()
        if server.process.returncode is None:
            return
        outage["steps"] += 1
        time.sleep(OUTAGE_S / 34)
        if batch.step == 39:  # only now is a server there again: a step that waited for one would have waited for ever
            assert time.monotonic() - outage["began_s"] > OUTAGE_S
            threading.Thread(target=server.restart).start()

    assert run_job(server.address, "job", world_size=1, before_step=step) == undisturbed(world_size=1)
    assert outage["steps"] == 36, "every step that was left of the epoch"


def test_waiting_for_a_server_ends_with_an_error_that_says_so(
    start_server: Callable[..., ServerProcess], caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server()
    with evosample.connect(server.address, outage_timeout_s=4) as client:
        run = client.create_experiment("e", **SETTINGS).epochs()
        batches = iter(next(run))
        for _ in range(10):
            next(batches).report([1.0] * 40)
        server.kill()
        with caplog.at_level(logging.WARNING, "evosample"):
            for batch in batches:
                batch.report([1.0] * 40)
            with pytest.raises(evosample.UnavailableError, match=rf"no answer .* {server.address} within 4 s"):
                next(run)
        assert f"no server at {server.address} has answered" in caplog.text
        assert run.position == (1, 0)
        server.restart()
        assert next(run).number == 1, "the run itself goes on: only the wait was over"
        run.flush()


@pytest.mark.parametrize("world_size", [1, 2])
def test_with_uniform_draws_a_job_outlives_any_outage_and_joins_again(
    start_server: Callable[..., ServerProcess], world_size: int
) -> None:
    server = start_server()
    losses = fixed_losses(SETTINGS["num_samples"], SETTINGS["num_epochs"])
    seen: dict[tuple[int, int], list[Any]] = {}
    at_step = threading.Barrier(world_size)

    def run_rank(rank: int) -> None:
        with evosample.connect(server.address, outage_timeout_s=2, connect_timeout_s=30) as client:
            experiment = client.create_experiment("e", **SETTINGS)
            run = experiment.epochs(rank=rank, world_size=world_size, run_id="job", on_unavailable="uniform")
            for epoch in run:
                for batch in epoch:
                    if rank == 0 and (batch.epoch, batch.step) == (1, 20):
                        server.kill()
                    if at_step.wait(60) == 0 and (batch.epoch, batch.step) == (3, 10):
                        server.restart()
                    at_step.wait(60)
                    chosen = batch.select(losses[batch.epoch, batch.sample_ids])
                    rows = (batch.selects, batch.sample_ids.tolist(), len(chosen.positions))
                    seen.setdefault((batch.epoch, batch.step), []).append(rows)
                    if (batch.epoch, batch.step) == (3, 39):
                        wait_for_epoch(client, 4)

    def wait_for_epoch(client: evosample.Client, epoch: int) -> None:
        deadline_s = time.monotonic() + 30
        while client.get_experiment("e").status().epoch < epoch:
            assert time.monotonic() < deadline_s
            time.sleep(0.1)

    ranks = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(world_size)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    for epoch, (selects, rows_a_step) in enumerate([(False, 40), (True, 40), (False, 10), (False, 10), (True, 40)]):
        steps = [parts for (e, _), parts in seen.items() if e == epoch]
        assert len(steps) == (50 if epoch == 0 else 40)
        assert {is_selecting for parts in steps for is_selecting, _, _ in parts} == {selects}, epoch
        ids = [sample for parts in steps for _, part, _ in parts for sample in part]
        assert len(ids) == len(set(ids)) == rows_a_step * len(steps)
    with evosample.connect(server.address) as client:
        status = client.get_experiment("e").status()
    assert status.state == "finished"
    assert status.visited_rows == 40 * (50 + 40 + 40 + 50), "nothing of the epochs with a server is lost"
    assert status.unreported_rows == 40 * (40 + 40)
