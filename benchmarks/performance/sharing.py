"""Many at once: the ranks of one experiment, and many experiments."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from performance.ranks import Rank, serving, spec_of, streamed_per_s
from performance.rows import Row, alternate

_M = 1e6


def sharing(num_samples: int, num_repeats: int) -> Iterator[Row]:
    """What all get together against what one gets alone, and what the slowest gets of it."""
    with serving() as server, ExitStack() as stack:

        def rank(name: str, size: int, number: int = 0, world_size: int = 1) -> Rank:
            each = Rank(server.address, name, spec_of(size), rank=number, world_size=world_size)
            return stack.enter_context(each)

        alone = rank("alone", num_samples)
        crowds = {
            "64 ranks of one experiment": [rank("ranks", num_samples, number, 64) for number in range(64)],
            "50 experiments": [rank(f"experiment-{number}", num_samples // 50) for number in range(50)],
        }
        for name, crowd in crowds.items():
            yield from _crowd(name, crowd, alone, num_repeats)


def _crowd(name: str, crowd: Sequence[Rank], alone: Rank, num_repeats: int) -> Iterator[Row]:
    slowest: list[float] = []
    with ThreadPoolExecutor(len(crowd)) as pool:
        together, by_itself = alternate(
            num_repeats, lambda: _together(pool, crowd, slowest), lambda: streamed_per_s(alone)
        )
    yield Row(
        f"{name} at once, ids and prior scores together",
        [rate / _M for rate in together],
        "M samples/s",
        compared_with="one client alone",
        compared=[rate / _M for rate in by_itself],
        ratio_target=0.8,
    )
    yield Row(f"{name} at once: the slowest one's rate, of the mean", slowest[1:], "", 0.5)


def _together(pool: ThreadPoolExecutor, crowd: Sequence[Rank], slowest: list[float]) -> float:
    """Samples a second of all; notes the slowest one's share of the mean."""
    began_s = time.perf_counter()
    counts = list(pool.map(lambda rank: sum(len(ids) for ids in rank.stream()), crowd))
    seconds = time.perf_counter() - began_s
    rates = list(pool.map(streamed_per_s, crowd))
    slowest.append(min(rates) / (sum(rates) / len(rates)))
    return sum(counts) / seconds
