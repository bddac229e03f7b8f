"""Ids and losses on their way: between server and client arrays, and into Redis."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import grpc
import numpy as np
from performance.ranks import META_BATCH_SIZE, MINI_BATCH_SIZE, serving, serving_from
from performance.raw import LIMITS, MESSAGE_SAMPLES, raw_server
from performance.raw import stream as stream_raw
from performance.rows import Row, alternate

import evosample

_M = 1e6


def streaming(num_samples: int, num_repeats: int) -> Iterator[Row]:
    """An epoch's ids and prior scores, until they are arrays in the client."""
    names = (f"streamed-{number}" for number in itertools.count())
    with (
        serving() as server,
        raw_server() as address,
        grpc.insecure_channel(address, LIMITS) as channel,
        evosample.connect(server.address) as client,
    ):

        def planned(through: evosample.Client = client) -> evosample.Experiment:
            return new_experiment(through, next(names), num_samples)

        fresh, raw, raw_by_batch = alternate(
            num_repeats,
            lambda: fetched_per_s(planned()),
            lambda: stream_raw(channel, num_samples, MESSAGE_SAMPLES),
            lambda: stream_raw(channel, num_samples // 8, META_BATCH_SIZE),
        )

        def cold() -> float:
            experiment = planned()
            with serving_from(server) as other, evosample.connect(other.address) as elsewhere:
                return fetched_per_s(elsewhere.get_experiment(experiment.name))

        from_store, raw_beside = alternate(num_repeats, cold, lambda: stream_raw(channel, num_samples, MESSAGE_SAMPLES))
    name, unit = f"ids and prior scores to a client's arrays, {num_samples:,} samples", "M samples/s"
    fresh, from_store = _in_millions(fresh), _in_millions(from_store)
    raw, raw_by_batch, raw_beside = map(_in_millions, (raw, raw_by_batch, raw_beside))
    yield Row(
        f"{name}, epoch just planned",
        fresh,
        unit,
        30,
        compared_with="a raw gRPC stream of the same bytes",
        compared=raw,
        ratio_target=0.5,
    )
    yield Row(
        f"{name}, epoch just planned",
        fresh,
        unit,
        compared_with="a raw gRPC stream, one message for a batch of 256",
        compared=raw_by_batch,
        ratio_target=10,
    )
    yield Row(
        f"{name}, read from the store first",
        from_store,
        unit,
        8,
        compared_with="a raw gRPC stream of the same bytes",
        compared=raw_beside,
    )


def reporting(num_samples: int, num_repeats: int) -> Iterator[Row]:
    """An epoch's losses, handed over batch by batch, until the store has acknowledged all of them."""
    names = (f"reported-{number}" for number in itertools.count())
    with serving() as server, evosample.connect(server.address) as client:
        (values,) = alternate(num_repeats, lambda: reported_per_s(new_experiment(client, next(names), num_samples)))
    yield Row(
        f"losses reported into the store and acknowledged, {num_samples:,} samples",
        _in_millions(values),
        "M samples/s",
        8,
        note="append-only file, everysec",
    )


def new_experiment(client: evosample.Client, name: str, num_samples: int) -> evosample.Experiment:
    """In the place of all there are: with many, the store would be busy with its file."""
    for experiment in client.list_experiments():
        client.delete_experiment(experiment.name)
    return client.create_experiment(
        name, num_samples=num_samples, num_epochs=10, meta_batch_size=META_BATCH_SIZE, mini_batch_size=MINI_BATCH_SIZE
    )


def fetched_per_s(experiment: evosample.Experiment) -> float:
    """Samples a second through the client's fetching thread, from when the run joins."""
    began_s = time.perf_counter()
    run = experiment.epochs()
    epoch = next(run)
    num_steps = 0
    while num_steps < epoch.num_steps:
        chunk = run.next_chunk(epoch)
        assert chunk is not None
        num_steps += len(chunk.sample_ids)
    rate = num_steps * META_BATCH_SIZE / (time.perf_counter() - began_s)
    run.close()
    return rate


def reported_per_s(experiment: evosample.Experiment) -> float:
    """Samples a second, from the first batch handed over until the store has acknowledged the last."""
    losses = np.random.default_rng(0).random(META_BATCH_SIZE, np.float32)
    run = experiment.epochs()
    epoch = next(run)
    batches = list(iter(epoch.next_batch, None))
    began_s = time.perf_counter()
    for batch in batches:
        batch.report(losses)
    run.flush()
    rate = len(batches) * META_BATCH_SIZE / (time.perf_counter() - began_s)
    run.close()
    return rate


def _in_millions(values: list[float]) -> list[float]:
    return [value / _M for value in values]
