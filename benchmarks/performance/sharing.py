"""Many at once: the ranks of one experiment, and many experiments."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import grpc
from performance.ranks import Rank, serving, spec_of
from performance.rows import Row, alternate

_M = 1e6
_STREAMS = 3  # one after the other, as epoch follows epoch

_Connected = tuple[Rank, grpc.aio.Channel]


def sharing(num_samples: int, num_repeats: int) -> Iterator[Row]:
    """What all get together against what one gets alone, and what the slowest gets of it."""
    with asyncio.Runner() as loop, serving() as server, ExitStack() as stack:

        def rank(name: str, size: int, number: int = 0, world_size: int = 1) -> _Connected:
            each = stack.enter_context(Rank(server.address, name, spec_of(size), rank=number, world_size=world_size))
            channel = loop.run(each.connection())
            stack.callback(lambda: loop.run(channel.close()))
            return each, channel

        alone = rank("alone", num_samples)
        crowds = {
            "64 ranks of one experiment": [rank("ranks", num_samples, number, 64) for number in range(64)],
            "50 experiments": [rank(f"experiment-{number}", num_samples // 50) for number in range(50)],
        }
        for name, crowd in crowds.items():
            yield from _crowd(name, num_samples, loop, crowd, alone, num_repeats)


def _crowd(
    name: str,
    num_samples: int,
    loop: asyncio.Runner,
    crowd: Sequence[_Connected],
    alone: _Connected,
    num_repeats: int,
) -> Iterator[Row]:
    slowest: list[float] = []

    def together() -> float:
        rate, share = loop.run(_together(crowd))
        slowest.append(share)
        return rate

    all_rates, single_rates = alternate(num_repeats, together, lambda: loop.run(_together([alone]))[0])
    yield Row(
        f"{name} at once, {num_samples:,} samples, ids and prior scores together",
        [rate / _M for rate in all_rates],
        "M samples/s",
        compared_with="one client alone",
        compared=[rate / _M for rate in single_rates],
        ratio_target=0.8,
    )
    yield Row(f"{name} at once, {num_samples:,} samples: the slowest one's rate, of the mean", slowest[1:], "", 0.5)


async def _together(crowd: Sequence[_Connected]) -> tuple[float, float]:
    """Samples a second of all, and the slowest one's rate as a share of the mean."""
    began_s = time.perf_counter()
    found = await asyncio.gather(*(_streamed(rank, channel) for rank, channel in crowd))
    seconds = time.perf_counter() - began_s
    rates = [num_samples / took_s for num_samples, took_s in found]
    return sum(num_samples for num_samples, _ in found) / seconds, min(rates) * len(rates) / sum(rates)


async def _streamed(rank: Rank, channel: grpc.aio.Channel) -> tuple[int, float]:
    """Samples that came in several streams, and the seconds that they took."""
    began_s, num_samples = time.perf_counter(), 0
    for _ in range(_STREAMS):
        async for ids in rank.stream_over(channel):
            num_samples += len(ids)
    return num_samples, time.perf_counter() - began_s
