"""A store that goes back to what it was a little earlier, at the worst moments: what was lost is sent again, once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import evosample
from evosample import run as run_module
from evosample.v1 import selection_pb2 as pb
from evosample.v1 import selection_pb2_grpc as pb_grpc
from faults.harness import ReplicatedServer
from faults.proxy import Proxy
from stores import StandaloneStore, wait_until
from support import fixed_losses

SETTINGS: dict[str, Any] = {
    "num_samples": 400,
    "num_epochs": 6,
    "meta_batch_size": 40,
    "mini_batch_size": 20,
    "policy": evosample.EvolvedSampling(prune_ratio=0.2),
}
LOSSES = fixed_losses(400, 6)
StartReplica = Callable[..., ReplicatedServer]
Snapshot = dict[bytes, bytes]


def snapshot(store: StandaloneStore) -> Snapshot:
    """All that a store would still have after a fail-over that loses what comes from here on."""
    with store.client() as client:
        names = [name for name in client.scan_iter("evosample:*") if client.ttl(name) == -1]
        return {name: client.dump(name) for name in names}


def go_back(store: StandaloneStore, to: Snapshot) -> None:
    """Lose all that was written since."""
    with store.client() as client, client.pipeline(transaction=True) as pipeline:
        for name in client.scan_iter("evosample:*"):
            pipeline.delete(name)
        for name, value in to.items():
            pipeline.restore(name, 0, value)
        pipeline.execute()


def go_through(epoch: evosample.Epoch | Iterator[evosample.Batch], num_steps: int = 1_000) -> int:
    """Hand over the losses of the next steps; returns how many there were."""
    done = 0
    for batch in epoch:
        batch.select(LOSSES[batch.epoch, batch.sample_ids])
        done += 1
        if done == num_steps:
            break
    return done


def undisturbed_scores(server: ReplicatedServer) -> bytes:
    with evosample.connect(server.address) as client:
        experiment = client.create_experiment("undisturbed", **SETTINGS)
        for epoch in experiment.epochs():
            go_through(epoch)
        return scores_of(experiment)


def scores_of(experiment: evosample.Experiment) -> bytes:
    return b"".join(column.tobytes() for column in experiment.export_scores()[1:4])


def test_a_store_that_goes_back_again_while_it_is_being_mended_is_mended_all_the_same(
    start_replica: StartReplica, store: StandaloneStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_replica()
    with evosample.connect(server.address) as client:
        experiment = client.create_experiment("e", **SETTINGS)
        run = experiment.epochs(wait_timeout_s=60)
        epoch = next(run)
        go_through(epoch, 6)
        run.flush()
        earlier = snapshot(store)
        go_through(epoch)
        epoch = next(run)
        go_through(epoch, 2)
        run.flush()
        num_asked = 0

        def start_of(number: int) -> pb.EpochStart | None:
            nonlocal num_asked
            num_asked += number == 1
            if num_asked == 1:  # epoch 0 has been sent again and finished: that gets lost a second time
                go_back(store, earlier)
            return original(number)

        original = run._start_of
        monkeypatch.setattr(run, "_start_of", start_of)
        go_back(store, earlier)
        go_through(epoch)
        for epoch in run:
            go_through(epoch)
        assert num_asked
        assert scores_of(experiment) == undisturbed_scores(server)


def test_a_join_that_gets_lost_together_with_the_epoch_before_it_is_made_again(
    start_replica: StartReplica, store: StandaloneStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_replica()
    with evosample.connect(server.address) as client, evosample.connect(server.address) as later:
        first = client.create_experiment("e", **SETTINGS).epochs()
        go_through(next(first))
        go_through(epoch := next(first), 7)
        first.flush()
        earlier = snapshot(store)
        go_through(epoch)
        first.flush()
        position = first.position
        assert position == (2, 0)
        experiment = later.get_experiment("e")
        wait_until(lambda: experiment.status().epoch == 2, "the next epoch")
        first.close()
        original = later._connection.call

        def call(method: str, request: Any, **named: Any) -> Any:
            answer = original(method, request, **named)
            if method == "JoinRun" and not request.HasField("rejoining_as"):
                go_back(store, earlier)
            return answer

        monkeypatch.setattr(later._connection, "call", call)
        for epoch in experiment.epochs(position=position, wait_timeout_s=60):
            go_through(epoch)
        status = experiment.status()
        assert status.state == "finished"
        assert status.unreported_rows == 40, "what the first job reported last: it is gone, and can't send it again"


def test_of_an_epoch_that_an_outage_has_cut_short_the_lost_losses_are_sent_again_and_no_others(
    start_replica: StartReplica, store: StandaloneStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "_BUFFER_BYTES", 16 * 40 * 4)  # so that not all ids of an epoch are fetched ahead
    server = start_replica()
    with evosample.connect(server.address, outage_timeout_s=2) as client:
        experiment = client.create_experiment("e", **SETTINGS)
        run = experiment.epochs(wait_timeout_s=60, on_unavailable="uniform")
        epoch = next(run)
        go_through(epoch, 2)
        run.flush()
        earlier = snapshot(store)
        go_through(epoch, 1)
        run.flush()
        server.kill()
        go_back(store, earlier)
        taken = 3 + go_through(epoch)
        assert taken < 10, "the epoch was cut short"
        assert go_through(next(run), 3) == 3, "it goes on with a uniform epoch"
        server.restart()
        with evosample.connect(server.address) as other:
            watched = other.get_experiment("e")
            wait_until(lambda: watched.status().epoch == 2, "the epochs to be finished")
            assert watched.status().visited_rows == 40 * taken
            assert watched.status().non_finite_rows == 0
        run._closing.set()


@pytest.mark.parametrize("misses_an_epoch", [False, True])
@pytest.mark.parametrize("is_told_at_its_end", [False, True])
def test_stragglers_send_again_what_had_counted_and_nothing_else(
    start_replica: StartReplica, store: StandaloneStore, misses_an_epoch: bool, is_told_at_its_end: bool
) -> None:
    server = start_replica()
    with evosample.connect(server.address) as here, evosample.connect(server.address) as there:
        place: dict[str, Any] = {"world_size": 2, "run_id": "job", "straggler_timeout_s": 2, "wait_timeout_s": 60}
        quick = here.create_experiment("e", **SETTINGS).epochs(rank=0, **place)
        slow = there.get_experiment("e").epochs(rank=1, **place)
        late = next(slow)
        go_through(late, 3)
        slow.flush()
        epoch = next(quick)
        go_through(epoch, 2)
        quick.flush()
        earlier = snapshot(store)
        go_through(epoch)
        epoch = next(quick)  # without rank 1
        if misses_an_epoch:
            go_through(epoch, 2)
            quick.flush()
            earlier = snapshot(store)
            go_through(epoch)
            epoch = next(quick)
        if is_told_at_its_end:
            assert go_through(late) == 7
        else:
            go_through(late, 1)
            slow.flush()
            assert go_through(late) == 0
        after = next(slow)
        assert (late.is_closed, late.num_reported) == (True, 3)
        assert after.number == epoch.number
        expected = [here.get_experiment("e").export_scores().scores.tobytes()]
        go_back(store, earlier)
        ranks = [threading.Thread(target=go_through, args=(part,)) for part in (epoch, after)]
        for thread in ranks:
            thread.start()
        for thread in ranks:
            thread.join()
        assert [next(run).number for run in (quick, slow)] == [epoch.number + 1] * 2
        found = here.get_experiment("e").export_scores(epoch=epoch.number)
        assert [found.scores.tobytes()] == expected
        for run in (quick, slow):
            run._closing.set()


def test_a_dead_process_that_is_heard_late_takes_no_living_ones_place(
    start_replica: StartReplica, store: StandaloneStore
) -> None:
    with Proxy(f"127.0.0.1:{store.port}") as proxy:
        servers = [start_replica(redis_url=f"redis://{proxy.address}"), start_replica()]
        with grpc.insecure_channel(servers[0].address) as dying, grpc.insecure_channel(servers[1].address) as living:
            stub = pb_grpc.SelectionServiceStub(living)
            spec = pb.ExperimentSpec(uniform=pb.Uniform(), num_samples=200, num_epochs=4, meta_batch_size=20)
            request = pb.CreateExperimentRequest(ref=pb.ExperimentRef(name="e"), spec=spec)
            ref = stub.CreateExperiment(request).experiment.ref

            def joining(rank: int, process_id: str) -> pb.JoinRunRequest:
                return pb.JoinRunRequest(ref=ref, run_id="job", rank=rank, world_size=2, process_id=process_id)

            stub.JoinRun(joining(0, "other"))
            proxy.hold(b"process-one")
            late = pb_grpc.SelectionServiceStub(dying).JoinRun.future(joining(1, "process-one"))
            assert proxy.held.wait(20)
            late.cancel()  # its process is killed
            health_pb2_grpc.HealthStub(dying).Check(health_pb2.HealthCheckRequest())  # answered after that was noticed
            joined = stub.JoinRun(joining(1, "process-two"))
            member = pb.Member(ref=ref, generation=joined.generation, rank=1, claim=joined.claim)
            proxy.release()
            for _ in range(20):
                assert list(stub.StreamEpoch(pb.StreamEpochRequest(member=member, max_steps=1)))
                proxy.held.wait(0.05)


def test_ranks_that_bring_the_same_scores_at_once_all_start_from_them(start_replica: StartReplica) -> None:
    server = start_replica()
    rng = np.random.default_rng(3)
    scores = evosample.ExportedScores(
        3, rng.random(400, np.float32), rng.random(400, np.float32), np.ones(400, np.uint32)
    )
    for attempt in range(4):
        at_once = threading.Barrier(4)
        begun: list[int] = []

        def begin(rank: int, name: str, at_once: threading.Barrier, begun: list[int]) -> None:
            with evosample.connect(server.address) as client:
                at_once.wait()
                experiment = client.create_experiment(name, **SETTINGS, initial_scores=scores)
                run = experiment.epochs(rank=rank, world_size=4, run_id="job")
                begun.append(next(run).number)
                at_once.wait(30)

        ranks = [threading.Thread(target=begin, args=(rank, f"e{attempt}", at_once, begun)) for rank in range(4)]
        for thread in ranks:
            thread.start()
        for thread in ranks:
            thread.join()
        assert begun == [0] * 4
        with evosample.connect(server.address) as client:
            found = client.get_experiment(f"e{attempt}").export_scores()
            np.testing.assert_array_equal(found.scores, scores.scores)


def test_a_wait_for_servers_that_is_shorter_than_a_frozen_one_takes_to_be_found_out_ends_no_job(
    start_replica: StartReplica,
) -> None:
    server = start_replica()
    with evosample.connect(server.address, outage_timeout_s=3) as client:
        run = client.create_experiment("e", **SETTINGS).epochs(on_unavailable="uniform")
        epoch = next(run)
        go_through(epoch, 3)
        wait_until(lambda: epoch.num_received == 10, "the ids to be here")
        server.pause()
        go_through(epoch)
        uniform = next(run)
        assert uniform.is_uniform
        go_through(uniform, 2)
        server.resume()
        go_through(uniform)
        assert not next(run).is_uniform
        run._closing.set()


def test_a_store_that_goes_back_further_than_a_run_remembers_ends_it_and_the_next_one_begins_where_the_store_is(
    start_replica: StartReplica, store: StandaloneStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it is restored from an old backup: docs/operations.md."""
    monkeypatch.setattr(run_module, "_KEPT_BYTES", 0)  # the current epoch and the one before are kept all the same
    server = start_replica()
    with evosample.connect(server.address) as client:
        experiment = client.create_experiment("e", **SETTINGS)
        run = experiment.epochs(run_id="before")
        go_through(next(run))
        epoch = next(run)
        backup = snapshot(store)
        for _ in range(3):
            go_through(epoch)
            epoch = next(run)
        go_back(store, backup)

        def go_on() -> None:
            for batch in epoch:
                batch.select(LOSSES[batch.epoch, batch.sample_ids])
                run.flush()

        with pytest.raises(evosample.DataLossError, match="back to epoch 1, whose losses this run no longer has"):
            go_on()
        run.close()
        position = evosample.Position(4, 0)
        with pytest.raises(evosample.EpochNotRetainedError):
            next(experiment.epochs(run_id="after", position=position))
        again = experiment.epochs(run_id="again", position=position, on_missing_epoch="current")
        assert next(again).number == 1
        again.close()
