"""Groups on a server: floors, mixtures, and changing them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import grpc
import numpy as np
import pytest
import redis
from numpy.typing import NDArray

import evosample
from evosample.sampling import Groups, initial_scores, plan_epoch, table_checksum
from evosample.v1 import selection_pb2 as pb
from evosample.v1 import selection_pb2_grpc as pb_grpc
from evosample.wire import ExperimentName
from evosample_server.keys import ExperimentKeys
from support import ServerProcess

N = 400
IDS = np.random.default_rng(1).permutation(np.repeat(np.arange(4), [1, 20, 79, 300]))
SIZES = np.bincount(IDS)
SETTINGS: dict[str, Any] = {
    "num_samples": N,
    "num_epochs": 8,
    "meta_batch_size": 20,
    "mini_batch_size": 10,
    "policy": evosample.EvolvedSampling(prune_ratio=0.5),
}
FLOOR: dict[str, Any] = SETTINGS | {"groups": IDS, "group_floor": 0.3}
DOREMI: dict[str, Any] = SETTINGS | {
    "groups": IDS,
    "mixture": evosample.DoReMi(),
    "reference_losses": np.full(N, 0.5),
    "policy": evosample.RandomSubset(prune_ratio=0.5),
    "mini_batch_size": 20,
}


def losses_of(ids: NDArray[np.int64], epoch: int) -> NDArray[np.float64]:
    """The rare groups are learned at once."""
    return np.random.default_rng(epoch).gamma(2, 1, N)[ids] * np.where(IDS[ids] < 3, 0.001, 1)


def train(experiment: evosample.Experiment, num_epochs: int = 8, **place: Any) -> list[NDArray[np.int64]]:
    """The sample ids of each epoch."""
    epochs = []
    run = experiment.epochs(**place)
    for epoch in run:
        batches = []
        for batch in epoch:
            batch.select(losses_of(batch.sample_ids, batch.epoch))
            batches.append(batch.sample_ids)
        epochs.append(np.concatenate(batches))
        if len(epochs) == num_epochs:
            break
    run.close()
    return epochs


def shares(epochs: list[NDArray[np.int64]]) -> NDArray[np.float64]:
    """The share of each group in each epoch, [epochs, groups]."""
    return np.array([np.bincount(IDS[ids], minlength=4) / SIZES for ids in epochs])


def test_no_group_falls_under_its_floor(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **FLOOR)
    assert experiment.spec.num_groups == 4
    epochs = train(experiment)
    assert (shares(epochs) >= 0.3).all()
    experiment.export_scores()
    for past, ids in zip(experiment.history(), epochs, strict=True):
        assert [group.num_samples for group in past.summary.groups] == SIZES.tolist()
        assert [group.num_rows for group in past.summary.groups] == np.bincount(IDS[ids], minlength=4).tolist()
        losses = losses_of(ids, past.summary.epoch).astype(np.float32)
        means = [losses[IDS[ids] == group].mean() for group in range(4)]
        assert [group.mean_loss for group in past.summary.groups] == pytest.approx(means)
        assert np.isnan([group.weight for group in past.summary.groups]).all()
    without = client.create_experiment(f"{name}-without", **SETTINGS)
    assert (shares(train(without)) < 0.3).any()


def test_a_learned_mixture_is_that_of_the_formula_and_comes_back_with_its_epoch(
    client: evosample.Client, name: str
) -> None:
    experiment = client.create_experiment(name, **DOREMI)
    epochs = train(experiment)
    experiment.export_scores()
    history = [past.summary.groups for past in experiment.history()]
    mixture = DOREMI["mixture"].first_weights(SIZES)
    for ids, groups in zip(epochs, history, strict=True):
        assert [group.weight for group in groups] == pytest.approx(mixture)
        mixture = DOREMI["mixture"].next_weights(mixture, np.array([group.excess_loss for group in groups]))
        assert len(ids) == 200
    final = [group.weight for group in history[-1]]
    assert final[3] > 0.95 > history[0][3].weight, "only the last group has losses above its reference's"
    again = train(experiment, position=(7, 0))
    assert [ids.tolist() for ids in again] == [ids.tolist() for ids in epochs[7:]]
    experiment.export_scores()
    assert [group.weight for group in experiment.history()[-1].summary.groups] == final


def test_groups_count_from_the_first_epoch_and_later_ones_from_the_next(client: evosample.Client, name: str) -> None:
    policy = evosample.RandomSubset(prune_ratio=0.5)
    experiment = client.create_experiment(name, **FLOOR | {"policy": policy, "mini_batch_size": 20})
    (first,) = train(experiment, 1)
    plan = plan_epoch(experiment.spec, 0, initial_scores(N), Groups(IDS.astype(np.uint16)))
    assert first.tolist() == plan.table.sample_ids.tolist()
    others = np.roll(IDS, 1)
    run = experiment.epochs()
    epoch = next(run)
    planned_before = []
    for batch in epoch:
        if not batch.step:
            experiment.set_groups(others)
        planned_before.append(batch.sample_ids)
        batch.report(np.ones(20))
    run.close()
    assert (shares([np.concatenate(planned_before)]) >= 0.3).all(), "by the old groups"
    for ids in train(experiment):
        assert (np.bincount(others[ids], minlength=4) / SIZES >= 0.3).all()
    assert client.create_experiment(name, **FLOOR | {"policy": policy, "mini_batch_size": 20}).uid == experiment.uid


def test_groups_that_are_replaced_or_deleted_leave_nothing_in_the_store(start_server: Callable[..., Any]) -> None:
    server = start_server()
    with evosample.connect(server.address) as client, redis.Redis(unix_socket_path=server.store_socket) as store:

        def columns(column: str) -> int:
            return len(store.keys(f"*:{column}:*"))

        experiment = client.create_experiment("e", **DOREMI)
        for _ in range(3):
            experiment.set_groups(IDS, reference_losses=np.ones(N))
            train(experiment, 2)
            experiment.set_groups(np.roll(IDS, 1), reference_losses=np.ones(N))
            assert (columns("group"), columns("reference_loss")) == (1, 1)
        train(experiment)
        experiment.export_scores()
        experiment.set_groups(np.roll(IDS, 1), reference_losses=np.ones(N))  # which it has already
        with pytest.raises(evosample.FailedPreconditionError, match="has finished"):
            experiment.set_groups(IDS, reference_losses=np.ones(N))
        assert (columns("group"), columns("reference_loss")) == (1, 1)
        client.delete_experiment("e")
        assert (columns("group"), columns("reference_loss")) == (0, 0)


def test_an_epoch_whose_groups_were_changed_is_gone_on_with_at_its_start(client: evosample.Client, name: str) -> None:
    experiment = client.create_experiment(name, **FLOOR)
    train(experiment, 2)
    experiment.set_groups(np.roll(IDS, 1))
    with pytest.raises(evosample.FailedPreconditionError, match=r"groups were changed since epoch 1 was planned"):
        experiment.epochs(position=(1, 3))
    train(experiment, position=(1, 0))


def test_other_servers_have_no_rows_of_an_epoch_as_it_was_before_its_groups_were_changed(
    start_server: Callable[..., ServerProcess],
) -> None:
    planning = start_server()
    reading = start_server("--redis-url", f"unix://{planning.store_socket}")
    with (
        evosample.connect(planning.address) as client,
        grpc.insecure_channel(planning.address) as channel,
        grpc.insecure_channel(reading.address) as other_channel,
    ):
        experiment = client.create_experiment("e", **FLOOR)
        stub, other = pb_grpc.SelectionServiceStub(channel), pb_grpc.SelectionServiceStub(other_channel)

        def members(run_id: str, **place: Any) -> list[pb.Member]:
            found = []
            for rank in range(2):
                join = pb.JoinRunRequest(ref=experiment.ref, run_id=run_id, rank=rank, world_size=2, **place)
                joined = stub.JoinRun(join)
                found.append(pb.Member(ref=experiment.ref, generation=joined.generation, rank=rank, claim=joined.claim))
            return found

        def table_from(stub: Any, ranks: list[pb.Member], epoch: int) -> tuple[pb.EpochStart, int]:
            """How an epoch starts, and the checksum of its rows as they come."""
            parts = []
            for member in ranks:
                responses = list(stub.StreamEpoch(pb.StreamEpochRequest(member=member, epoch=epoch), timeout=20))
                (rows,) = (response.rows for response in responses if response.HasField("rows"))
                parts.append((np.frombuffer(rows.sample_ids, np.uint32), np.frombuffer(rows.prior_scores, np.float32)))
            columns = (np.stack([c.reshape(-1, 10) for c in both], axis=1).ravel() for both in zip(*parts, strict=True))
            return next(r.start for r in responses if r.HasField("start")), table_checksum(*columns)

        ranks = members("first")
        for epoch in (0, 1):
            start, checksum = table_from(other, ranks, epoch)
            assert checksum == start.table_checksum
            for member in ranks:
                stub.FinishEpoch(pb.FinishEpochRequest(member=member, epoch=epoch, plan_id=start.plan_id))
            table_from(stub, ranks, epoch + 1)  # planned here
        experiment.set_groups(np.roll(IDS, 1))
        ranks = members("second", position=pb.Position(epoch=1))
        again, checksum = table_from(stub, ranks, 1)
        assert checksum == again.table_checksum != start.table_checksum
        assert table_from(other, ranks, 1) == (again, checksum)


def test_a_server_that_ends_between_groups_and_their_plan_trains_by_them_all_the_same(
    start_server: Callable[..., ServerProcess],
) -> None:
    server = start_server()
    with evosample.connect(server.address) as client, redis.Redis(unix_socket_path=server.store_socket) as store:
        settings = FLOOR | {"policy": evosample.RandomSubset(prune_ratio=0.5), "mini_batch_size": 20}
        experiment = client.create_experiment("e", **settings)
        keys = ExperimentKeys(ExperimentName("default", "e"), experiment.uid)
        plan_id = store.hget(keys.head, "plan_id").decode()
        plan = keys.plan(plan_id)
        assert store.hdel(plan, "groups_id") == 1  # as if it had been planned without them
        (first,) = train(experiment, 1)
        assert (shares([first]) >= 0.3).all()
        assert store.hget(keys.head, "plan_id").decode() != plan_id


def test_a_run_waits_for_groups_to_be_said(server: ServerProcess, client: evosample.Client, name: str) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = pb_grpc.SelectionServiceStub(channel)
        spec = pb.ExperimentSpec(num_samples=N, num_epochs=3, meta_batch_size=20, num_groups=2)
        spec.random_subset.prune_ratio = 0.5
        stub.CreateExperiment(pb.CreateExperimentRequest(ref=pb.ExperimentRef(name=name), spec=spec))
    experiment = client.get_experiment(name)
    with pytest.raises(evosample.FailedPreconditionError, match="which sample is in which is yet to be said"):
        experiment.epochs()
    experiment.set_groups(IDS % 2)
    train(experiment)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"groups": IDS[1:]}, "groups: expected numbers of shape .400,."),
        ({"groups": IDS - 1}, "groups: expected integers from 0 to 65,535"),
        ({"groups": IDS + 0.5}, "expected an integer for each sample"),
        ({"groups": IDS * 400}, "num_groups=1201: expected groups of ids from 0 to 999"),
        ({"groups": None}, "groups=None: expected the group of each sample"),
        ({"group_floor": 0.9}, "group_floor=0.9: expected at most 0.5"),
        ({"group_floor": 0.5}, "group_floor=0.5: expected less: it needs 201 samples an epoch"),
        ({"reference_losses": np.ones(N)}, "reference_losses: expected none"),
        ({"mixture": evosample.DoReMi(), "group_floor": 0.0}, "reference_losses: expected a loss for each sample"),
    ],
)
def test_bad_groups_are_refused_before_anything_is_made(
    client: evosample.Client, name: str, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(evosample.InvalidArgumentError, match=said):
        client.create_experiment(name, **FLOOR | changed)
    with pytest.raises(evosample.NotFoundError):
        client.get_experiment(name)


def test_a_server_checks_groups_itself(server: ServerProcess, client: evosample.Client, name: str) -> None:
    ref = client.create_experiment(name, **FLOOR).ref
    plain = client.create_experiment(f"{name}-plain", **SETTINGS).ref
    learned = client.create_experiment(f"{name}-learned", **DOREMI).ref
    good = IDS.astype("<u2").tobytes()
    with grpc.insecure_channel(server.address) as channel:
        stub = pb_grpc.SelectionServiceStub(channel)
        messages: list[tuple[str, dict[str, Any]]] = [
            ("this experiment was created without groups", {"ref": plain, "groups": good}),
            ("num_samples=3", {"num_samples": 3, "groups": good}),
            ("groups='200 samples'", {"groups": good[:400]}),
            ("groups='401 samples'", {"groups": good + b"\0\0"}),
            ("groups", {"groups": good[:-1]}),
            ("first_sample=1", {"first_sample": 1, "groups": good}),
            ("groups=4: expected ids below 4", {"groups": good[:-2] + b"\4\0"}),
            ("none without DoReMi", {"groups": good, "reference_losses": bytes(4 * N)}),
            ("reference_losses", {"ref": learned, "groups": good}),
            ("reference_losses", {"ref": learned, "groups": good, "reference_losses": b"\xff" * 4 * N}),
        ]
        for said, message in messages:
            request = pb.SetGroupsRequest(**cast(Any, {"ref": ref, "num_samples": N} | message))
            with pytest.raises(grpc.RpcError) as caught:
                stub.SetGroups(iter([request]))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, said
            assert said in (caught.value.details() or "")
    train(client.get_experiment(name))
