"""What fault tests share: a training job whose every id, choice and score is compared with an undisturbed run's."""

from __future__ import annotations

import itertools
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import redis

import evosample
from evosample.sampling import (
    UCB,
    EvolvedSampling,
    ExperimentSpec,
    InfoBatch,
    Kakurenbo,
    OrderedSGD,
    RandomSubset,
    Report,
    Scores,
    SelectiveBackprop,
    Uniform,
    fold_epoch,
    initial_scores,
    part,
    plan_epoch,
    select_mini_batch,
    starting_scores,
)
from evosample.v1 import selection_pb2 as pb
from stores import StandaloneStore
from support import ServerProcess, columns_of, fixed_losses, train

SETTINGS: dict[str, Any] = {
    "num_samples": 2_000,
    "num_epochs": 6,
    "meta_batch_size": 40,
    "mini_batch_size": 10,
    "policy": EvolvedSampling(prune_ratio=0.2),
    "importance_weight": "unbiased",
    "seed": 11,
}
# One policy each, some with other draws: epochs of 20 steps or fewer, at most four of them hidden.
EACH_POLICY: dict[str, dict[str, Any]] = {
    name: SETTINGS
    | {"num_samples": 800, "policy": policy, "importance_weight": importance_weight}
    | ({"mini_batch_size": 40} if policy.batch_level == "all" else {})
    for name, policy, importance_weight in [
        ("evolved_sampling", EvolvedSampling(prune_ratio=0.2), "unbiased"),
        ("systematic_with_guards", EvolvedSampling(prune_ratio=0.2, set_draw="systematic"), "unbiased"),
        ("with_replacement", EvolvedSampling(batch_draw="with_replacement"), "self_normalized"),
        ("uniform", Uniform(), "none"),
        ("random_subset", RandomSubset(prune_ratio=0.3), "unbiased"),
        ("info_batch", InfoBatch(), "none"),
        ("kakurenbo", Kakurenbo(), "none"),
        ("ordered_sgd", OrderedSGD(), "none"),
        ("ucb", UCB(), "none"),
        ("selective_backprop", SelectiveBackprop(begin=0.3), "unbiased"),
    ]
}
EACH_POLICY["without_scoring"] = SETTINGS | {
    "num_samples": 800,
    "mini_batch_size": 10,
    "meta_batch_size": None,
    "policy": EvolvedSampling(),
}
EACH_POLICY["systematic_with_guards"] |= {"max_skipped_epochs": 1, "loss_clip_quantile": 0.9}
LARGE: dict[str, Any] = SETTINGS | {"num_samples": 400_000, "meta_batch_size": 20_000, "mini_batch_size": 5_000}


class Outcome(NamedTuple):
    """All that a job has seen, in the order of (epoch, step, rank), and all columns that it ended with."""

    visits: list[tuple[Any, ...]]
    scores: dict[str, bytes]


def outcome(experiment: evosample.Experiment, visits: list[tuple[Any, ...]]) -> Outcome:
    """The visits brought into order, with the scores that the experiment has now."""
    return Outcome(sorted(visits, key=lambda key: key[:3]), exported(experiment))


def exported(experiment: evosample.Experiment) -> dict[str, bytes]:
    """Everything that an experiment keeps of its samples now, by name."""
    experiment.status()  # with what is still on its way
    columns: dict[str, bytes] = {}
    for rows in experiment._connection.collect("ExportScores", pb.ExportScoresRequest(ref=experiment.ref)):
        for name in Scores._fields[:-1]:
            columns[name] = columns.get(name, b"") + getattr(rows, name)
        for name, values in rows.columns.items():
            columns[name] = columns.get(name, b"") + values
    return columns


def run_job(
    addresses: str | Sequence[str],
    name: str,
    *,
    settings: dict[str, Any] = SETTINGS,
    world_size: int = 2,
    pace_s: float = 0.0,
    outage_timeout_s: float = 120.0,
    before_step: Callable[[evosample.Batch], None] = lambda _: None,
    last_epoch_after: threading.Event | None = None,
    **joining: Any,
) -> Outcome:
    """Train an experiment from its beginning to its end, each rank over a client of its own.

    Each step takes `pace_s`, and the last epoch begins once `last_epoch_after` is set: what is lost after the job has
    ended nobody can send again. An answer that never comes ends as an error after `outage_timeout_s`: nobody hangs.
    """
    losses = fixed_losses(settings["num_samples"], settings["num_epochs"])

    def step(batch: evosample.Batch) -> None:
        time.sleep(pace_s)
        if last_epoch_after is not None and batch.epoch == settings["num_epochs"] - 1:
            last_epoch_after.wait()
        before_step(batch)

    def run_rank(rank: int) -> list[tuple[Any, ...]]:
        with evosample.connect(addresses, outage_timeout_s=outage_timeout_s, connect_timeout_s=60) as client:
            experiment = client.create_experiment(name, **settings)
            place = {"rank": rank, "world_size": world_size, "run_id": "job"}
            visits = train(experiment, losses, before_step=step, wait_timeout_s=outage_timeout_s, **place, **joining)
            return [visit.key() for visit in visits]

    with ThreadPoolExecutor(world_size) as ranks:
        visits = [key for part in ranks.map(run_rank, range(world_size)) for key in part]
    with evosample.connect(addresses, outage_timeout_s=outage_timeout_s, connect_timeout_s=60) as client:
        experiment = client.get_experiment(name)
        assert experiment.status().state == "finished"
        assert experiment.status().unreported_rows == 0
        return outcome(experiment, visits)


class ReplicatedServer(ServerProcess):
    """One of several servers on one store, which tests kill, freeze and start again where it was."""

    def __init__(self, folder: Path, redis_url: str, *options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder / "server", "--redis-url", redis_url, *options)

    def pause(self) -> None:
        """Freeze it: connections stay, answers don't come."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)


@contextmanager
def disturbing(work: Callable[[random.Random, threading.Event], None], seed: int) -> Iterator[threading.Event]:
    """Have a thread do harm until the block ends, whose failure is the test's. Yields what is set once it is done."""
    stopping, is_over = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(work, random.Random(seed), stopping)
        job.add_done_callback(lambda _: is_over.set())
        try:
            yield is_over
        finally:
            stopping.set()
            job.result()


def lose_last_writes(store: StandaloneStore, seconds: float, stopping: threading.Event) -> int:
    """Cut the store's power, which costs its log what it was given in so many seconds. Returns how many bytes.

    That is one write at least, unless nothing comes for two seconds more: a job that waits before its last epoch until
    the harm is done writes nothing.
    """
    (log,) = store.folder.glob("appendonlydir/*.incr.aof")
    synced_bytes = log.stat().st_size
    stopping.wait(seconds)
    for _ in range(200):
        if log.stat().st_size > synced_bytes:
            break
        stopping.wait(0.01)
    store.kill()
    num_lost = log.stat().st_size - synced_bytes
    with log.open("r+b") as file:
        file.truncate(synced_bytes)
    store.start()
    return num_lost


class Turns:
    """Sees when some server is in the turn of an epoch: its fold, its planning, its commit."""

    def __init__(self, store: redis.Redis) -> None:
        self._store = store
        self._lock_name = b""

    def wait_for_one(self, stopping: threading.Event) -> bool:
        """Return once a turn is on; False if the test stops before."""
        while not stopping.is_set():
            self._lock_name = next(iter(cast(list[bytes], self._store.keys("evosample:*:turn"))), b"")
            if self._lock_name:
                return True
        return False

    def is_on(self) -> bool:
        """Whether the turn that was waited for is still on, or its lock has not run out."""
        return bool(self._store.exists(self._lock_name))


def computed(settings: dict[str, Any], world_size: int) -> Outcome:
    """What comes of a job by the formulas alone, without a server."""
    spec = ExperimentSpec(**settings)
    losses = fixed_losses(spec.num_samples, spec.num_epochs)
    scores = initial_scores(spec.num_samples, spec.policy.columns)
    visits: list[tuple[Any, ...]] = []
    for epoch in range(spec.num_epochs):
        table, shape = plan_epoch(spec, epoch, scores)
        losses_of_rows, chosen = losses[epoch, table.sample_ids], np.zeros(shape.num_rows, np.bool_)
        for step, rank in itertools.product(range(shape.num_steps), range(world_size)):
            ids, prior_scores, weights = (
                None if rows is None else part(rows, shape.step_rows, rank, world_size)[step] for rows in table
            )
            assert ids is not None
            drawn = select_mini_batch(
                spec,
                shape,
                epoch=epoch,
                step=step,
                rank=rank,
                world_size=world_size,
                prior_scores=cast(Any, prior_scores),
                losses=losses[epoch, ids],
                set_importance_weights=weights,
            )
            part(chosen, shape.step_rows, rank, world_size)[step, drawn.positions] = True
            choice = (drawn.positions.tolist(), drawn.importance_weights.tobytes())
            visits.append((epoch, step, rank, ids.tolist(), *choice))
        report = Report(losses_of_rows, chosen, columns_of(spec.policy, losses_of_rows))
        fold_epoch(spec, scores, table.sample_ids, report)
        scores = starting_scores(scores, spec.num_samples, spec.policy.columns)
    columns = scores._asdict() | dict(scores.columns)
    del columns["columns"]
    return Outcome(visits, {name: column.tobytes() for name, column in columns.items()})
