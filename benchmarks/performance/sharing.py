"""Many at once: the ranks of one experiment, and many experiments."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from performance.ranks import Rank, serving, spec_of
from performance.rows import Row, alternate

_M = 1e6
_STREAMS = 3  # one after the other, as epoch follows epoch


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
            yield from _crowd(name, num_samples, crowd, alone, num_repeats)


def _crowd(name: str, num_samples: int, crowd: Sequence[Rank], alone: Rank, num_repeats: int) -> Iterator[Row]:
    slowest: list[float] = []
    with ThreadPoolExecutor(len(crowd)) as pool:
        together, by_itself = alternate(num_repeats, lambda: _together(pool, crowd, slowest), lambda: _rate(alone))
    yield Row(
        f"{name} at once, {num_samples:,} samples, ids and prior scores together",
        [rate / _M for rate in together],
        "M samples/s",
        compared_with="one client alone",
        compared=[rate / _M for rate in by_itself],
        ratio_target=0.8,
    )
    yield Row(f"{name} at once, {num_samples:,} samples: the slowest one's rate, of the mean", slowest[1:], "", 0.5)


def _together(pool: ThreadPoolExecutor, crowd: Sequence[Rank], slowest: list[float]) -> float:
    """Samples a second of all; notes the slowest one's share of the mean."""
    began_s = time.perf_counter()
    found = list(pool.map(_streamed, crowd))
    seconds = time.perf_counter() - began_s
    rates = [num_samples / took_s for num_samples, took_s in found]
    slowest.append(min(rates) / (sum(rates) / len(rates)))
    return sum(num_samples for num_samples, _ in found) / seconds


def _streamed(rank: Rank) -> tuple[int, float]:
    """Samples that came in several streams, and the seconds that they took."""
    began_s = time.perf_counter()
    return sum(len(ids) for _ in range(_STREAMS) for ids in rank.stream()), time.perf_counter() - began_s


def _rate(rank: Rank) -> float:
    num_samples, seconds = _streamed(rank)
    return num_samples / seconds
