"""Policies on a server: all of them, and what comes with them beside the losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import redis

import evosample
from evosample.sampling import Policy
from evosample.v1 import selection_pb2 as pb
from faults.harness import EACH_POLICY, computed, exported, outcome, run_job
from halves_of_losses import Halves, Hoarder, install
from stores import wait_until
from support import ServerProcess, columns_of, fixed_losses, train

KAKURENBO = EACH_POLICY["kakurenbo"]


@pytest.mark.parametrize("policy", EACH_POLICY)
def test_ten_epochs_over_the_wire_are_those_of_the_formulas(server: ServerProcess, name: str, policy: str) -> None:
    settings = EACH_POLICY[policy] | {"num_epochs": 10}
    found = run_job(server.address, name, settings=settings)
    assert found == computed(settings, 2)
    with evosample.connect(server.address) as client:
        assert client.get_experiment(name).status().trained_rows == sum(len(visit[4]) for visit in found.visits)


def test_columns_that_the_policy_does_not_need_or_lacks_are_told_and_cost_nothing(
    client: evosample.Client, name: str
) -> None:
    experiment = client.create_experiment(name, **KAKURENBO)
    ones = [1.0] * 40

    def try_bad_columns(batch: evosample.Batch) -> None:
        if batch.step not in (0, len(epoch_of[0]) - 1):
            return
        for columns in ({}, {"correct": ones}, {"correct": ones, "confidence": ones, "other": ones}):
            with pytest.raises(evosample.InvalidArgumentError, match="needs correct, confidence besides the losses"):
                batch.select(ones, **columns)
        for columns, said in (
            ({"correct": ones, "confidence": [5.0] * 40}, "confidence=5.0: expected probabilities; no logits"),
            ({"correct": [0.5] * 40, "confidence": ones}, "correct=0.5: expected 1 where the prediction is right"),
        ):
            with pytest.raises(evosample.InvalidArgumentError, match=said):
                batch.select(ones, **columns)
        with pytest.raises(evosample.InvalidArgumentError, match="confidence have shape"):
            batch.report(ones, correct=ones, confidence=ones[1:])

    visits = []
    losses = fixed_losses(KAKURENBO["num_samples"], KAKURENBO["num_epochs"])
    epoch_of: list[evosample.Epoch] = []
    for epoch in experiment.epochs():
        epoch_of[:] = [epoch]
        for batch in epoch:
            try_bad_columns(batch)
            of_batch = losses[batch.epoch, batch.sample_ids]
            drawn = batch.select(of_batch, **columns_of(experiment.spec.policy, of_batch))
            choice = (drawn.positions.tolist(), drawn.importance_weights.tobytes())
            visits.append((batch.epoch, batch.step, 0, batch.sample_ids.tolist(), *choice))
    assert outcome(experiment, visits) == computed(KAKURENBO, 1)


@pytest.mark.parametrize("method", ["ReportLosses", "SelectMiniBatch"])
def test_bad_columns_on_the_wire_name_their_field_and_record_nothing(
    client: evosample.Client, name: str, method: str
) -> None:
    experiment = client.create_experiment(name, **KAKURENBO)
    run = experiment.epochs()
    plan_id = next(run).plan_id
    request: Any = getattr(pb, f"{method}Request")(member=run._member, plan_id=plan_id, losses=bytes(160))
    if method == "ReportLosses":
        request.num_steps = 1

    def refused(**columns: bytes) -> str:
        request.columns.clear()
        for column, values in columns.items():
            request.columns[column] = values
        with pytest.raises(evosample.InvalidArgumentError) as caught:
            experiment._connection.call(method, request)
        assert not isinstance(caught.value, evosample.InternalError)
        return caught.value.field

    good = bytes(160)
    assert refused() == "columns"
    assert refused(confidence=good) == "columns"
    assert refused(correct=good, confidence=good, other=good) == "columns"
    assert refused(correct=good, confidence=good[1:]) == "columns.confidence"
    assert refused(correct=b"", confidence=good) == "columns.correct"
    if method == "ReportLosses":
        request.chosen = bytes(6)
        assert refused(correct=good, confidence=good) == "chosen"
        request.chosen = b""
    rejoined = experiment.epochs(position=(0, 1), run_id="again")
    assert rejoined.position == (0, 1)
    joined = experiment._connection.call(
        "JoinRun", pb.JoinRunRequest(ref=experiment.ref, run_id="last", world_size=1, position=pb.Position(step=1))
    )
    assert joined.unreported_rows == 40


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the package with `Halves` is installed."""
    return install(tmp_path_factory.mktemp("site-packages"))


@pytest.fixture
def server_with_halves(package: Path, start_server: Callable[..., ServerProcess]) -> ServerProcess:
    """A server for which that package is installed."""
    return start_server(python_path=package)


@pytest.fixture
def has_halves(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is installed for this process, too."""
    monkeypatch.syspath_prepend(package)


def with_policy(policy: Policy) -> dict[str, Any]:
    return KAKURENBO | {"policy": policy, "mini_batch_size": 10}


def test_a_policy_of_another_package_works_from_end_to_end(server_with_halves: ServerProcess, has_halves: None) -> None:
    for name, policy in {"a": Halves(), "b": Halves(share=0.25, lowest=True, least=300, note="the low ones")}.items():
        settings = with_policy(policy)
        found = run_job(server_with_halves.address, name, settings=settings)
        assert found == computed(settings, 2)
        assert any(not visit[4] for visit in found.visits), "there are hidden steps"
        assert len(set(np.frombuffer(found.scores["times"], np.float32))) > 1
        with evosample.connect(server_with_halves.address) as client:
            assert client.get_experiment(name).spec.policy == policy


def test_a_policy_that_the_server_does_not_have_creates_nothing(
    client: evosample.Client, name: str, has_halves: None
) -> None:
    with pytest.raises(evosample.InvalidArgumentError) as caught:
        client.create_experiment(name, **with_policy(Halves()))
    assert caught.value.field == "policy"
    assert "Install the package with the entry point 'halves' in the group evosample.policies" in str(caught.value)
    assert name not in [found.name for found in client.list_experiments()]
    train(client.create_experiment(name, **KAKURENBO), fixed_losses(800, 6))


@dataclass(frozen=True, kw_only=True)
class Nameless(Policy):
    """One that no package names."""

    is_adaptive: ClassVar[bool] = True


def test_a_policy_that_no_package_names_here_creates_nothing(client: evosample.Client, name: str) -> None:
    with pytest.raises(evosample.InvalidArgumentError, match=r"an entry point of the group evosample\.policies"):
        client.create_experiment(name, **with_policy(Nameless()))
    assert name not in [found.name for found in client.list_experiments()]


def test_a_client_without_the_package_can_look_but_not_train(
    server_with_halves: ServerProcess, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with evosample.connect(server_with_halves.address) as client:
        with monkeypatch.context() as context:
            context.syspath_prepend(package)
            client.create_experiment("e", **with_policy(Halves(share=0.25)))
        experiment = client.get_experiment("e")
        assert [found.name for found in client.list_experiments()] == ["e"]
        assert "'halves'" in str(experiment.status().spec.policy)
        assert "0.25" in str(experiment.status().spec.policy)
        assert experiment.history() == ()
        with pytest.raises(evosample.InvalidArgumentError, match="Install the package with the entry point 'halves'"):
            experiment.epochs()


def test_a_server_that_has_lost_the_package_can_show_and_delete_but_not_plan(
    tmp_path: Path, package: Path, has_halves: None
) -> None:
    server = ServerProcess(tmp_path / "data", python_path=package)
    with evosample.connect(server.address) as client:
        experiment = client.create_experiment("e", **with_policy(Halves()))
        client.create_experiment("other", **KAKURENBO)
        for batch in next(experiment.epochs()):
            batch.report(
                np.ones(len(batch.sample_ids)), **columns_of(Halves(), np.ones(len(batch.sample_ids), np.float32))
            )
        wait_until(lambda: experiment.status().epoch == 1, "the second epoch")
    server.stop()
    server = ServerProcess(tmp_path / "data")
    with evosample.connect(server.address) as client:
        assert [found.name for found in client.list_experiments()] == ["e", "other"]
        assert client.get_experiment("e").status().spec.policy == Halves()
        with pytest.raises(evosample.InvalidArgumentError, match="Install the package with the entry point 'halves'"):
            client.create_experiment("another", **with_policy(Halves()))
        with redis.Redis(unix_socket_path=server.store_socket) as store:
            assert store.keys("*/e}*")
            client.delete_experiment("e")
            assert not store.keys("*/e}*")
    server.stop()


def test_many_columns_make_no_message_too_large(server_with_halves: ServerProcess, has_halves: None) -> None:
    with evosample.connect(server_with_halves.address) as client:
        experiment = client.create_experiment(
            "e", num_samples=100_000, num_epochs=2, meta_batch_size=10_000, policy=Hoarder()
        )
        columns = exported(experiment)
        assert columns["column7"] == np.full(100_000, 7, "<f4").tobytes()


def test_what_is_reported_beside_losses_makes_no_message_too_large(start_server: Callable[..., ServerProcess]) -> None:
    settings = KAKURENBO | {
        "num_samples": 400_000,
        "num_epochs": 2,
        "meta_batch_size": 20_000,
        "mini_batch_size": 20_000,
    }
    server = start_server("--max-message-bytes", "1200000")
    assert run_job(server.address, "e", settings=settings, world_size=1) == computed(settings, 1)


def test_a_policy_that_fails_is_blamed(server_with_halves: ServerProcess, has_halves: None) -> None:
    settings: dict[str, Any] = {"num_samples": 100, "num_epochs": 4, "meta_batch_size": 10, "mini_batch_size": 5}
    said = r"the policy Halves has failed: ZeroDivisionError\('fails at"
    with evosample.connect(server_with_halves.address) as client:
        with pytest.raises(evosample.FailedPreconditionError, match=said):
            client.create_experiment("at-once", policy=Halves(note="fails at 0.0"), **settings)
        experiment = client.create_experiment("later", policy=Halves(note="fails at 0.5"), **settings)
        with pytest.raises(evosample.FailedPreconditionError, match=said):
            train(experiment, fixed_losses(100, 4))


def test_a_setting_that_no_message_can_carry_is_refused(client: evosample.Client, has_halves: None) -> None:
    odd: list[Any] = [2**64, np.float32(1), "\ud800", None]
    for value in odd:
        with pytest.raises(evosample.InvalidArgumentError, match=r"least=.*an int of 64 bits"):
            client.create_experiment("e", **with_policy(Halves(least=value)))


def test_settings_that_a_policy_of_another_package_does_not_take_create_nothing(
    server_with_halves: ServerProcess, has_halves: None
) -> None:
    bad = [
        ("unknown", pb.Setting(flag=True)),
        ("self", pb.Setting(flag=True)),
        ("share", pb.Setting(text="much")),
        ("share", pb.Setting(number=2)),
        ("share", pb.Setting()),
        ("share", pb.Setting(flag=True)),
        ("least", pb.Setting(number=2)),
        ("lowest", pb.Setting(integer=1)),
        ("note", pb.Setting(text="wrong")),
    ]
    with evosample.connect(server_with_halves.address) as client:
        for setting, value in bad:
            spec = pb.ExperimentSpec(num_samples=80, num_epochs=3, meta_batch_size=8, mini_batch_size=4)
            spec.custom.name = "halves"
            spec.custom.settings[setting].CopyFrom(value)
            request = pb.CreateExperimentRequest(ref=pb.ExperimentRef(name="e"), spec=spec)
            with pytest.raises(evosample.InvalidArgumentError) as caught:
                client._connection.call("CreateExperiment", request)
            assert caught.value.field in ("policy", setting)
        assert not list(client.list_experiments())
