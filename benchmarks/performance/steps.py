"""What a training step waits for in the client."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
from performance.ranks import META_BATCH_SIZE, MINI_BATCH_SIZE, serving
from performance.rows import Row, alternate

import evosample

_US = 1e6
_STEP_S = 0.02


def steps(num_steps: int, num_repeats: int) -> Iterator[Row]:
    """The next batch, its choice and its report: against ES in plain numpy, and beside a step of 20 ms."""
    chance = np.random.default_rng(0)
    losses = chance.random(META_BATCH_SIZE, np.float32)
    num_samples = META_BATCH_SIZE * num_steps * (num_repeats + 2)
    with serving() as server, evosample.connect(server.address) as client:
        run = client.create_experiment(
            "steps",
            num_samples=num_samples,
            num_epochs=3,
            meta_batch_size=META_BATCH_SIZE,
            mini_batch_size=MINI_BATCH_SIZE,
            policy=evosample.EvolvedSampling(annealing=0),
        ).epochs()
        epoch = next(run)
        tails: list[float] = []
        means: list[float] = []

        def step() -> None:
            batch = epoch.next_batch()
            assert batch is not None
            batch.select(losses)

        def live() -> float:
            seconds = _timed(step, num_steps)
            tails.append(float(np.percentile(seconds, 99)) * _US)
            means.append(float(np.mean(seconds)) * _US)
            return float(np.median(seconds)) * _US

        plain = PlainSelection(num_samples, chance)
        medians, plain_medians = alternate(
            num_repeats, live, lambda: float(np.median(_timed(lambda: plain.step(losses), num_steps))) * _US
        )
        shares, plain_shares = alternate(
            num_repeats, lambda: _share(step, 100), lambda: _share(lambda: plain.step(losses), 100)
        )
        run.close()
    name = "waiting in the client a step: next, select and report, B = 256, b = 64, one step after the other"
    yield Row(
        f"{name}: median",
        medians,
        "us",
        100,
        higher_is_better=False,
        compared_with="the same in plain numpy",
        compared=plain_medians,
        ratio_target=3,
    )
    yield Row(f"{name}: mean", means[1:], "us", higher_is_better=False)
    yield Row(f"{name}: 99th percentile", tails[1:], "us", 1000, higher_is_better=False)
    yield Row(
        "share of a step of 20 ms spent in the client",
        shares,
        "%",
        1,
        higher_is_better=False,
        compared_with="the same in plain numpy",
        compared=plain_shares,
        note="after 20 ms of anything else its code and data are no longer in the processor's cache",
    )


class PlainSelection:
    """ES in one process, as one would write it down: no server, and nothing survives it."""

    def __init__(self, num_samples: int, chance: np.random.Generator) -> None:
        self._scores = np.full(num_samples, 1 / num_samples, np.float32)
        self._weights = self._scores.copy()
        self._order = chance.permutation(num_samples)
        self._chance = chance
        self._step = 0

    def step(self, losses: np.ndarray) -> np.ndarray:
        """One step: the rows to train on."""
        first = self._step * META_BATCH_SIZE % len(self._order)
        self._step += 1
        ids = self._order[first : first + META_BATCH_SIZE]
        losses = np.where(np.isfinite(losses), losses, 0)
        scores = self._scores[ids]
        weights = 0.2 * scores + 0.8 * losses
        keys = self._chance.exponential(size=len(ids)) / weights
        chosen = np.sort(np.argpartition(keys, MINI_BATCH_SIZE)[:MINI_BATCH_SIZE])
        self._weights[ids] = weights
        self._scores[ids] = 0.9 * scores + 0.1 * losses
        return chosen


def _timed(work: Callable[[], object], num_times: int) -> list[float]:
    seconds = []
    for _ in range(num_times):
        began_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began_s)
    return seconds


def _share(step: Callable[[], object], num_steps: int) -> float:
    """Percent of the time of steps that compute for 20 ms."""
    values = np.random.default_rng(0).random((300, 300))
    waiting_s = 0.0
    began_s = time.perf_counter()
    for _ in range(num_steps):
        step_began_s = time.perf_counter()
        step()
        computing_s = time.perf_counter()
        waiting_s += computing_s - step_began_s
        while time.perf_counter() - computing_s < _STEP_S:
            values @ values  # releases Python's lock, as a training step does
    return 100 * waiting_s / (time.perf_counter() - began_s)
