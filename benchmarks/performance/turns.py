"""The turn of an epoch: from the last FinishEpoch to the first rows of the next epoch."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import redis
import torch
from numpy.typing import NDArray
from performance.ranks import META_BATCH_SIZE, Rank, serving, spec_of
from performance.rows import Row, alternate

_TARGETS_S = {1_280_000: 0.3, 10_000_000: 3.0, 100_000_000: 35.0}
_MOST_OF_TORCH = 2**24
_BLOCK_ROWS = 1_000_000
_PRUNE_RATIO = 0.2
_STREAM_STEPS = 16


def turns(all_num_samples: list[int], num_repeats: int) -> Iterator[Row]:
    """Turns of several sizes, each beside plain numpy and raw writing; and what a sample costs in them."""
    costs: dict[int, float] = {}
    for num_samples in all_num_samples:
        ours, plainly, multinomial = _measured(num_samples, num_repeats if num_samples <= _MOST_OF_TORCH else 1)
        costs[num_samples] = 1e9 * float(np.median(ours)) / num_samples
        name = f"epoch turn, {num_samples:,} samples, r = 0.2"
        yield Row(
            name,
            ours,
            "s",
            _TARGETS_S.get(num_samples),
            higher_is_better=False,
            compared_with="fold, prune and shuffle in plain numpy, and the same bytes written raw",
            compared=plainly,
            ratio_target=1.5 if num_samples in _TARGETS_S else None,
        )
        if multinomial:
            yield Row(
                name,
                ours,
                "s",
                higher_is_better=False,
                compared_with="torch.multinomial alone",
                compared=multinomial,
                ratio_target=1.0,
            )
    smallest, largest = min(costs), max(costs)
    if smallest < largest:
        yield Row(
            f"cost of a sample in a turn, {largest:,} samples",
            [costs[largest]],
            "ns",
            higher_is_better=False,
            compared_with=f"{smallest:,} samples",
            compared=[costs[smallest]],
            ratio_target=2.0,
        )


def _measured(num_samples: int, num_repeats: int) -> tuple[list[float], list[float], list[float]]:
    """Seconds of turns, of the plain ones beside them and, where it is asked of a size, of torch.multinomial."""
    with (
        serving() as server,
        redis.Redis(unix_socket_path=server.store_socket) as store,
        Rank(server.address, "turns", spec_of(num_samples, prune_ratio=_PRUNE_RATIO)) as rank,
    ):
        epochs, plain = iter(range(100)), PlainTurn(num_samples, store)
        works: list[Callable[[], float]] = [lambda: rank.turn_s(next(epochs)), plain.seconds]
        if num_samples == 10_000_000:
            works.append(plain.multinomial_s)
        ours, plainly, *multinomial = alternate(num_repeats, *works)
    return ours, plainly, multinomial[0] if multinomial else []


def streams_beside_a_turn(num_samples: int, num_repeats: int) -> Iterator[Row]:
    """How long another experiment waits for its next rows while an epoch turns, and while none does."""
    with (
        serving() as server,
        Rank(server.address, "large", spec_of(num_samples, prune_ratio=_PRUNE_RATIO)) as large,
        Rank(server.address, "small", spec_of(1_000_000)) as small,
    ):
        quiet, busy, beside_another = [], [], []
        for epoch in range(num_repeats + 1):
            waits = _Waits(small)
            seconds = large.turn_s(epoch, beside=waits)
            busy.append(waits.percentile_ms(99))
            waits = _Waits(small)
            with waits:
                time.sleep(seconds)
            quiet.append(waits.percentile_ms(99))
            waits = _Waits(small)
            with _computing(), waits:
                time.sleep(seconds)
            beside_another.append(waits.percentile_ms(99))
    for compared_with, compared, ratio_target in (
        ("the same while nothing turns", quiet, 2.0),
        ("the same while nothing turns, but a process of something else keeps one core busy", beside_another, None),
    ):
        yield Row(
            f"another experiment's wait for rows while {num_samples:,} samples turn: 99th percentile",
            busy[1:],
            "ms",
            higher_is_better=False,
            compared_with=compared_with,
            compared=compared[1:],
            ratio_target=ratio_target,
        )


@contextmanager
def _computing() -> Iterator[None]:
    """A process that does nothing but compute, in one thread."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


class _Waits:
    """Asks for rows again and again while it lasts, and keeps how long each answer took."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._seconds: list[float] = []
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _ask(self) -> None:
        step = 0
        while not self._ends.is_set():
            began_s = time.perf_counter()
            for _ in self._rank.stream(first_step=step, max_steps=_STREAM_STEPS):
                pass
            self._seconds.append(time.perf_counter() - began_s)
            step = (step + _STREAM_STEPS) % 2_000

    def percentile_ms(self, percentile: float) -> float:
        return 1000 * float(np.percentile(self._seconds, percentile))


class PlainTurn:
    """What a turn comes to without a service: arrays in one process, and their bytes written to the same store."""

    def __init__(self, num_samples: int, store: redis.Redis) -> None:
        self._chance = np.random.default_rng(0)
        self._store = store
        self._scores = np.full(num_samples, 1 / num_samples, np.float32)
        self._weights = self._scores.copy()
        self._counts = np.zeros(num_samples, np.uint16), np.zeros(num_samples, np.uint16)
        self._ages = np.zeros(num_samples, np.uint8), np.zeros(num_samples, np.uint8)
        self._ids = np.arange(num_samples, dtype=np.uint32)

    def seconds(self) -> float:
        """Fold, prune, shuffle, write."""
        losses = self._chance.random(len(self._ids), np.float32)
        began_s = time.perf_counter()
        ids, scores, weights = self._ids, self._scores, self._weights
        before = scores[ids]
        weights[ids] = 0.2 * before + 0.8 * losses
        scores[ids] = 0.8 * before + 0.2 * losses
        self._counts[0][ids] += 1
        num_kept = int((1 - _PRUNE_RATIO) * len(scores)) // META_BATCH_SIZE * META_BATCH_SIZE
        keys = self._chance.exponential(size=len(scores)) / weights
        kept = np.argpartition(keys, num_kept)[:num_kept].astype(np.uint32)
        self._chance.shuffle(kept)
        prior_scores = scores[kept]
        columns: list[NDArray[Any]] = [scores, weights, *self._counts, *self._ages, kept, prior_scores]
        for number, column in enumerate(columns):
            self._write(number, column)
        seconds = time.perf_counter() - began_s
        self._ids = kept
        return seconds

    def _write(self, number: int, column: NDArray[Any]) -> None:
        for first in range(0, len(column), _BLOCK_ROWS):
            self._store.set(f"plain:{number}:{first}", column[first : first + _BLOCK_ROWS].data.cast("B"))

    def multinomial_s(self) -> float:
        """`torch.multinomial` of the kept samples by their weights, in as many threads as there are cores."""
        weights = torch.from_numpy(self._weights)
        began_s = time.perf_counter()
        torch.multinomial(weights, int((1 - _PRUNE_RATIO) * len(weights)))
        return time.perf_counter() - began_s
