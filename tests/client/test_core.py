from __future__ import annotations

import pickle
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import evosample
from evosample import cli
from support import ServerProcess, fixed_losses, train

SETTINGS: dict[str, Any] = {"num_samples": 500, "num_epochs": 3, "meta_batch_size": 32, "mini_batch_size": 8}


def test_a_run_goes_through_every_step_of_every_epoch(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    visits = train(experiment, fixed_losses(500, 3))
    assert [(visit.epoch, visit.step) for visit in visits] == [(e, s) for e in range(3) for s in range(15)]
    assert experiment.status().state == "finished"


def test_steps_and_progress_can_be_asked_for(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS, policy=evosample.EvolvedSampling(prune_ratio=0.5))
    assert [experiment.num_steps(epoch) for epoch in range(3)] == [15, 7, 15]
    assert experiment.total_steps == 37
    progress = []
    train(experiment, fixed_losses(500, 3), before_step=lambda batch: progress.append(batch.progress))
    np.testing.assert_allclose(progress, np.arange(37) / 37)


def test_a_batch_says_what_to_load_and_whether_it_selects(client: evosample.Client, name: str) -> None:
    for epoch in client.create_experiment(name, **SETTINGS).epochs():
        for batch in epoch:
            assert batch.sample_ids.dtype == np.int64
            assert batch.sample_ids.shape == (32,)
            assert batch.selects == (batch.epoch == 1)
            chosen = batch.select(np.ones(32))
            assert chosen.positions.dtype == np.int64
            assert chosen.importance_weights.dtype == np.float32
            assert len(chosen.positions) == len(chosen.importance_weights) == (8 if batch.selects else 32)
            assert (np.diff(chosen.positions) > 0).all()


def test_a_step_without_losses_is_an_error_at_the_next_step(client: evosample.Client, name: str) -> None:
    run = client.create_experiment(name, **SETTINGS).epochs()
    epoch = next(run)
    batches = iter(epoch)
    first = next(batches)
    with pytest.raises(evosample.UsageError, match="losses of step 0 of epoch 0 were not handed over"):
        next(batches)
    first.select(np.ones(32))
    assert next(iter(epoch)).step == 1
    with pytest.raises(evosample.UsageError, match="15 steps, but only the losses of 1"):
        next(run)


def test_batches_taken_ahead_are_consumed_when_their_losses_come(client: evosample.Client, name: str) -> None:
    run = client.create_experiment(name, **SETTINGS).epochs(read_ahead=2)
    batches = iter(next(run))
    first, second, _ = (next(batches) for _ in range(3))
    assert run.position == (0, 0)
    with pytest.raises(evosample.UsageError, match="step 0"):
        next(batches)
    with pytest.raises(evosample.UsageError, match="come before those of step 1"):
        second.report(np.ones(32))
    first.report(np.ones(32))
    with pytest.raises(evosample.UsageError, match="handed over already"):
        first.report(np.ones(32))
    second.report(np.ones(32))
    assert run.position == (0, 2)


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (1.0, r"shape \(\), expected \(32,\)"),
        (np.ones(31), r"shape \(31,\), expected \(32,\)"),
        (np.ones((32, 1)), r"shape \(32, 1\), expected \(32,\)"),
        (["a"] * 32, "expected 32 numbers"),
        (np.full(32, -1.0), "expected losses >= 0"),
    ],
)
def test_losses_that_do_not_fit_are_refused_and_the_right_ones_may_follow(
    client: evosample.Client, name: str, losses: Any, said: str
) -> None:
    batch = next(iter(next(client.create_experiment(name, **SETTINGS).epochs())))
    with pytest.raises(evosample.InvalidArgumentError, match=said):
        batch.select(losses)
    batch.select(np.ones(32))


def test_mistakes_in_a_spec_are_told_before_anything_is_sent(client: evosample.Client, name: str) -> None:
    for changes, field in [({"mini_batch_size": 64}, "mini_batch_size"), ({"num_samples": 0}, "num_samples")]:
        with pytest.raises(evosample.InvalidArgumentError, match=f"{field}=") as caught:
            client.create_experiment(name, **(SETTINGS | changes))
        assert caught.value.field == field
    with pytest.raises(evosample.InvalidArgumentError, match="name='a/b'"):
        client.create_experiment("a/b", **SETTINGS)


def test_another_spec_under_a_name_is_refused(client: evosample.Client, name: str) -> None:
    assert client.create_experiment(name, **SETTINGS).uid == client.create_experiment(name, **SETTINGS).uid
    with pytest.raises(evosample.AlreadyExistsError, match="seed is 0, not 1"):
        client.create_experiment(name, **SETTINGS, seed=1)


def test_a_finished_experiment_says_so_to_a_new_run(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    train(experiment, fixed_losses(500, 3))
    with pytest.raises(evosample.FailedPreconditionError, match="has finished all of its 3 epochs"):
        experiment.epochs()
    assert list(experiment.epochs(position=(3, 0))) == []


def test_several_ranks_need_a_run_id(client: evosample.Client, name: str) -> None:
    with pytest.raises(evosample.InvalidArgumentError, match="pass the same run_id on all ranks"):
        client.create_experiment(name, **SETTINGS).epochs(rank=0, world_size=2)
    of_numpy: Any = np.int64(2)
    with pytest.raises(evosample.InvalidArgumentError, match="pass the same run_id on all ranks"):
        client.get_experiment(name).epochs(rank=0, world_size=of_numpy)
    with pytest.raises(evosample.InvalidArgumentError, match="world_size=0: expected an integer from 1"):
        client.get_experiment(name).epochs(world_size=0)


def test_a_missing_rank_is_named_when_the_wait_ends(client: evosample.Client, name: str) -> None:
    run = client.create_experiment(name, **SETTINGS).epochs(world_size=2, run_id="run", wait_timeout_s=3)
    for batch in next(run):
        batch.report(np.ones(16))
    with pytest.raises(evosample.WaitTimeoutError, match=r"waited 3 s for the ranks \[1\]"):
        next(run)


def test_a_newer_run_takes_over_and_the_older_one_is_told(
    server: ServerProcess, client: evosample.Client, name: str
) -> None:
    old = client.create_experiment(name, **SETTINGS).epochs()
    batch = next(iter(next(old)))
    with evosample.connect(server.address) as other_client:
        new = other_client.get_experiment(name).epochs()
        batch.report(np.ones(32))
        with pytest.raises(evosample.SupersededError, match="another job has joined"):
            old.flush()
        for epoch in new:
            for batch in epoch:
                batch.report(np.ones(32))
    assert client.get_experiment(name).status().state == "finished"


def test_a_newer_run_of_the_same_client_loses_nothing_of_the_older_one(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    old = experiment.epochs()
    batches = iter(next(old))
    for _ in range(5):
        next(batches).report(np.ones(32))
    left_over = next(batches)
    for epoch in client.get_experiment(name).epochs(position=old.position):
        for batch in epoch:
            batch.report(np.ones(32))
    with pytest.raises(evosample.UsageError, match="a newer run as the same rank"):
        left_over.report(np.ones(32))
    assert experiment.status().unreported_rows == 0


def test_a_closed_client_says_so_at_once(server: ServerProcess, name: str) -> None:
    with evosample.connect(server.address) as client:
        experiment = client.create_experiment(name, **SETTINGS)
    for call in (experiment.export_scores, experiment.status, experiment.epochs):
        with pytest.raises(evosample.UsageError, match="this client is closed"):
            call()


def test_a_private_server_that_was_killed_is_started_again_and_nothing_is_lost(name: str) -> None:
    with evosample.connect() as client:
        experiment = client.create_experiment(name, **SETTINGS)
        server = client._connection.server
        assert server is not None

        def kill(batch: evosample.Batch) -> None:
            if (batch.epoch, batch.step) in {(0, 7), (1, 3)}:
                server._processes[-1].kill()

        visits = train(experiment, fixed_losses(500, 3), before_step=kill)
        assert experiment.status().visited_rows == sum(len(visit.sample_ids) for visit in visits)
    assert not server.is_running


def test_a_private_server_that_cannot_be_started_again_is_named(name: str, tmp_path: Path) -> None:
    with evosample.connect(data_dir=tmp_path / "data") as client:
        client.create_experiment(name, **SETTINGS)
        server = client._connection.server
        assert server is not None
        for file in (tmp_path / "data" / "appendonlydir").glob("*.manifest"):
            file.write_text("nonsense")
        server._processes[-1].kill()
        with pytest.raises(evosample.UnavailableError, match=r"the private server could not start: .*valkey\.log"):
            client.get_experiment(name)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), None, "5"])
def test_a_time_that_nobody_can_wait_is_refused(client: evosample.Client, name: str, seconds: Any) -> None:
    for field in ("connect_timeout_s", "outage_timeout_s"):
        with pytest.raises(evosample.InvalidArgumentError, match=f"{field}="):
            evosample.connect("127.0.0.1:1", **{field: seconds})
    with pytest.raises(evosample.InvalidArgumentError, match="wait_timeout_s="):
        client.create_experiment(name, **SETTINGS).epochs(wait_timeout_s=seconds)


@pytest.mark.parametrize(
    "address", ["", "nowhere", "host:99999", "host:x", 5, "http://host:1", "a:1 b:2", "unix:", "a:1,"]
)
def test_an_address_that_cannot_be_one_is_refused(address: Any) -> None:
    with pytest.raises(evosample.InvalidArgumentError, match="HOST:PORT"):
        evosample.connect(address)


def test_a_server_that_is_not_there_is_named() -> None:
    with (
        evosample.connect("127.0.0.1:1", connect_timeout_s=0.3) as client,
        pytest.raises(evosample.UnavailableError, match=r"at 127\.0\.0\.1:1 within 0\.3 s.*evosample-server"),
    ):
        client.get_experiment("any")


def test_a_server_is_waited_for_as_long_as_was_said() -> None:
    for _ in range(4):  # pauses between attempts are drawn at random
        began_s = time.monotonic()
        with evosample.connect("127.0.0.1:1", connect_timeout_s=0.5) as client:
            with pytest.raises(evosample.UnavailableError):
                client.get_experiment("any")
            assert time.monotonic() - began_s >= 0.5


def test_training_goes_on_through_an_outage_and_nothing_is_lost(start_server: Any, name: str) -> None:
    server: ServerProcess = start_server()
    losses = fixed_losses(500, 3)
    with evosample.connect(server.address) as client:
        experiment = client.create_experiment(name, **SETTINGS)
        steps_during_outage = 0

        def stop_and_start_later(batch: evosample.Batch) -> None:
            nonlocal steps_during_outage
            if (batch.epoch, batch.step) == (1, 3):
                time.sleep(0.5)  # the epoch's ids are here by now
                server.kill()
                threading.Timer(1.5, server.restart).start()
            steps_during_outage += server.process.poll() is not None

        visits = train(experiment, losses, before_step=stop_and_start_later)
        assert steps_during_outage == 12, "the epoch went on to its end"
        assert experiment.status().visited_rows == sum(len(visit.sample_ids) for visit in visits)


def test_a_pickled_client_opens_a_connection_of_its_own(client: evosample.Client, name: str) -> None:
    client.create_experiment(name, **SETTINGS)
    with pickle.loads(pickle.dumps(client)) as copy:
        assert copy.address == client.address
        assert copy.get_experiment(name).spec.num_samples == 500


def test_the_private_server_of_three_changed_lines(name: str) -> None:
    with evosample.connect() as client:
        folder = Path(client.address.removeprefix("unix:")).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        train(client.create_experiment(name, **SETTINGS), fixed_losses(500, 3))
    assert not folder.exists()


def test_a_data_dir_is_for_private_servers_only() -> None:
    with pytest.raises(evosample.InvalidArgumentError, match="only a private server takes it"):
        evosample.connect("127.0.0.1:1", data_dir="scores")


def test_the_command_line_lists_shows_exports_and_deletes(
    server: ServerProcess, client: evosample.Client, name: str, tmp_path: Path
) -> None:
    experiment = client.create_experiment(name, **SETTINGS, project="cli")
    train(experiment, fixed_losses(500, 3))

    def run(*arguments: str, **options: Any) -> str:
        environment = {"EVOSAMPLE_ADDRESS": server.address, "EVOSAMPLE_PROJECT": "cli", "COLUMNS": "200"}
        result = CliRunner().invoke(cli.app, list(arguments), env=environment, **options)
        assert result.exit_code == 0, result.output
        return result.output

    assert name in run("list")
    assert "3 of 3" in run("show", name)
    run("export", name, str(tmp_path / "scores.npz"))
    with np.load(tmp_path / "scores.npz") as exported:
        np.testing.assert_array_equal(exported["scores"], experiment.export_scores().scores)
    run("delete", name, input="y\n")
    assert name not in run("list")
