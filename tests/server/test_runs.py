"""Runs in all their cases: joining, going back, stragglers, pins, imported scores; and several servers on one store."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import redis
from typer.testing import CliRunner

import evosample
from evosample import cli
from evosample.v1 import selection_pb2 as pb
from evosample.v1 import selection_pb2_grpc as pb_grpc
from faults.harness import ReplicatedServer
from stores import StandaloneStore
from support import ServerProcess, fixed_losses, train

N, EPOCHS = 400, 8
SETTINGS: dict[str, Any] = {
    "num_samples": N,
    "num_epochs": EPOCHS,
    "meta_batch_size": 40,
    "mini_batch_size": 10,
    "policy": evosample.EvolvedSampling(prune_ratio=0.2),
}
LOSSES = fixed_losses(N, EPOCHS)


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[list[ReplicatedServer]]:
    """Two servers on one store."""
    store = StandaloneStore(tmp_path / "store")
    servers = [ReplicatedServer(tmp_path / f"server{number}", store.url) for number in range(2)]
    yield servers
    for server in servers:
        server.stop()
    store.close()


def go_through(epoch: evosample.Epoch, num_steps: int = 1_000) -> int:
    """Hand over the losses of the next steps; returns how many there were."""
    done = 0
    for batch in epoch:
        batch.select(LOSSES[batch.epoch, batch.sample_ids])
        done += 1
        if done == num_steps:
            break
    return done


def test_a_straggler_is_left_behind_after_its_time_and_goes_on_with_the_others(
    replicas: list[ReplicatedServer], caplog: pytest.LogCaptureFixture
) -> None:
    with evosample.connect(replicas[0].address) as here, evosample.connect(replicas[1].address) as there:
        place: dict[str, Any] = {"world_size": 2, "run_id": "job", "straggler_timeout_s": 1.5, "wait_timeout_s": 60}
        runs = [here.create_experiment("e", **SETTINGS).epochs(rank=0, **place)]
        runs.append(there.get_experiment("e").epochs(rank=1, **place))
        late = next(runs[1])
        assert go_through(late, 3) == 3
        runs[1].flush()
        go_through(next(runs[0]))
        with caplog.at_level(logging.WARNING, "evosample"):
            after = next(runs[0])  # rank 1 is not waited for
        assert after.number == 1
        assert after.skipped_ranks == (1,)
        assert "epoch 0 has ended without the ranks [1]" in caplog.text
        assert here.get_experiment("e").status().unreported_rows == 7 * 20
        with caplog.at_level(logging.WARNING, "evosample"):
            assert go_through(late, 1) == 1
            runs[1].flush()  # by now it knows
            assert go_through(late) == 0
        assert "ends for rank 1 after" in caplog.text
        for epoch in (after, next(runs[1])):
            assert epoch.number == 1
            go_through(epoch)
        for run in runs:
            last = next(run)
            assert last.number == 2
            assert last.skipped_ranks == ()
            run.close()


def test_ranks_of_a_run_must_agree_on_its_straggler_timeout(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    experiment.epochs(rank=0, world_size=2, run_id="job", straggler_timeout_s=5)
    with pytest.raises(evosample.InvalidArgumentError, match=r"straggler_timeout_ms=None.*5000"):
        experiment.epochs(rank=1, world_size=2, run_id="job")
    with pytest.raises(evosample.InvalidArgumentError, match="straggler_timeout_s=0"):
        experiment.epochs(straggler_timeout_s=0)


def test_an_administrator_ends_an_epoch_without_the_missing_ranks(
    server: ServerProcess, client: evosample.Client, name: str
) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    place: dict[str, Any] = {"world_size": 2, "run_id": "job"}
    runs = [experiment.epochs(rank=rank, **place) for rank in range(2)]
    go_through(next(runs[0]))
    runs[0].flush()
    environment = {"EVOSAMPLE_ADDRESS": server.address}
    asked = CliRunner().invoke(cli.app, ["finish-epoch", name], env=environment, input="y\n")
    assert asked.exit_code == 0, asked.output
    assert "without the ranks 1" in asked.output
    assert next(runs[0]).number == 1
    assert experiment.force_finish(0) == (), "it has ended already"
    with pytest.raises(evosample.FailedPreconditionError, match="epoch 5 is not reached yet"):
        experiment.force_finish(5)


def test_servers_learn_at_once_what_another_has_committed(replicas: list[ReplicatedServer]) -> None:
    settings = SETTINGS | {"num_epochs": 40}
    with evosample.connect(replicas[0].address) as here, evosample.connect(replicas[1].address) as there:
        place: dict[str, Any] = {"world_size": 2, "run_id": "job"}
        runs = [here.create_experiment("e", **settings).epochs(rank=0, **place)]
        runs.append(there.get_experiment("e").epochs(rank=1, **place))
        began_s = time.monotonic()

        def train_rank(run: evosample.Run) -> None:
            for epoch in run:
                for batch in epoch:
                    batch.report([1.0] * len(batch.sample_ids))

        ranks = [threading.Thread(target=train_rank, args=(run,)) for run in runs]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        # Servers look by themselves once a second: waiting for that would take half of it in each turn, on average.
        assert time.monotonic() - began_s < 0.5 * settings["num_epochs"]


def test_when_the_server_dies_that_would_have_planned_the_next_epoch_another_does_it(
    replicas: list[ReplicatedServer],
) -> None:
    with grpc.insecure_channel(replicas[0].address) as dying, grpc.insecure_channel(replicas[1].address) as living:
        there = pb_grpc.SelectionServiceStub(living)
        spec = pb.ExperimentSpec(uniform=pb.Uniform(), num_samples=2_000_000, num_epochs=2, meta_batch_size=100_000)
        ref = there.CreateExperiment(
            pb.CreateExperimentRequest(ref=pb.ExperimentRef(name="e"), spec=spec)
        ).experiment.ref
        joined = there.JoinRun(pb.JoinRunRequest(ref=ref, run_id="job", world_size=1))
        member = pb.Member(ref=ref, generation=joined.generation, claim=joined.claim)
        plan_id = next(
            r.start.plan_id for r in there.StreamEpoch(pb.StreamEpochRequest(member=member)) if r.HasField("start")
        )
        waiting = there.StreamEpoch(pb.StreamEpochRequest(member=member, epoch=1, max_steps=1), timeout=60)
        finish = pb.FinishEpochRequest(member=member, plan_id=plan_id)
        pb_grpc.SelectionServiceStub(dying).FinishEpoch(finish)
        replicas[0].kill()  # it has just begun with the turn
        assert [r.start.num_steps for r in waiting if r.HasField("start")] == [20]
        replicas[0].restart()


def test_a_pinned_epoch_can_be_gone_back_to_when_others_of_its_age_are_gone(
    client: evosample.Client, name: str
) -> None:
    expected = train(client.create_experiment(f"{name}-undisturbed", **SETTINGS), LOSSES)
    experiment = client.create_experiment(name, **SETTINGS)
    run = experiment.epochs()
    go_through(next(run))
    epoch = next(run)
    go_through(epoch, 4)
    run.flush()
    position = run.position
    assert position == (1, 4)
    experiment.pin_epoch("best", position.epoch)
    assert experiment.status().pins == {"best": 1}
    go_through(epoch)
    for _ in range(4):
        go_through(next(run))
    run.flush()
    assert set(experiment.status().retained_epochs) >= {1, 5}
    assert 2 not in experiment.status().retained_epochs
    with pytest.raises(evosample.EpochNotRetainedError, match="epoch 2 is not here"):
        experiment.pin_epoch("other", 2)
    again = train(experiment, LOSSES, position=position)
    assert [visit.key() for visit in again] == [visit.key() for visit in expected][-len(again) :]
    assert again[0].epoch == 1
    assert experiment.status().pins == {"best": 1}
    experiment.unpin_epoch("best")
    experiment.unpin_epoch("best")
    assert experiment.status().pins == {}


def test_an_experiment_takes_sixteen_pins_and_a_name_used_again_needs_no_more(
    client: evosample.Client, name: str
) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    for number in range(16):
        experiment.pin_epoch(f"pin{number}", 0)
    experiment.pin_epoch("pin3", 0)
    with pytest.raises(evosample.ResourceExhaustedError, match=r"has 16 pins.*let go of one.*pin0"):
        experiment.pin_epoch("one-more", 0)


def test_epochs_that_were_let_go_leave_nothing_behind(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server()
    store = redis.Redis(unix_socket_path=server.store_socket)
    with evosample.connect(server.address) as client:
        experiment = client.create_experiment("e", **SETTINGS)
        experiment.pin_epoch("first", 0)
        train(experiment, LOSSES)
        names = sorted(str(key).split(":")[-2] for key in store.keys("*"))
        assert names.count("score") == 3, "two are retained, one is pinned"
        experiment.unpin_epoch("first")
        experiment.epochs(position=(EPOCHS, 0)).close()
        client.delete_experiment("e")
    assert store.keys("evosample:{*") == []


def test_a_position_that_is_no_longer_retained_is_refused_or_taken_as_the_current_one(
    client: evosample.Client, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    run = experiment.epochs()
    for _ in range(4):
        go_through(next(run))
    run.flush()
    next(run)
    run.close()
    for position in [(1, 2), (7, 0)]:  # long gone, not reached yet
        with pytest.raises(evosample.EpochNotRetainedError, match=r"keeps the scores of epochs 3, 4"):
            experiment.epochs(position=position)
    with caplog.at_level(logging.WARNING, "evosample"):
        runs = [
            experiment.epochs(position=(1, 2), on_missing_epoch="current", rank=rank, world_size=2, run_id="again")
            for rank in range(2)
        ]
    assert [run.position for run in runs] == [(4, 0), (4, 0)]
    assert "goes on at epoch 4" in caplog.text
    with pytest.raises(evosample.InvalidArgumentError, match="on_missing_epoch='any'"):
        experiment.epochs(on_missing_epoch="any")  # type: ignore[arg-type]


def test_a_request_to_join_that_arrives_twice_or_late_supersedes_nobody(
    server: ServerProcess, client: evosample.Client, name: str
) -> None:
    uid = client.create_experiment(name, **SETTINGS).uid
    with grpc.insecure_channel(server.address) as channel:
        stub = pb_grpc.SelectionServiceStub(channel)

        def request(run_id: str, process_id: str) -> pb.JoinRunRequest:
            ref = pb.ExperimentRef(name=name, uid=uid)
            return pb.JoinRunRequest(ref=ref, run_id=run_id, world_size=1, process_id=process_id)

        def is_member(joined: pb.JoinRunResponse) -> bool:
            member = pb.Member(ref=request("", "").ref, generation=joined.generation, claim=joined.claim)
            return code(lambda: list(stub.StreamEpoch(pb.StreamEpochRequest(member=member, max_steps=1)))) != "ABORTED"

        def code(call: Callable[[], Any]) -> str:
            try:
                call()
            except grpc.RpcError as error:
                return str(error.code().name)
            return "OK"

        first = stub.JoinRun(request("run", "a"))
        assert stub.JoinRun(request("run", "a")) == first
        second = stub.JoinRun(request("run", "b"))
        assert not is_member(first)
        assert code(lambda: stub.JoinRun(request("run", "a"))) == "ABORTED"
        assert is_member(second)
        third = stub.JoinRun(request("another", "c"))
        assert code(lambda: stub.JoinRun(request("run", "b"))) == "ABORTED"
        assert code(lambda: stub.JoinRun(request("run", "d"))) == "ABORTED"
        assert is_member(third)


def test_ranks_that_join_at_the_same_time_all_get_in(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    rng = np.random.default_rng(0)
    with ThreadPoolExecutor(5) as pool:

        def join(rank: int, start: int, delay_s: float) -> int:
            time.sleep(delay_s)  # for one to begin the run between another's look at it and its joining
            run = experiment.epochs(rank=rank, world_size=5, run_id=f"start-{start}")
            return run.generation

        for start in range(60):
            delays = rng.uniform(0, 0.004, 5)
            assert set(pool.map(join, range(5), [start] * 5, delays)) == {start + 1}


def test_a_client_spreads_over_several_addresses_and_goes_to_another_when_one_fails(
    replicas: list[ReplicatedServer],
) -> None:
    addresses = [server.address for server in replicas]
    with evosample.connect(",".join(addresses)) as client:
        experiment = client.create_experiment("e", **SETTINGS)
        for server in replicas:
            server.kill()
            assert client.get_experiment("e").uid == experiment.uid
            server.restart()
        assert client.address == ",".join(addresses)
    used = set()
    for _ in range(40):
        with evosample.connect(addresses) as client:
            used.add(client._connection._current)
    assert used == {0, 1}, "the false-alarm rate is 2 ** -39"


def test_one_name_may_stand_for_many_servers(replicas: list[ReplicatedServer]) -> None:
    """`localhost` stands for ::1 and 127.0.0.1: nobody listens on the one, and calls go to the other."""
    port = replicas[0].address.rpartition(":")[2]
    with evosample.connect(f"localhost:{port}") as client:
        assert train(client.create_experiment("e", **SETTINGS), LOSSES)


def test_scores_go_out_and_come_in_again_bit_by_bit(client: evosample.Client, name: str, tmp_path: Path) -> None:
    first = client.create_experiment(name, **SETTINGS)
    train(first, LOSSES)
    exported = first.export_scores()
    other_spec = SETTINGS | {"meta_batch_size": 20, "mini_batch_size": 5, "num_epochs": 3, "seed": 9}
    warm = client.create_experiment(f"{name}-warm", **other_spec, initial_scores=exported)
    for ours, theirs in zip(warm.export_scores()[1:4], exported[1:4], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert next(iter(next(warm.epochs()))).selects, "selection begins at once"
    again = client.create_experiment(f"{name}-warm", **other_spec, initial_scores=exported)
    assert again.uid == warm.uid, "a script that is run again finds its experiment, which keeps its scores"


def test_the_command_line_imports_what_it_has_exported(
    server: ServerProcess, client: evosample.Client, name: str, tmp_path: Path
) -> None:
    train(first := client.create_experiment(name, **SETTINGS), LOSSES)
    second = client.create_experiment(f"{name}-2", **SETTINGS)

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(cli.app, list(arguments), env={"EVOSAMPLE_ADDRESS": server.address})

    file = str(tmp_path / "scores.npz")
    assert run("export", name, file).exit_code == 0
    assert run("import", f"{name}-2", file).exit_code == 0
    for ours, theirs in zip(second.export_scores()[1:4], first.export_scores()[1:4], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_position_whose_losses_never_arrived_is_told(
    client: evosample.Client, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    run = experiment.epochs()
    go_through(next(run), 3)
    run.flush()
    with caplog.at_level(logging.WARNING, "evosample"):
        experiment.epochs(position=(0, 5))
    assert "80 rows of epoch 0 before step 5 have no losses" in caplog.text
    assert "Call run.flush() before you save run.position" in caplog.text
    experiment.force_finish(0)
    with caplog.at_level(logging.WARNING, "evosample"):  # from an epoch of eight steps
        experiment.epochs(position=(0, 9))
    assert "240 rows of epoch 0 before step 9 have no losses" in caplog.text


def test_an_experiment_without_the_scores_that_it_is_to_start_from_takes_no_run_until_they_are_there(
    server: ServerProcess, client: evosample.Client, name: str
) -> None:
    scores = np.ones(N, np.float32)
    known = evosample.ExportedScores(0, scores, scores, np.ones(N, np.uint16))
    with pytest.raises(evosample.InvalidArgumentError, match=r"num_visits: expected numbers of shape \(400,\)"):
        client.create_experiment(name, **SETTINGS, initial_scores=known._replace(num_visits=np.ones(3, np.uint16)))
    with pytest.raises(evosample.NotFoundError):
        client.get_experiment(name)
    with pytest.raises(evosample.InvalidArgumentError, match="initial_scores=ndarray"):
        client.create_experiment(name, **SETTINGS, initial_scores=scores)  # type: ignore[arg-type]
    with grpc.insecure_channel(server.address) as channel:  # as if its creator had died before the import
        spec = pb.ExperimentSpec(num_samples=N, num_epochs=EPOCHS, meta_batch_size=40, mini_batch_size=10)
        spec.warm_start = True
        spec.evolved_sampling.prune_ratio = 0.2
        request = pb.CreateExperimentRequest(ref=pb.ExperimentRef(name=name), spec=spec)
        pb_grpc.SelectionServiceStub(channel).CreateExperiment(request)
    with pytest.raises(evosample.FailedPreconditionError, match="yet to be imported"):
        client.get_experiment(name).epochs()
    client.create_experiment(name, **SETTINGS, initial_scores=known).epochs()


def test_bad_scores_are_refused_and_change_nothing(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    before = experiment.export_scores()
    good = np.ones(N, np.float32)
    bad: list[tuple[Any, str]] = [
        (np.ones(N + 1), rf"scores: expected numbers of shape \({N},\)"),
        (np.where(np.arange(N) == 7, np.nan, good), r"scores=nan: expected finite values >= 0.*position 7"),
        (-good, "scores=-1.0: expected finite values"),
        (["a"] * N, "scores: expected numbers"),
    ]
    for visits in (-1, 0.5, 2**32):
        with pytest.raises(evosample.InvalidArgumentError, match="num_visits: expected integers from 0"):
            experiment.import_scores(good, num_visits=np.full(N, visits))
    for values, said in bad:
        with pytest.raises(evosample.InvalidArgumentError, match=said):
            experiment.import_scores(values)
    for ours, theirs in zip(experiment.export_scores(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_import_is_refused_for_another_number_of_samples_and_once_a_run_has_joined(
    server: ServerProcess, client: evosample.Client, name: str
) -> None:
    experiment = client.create_experiment(name, **SETTINGS)
    with grpc.insecure_channel(server.address) as channel:
        stub = pb_grpc.SelectionServiceStub(channel)

        def sent(num_samples: int, *parts: int) -> str:
            messages = [
                pb.ImportScoresRequest(
                    ref=pb.ExperimentRef(name=name),
                    num_samples=num_samples,
                    first_sample=sum(parts[:number]),
                    scores=np.ones(rows, "<f4").tobytes(),
                    sampling_weights=np.ones(rows, "<f4").tobytes(),
                )
                for number, rows in enumerate(parts)
            ]
            try:
                stub.ImportScores(iter(messages))
            except grpc.RpcError as error:
                return str(error.details())
            return ""

        assert "num_samples=399: expected the experiment's number of samples, 400" in sent(399, 399)
        assert "expected those of all 400" in sent(N, 100, 200)
        assert "expected at most the 100 that are left" in sent(N, 300, 200)
        assert experiment.export_scores().num_visits.max() == 0
        assert sent(N, 150, 250) == ""
        assert experiment.export_scores().num_visits.min() == 1
    experiment.epochs()
    with pytest.raises(evosample.FailedPreconditionError, match="a run has joined"):
        experiment.import_scores(np.ones(N))


def test_a_server_that_is_killed_while_scores_come_in_leaves_them_as_they_were(
    replicas: list[ReplicatedServer],
) -> None:
    n = 3_000_000
    settings: dict[str, Any] = {"num_epochs": 3, "meta_batch_size": 100, "mini_batch_size": 10}
    with evosample.connect([server.address for server in replicas]) as client:
        experiment = client.create_experiment("e", num_samples=n, **settings)
        scores = np.random.default_rng(1).random(n, np.float32)

        def kill() -> None:
            for server in replicas:
                server.kill()
                server.restart()

        killing = threading.Timer(0.1, kill)
        killing.start()
        experiment.import_scores(scores)
        killing.join()
        np.testing.assert_array_equal(experiment.export_scores().scores, scores)
