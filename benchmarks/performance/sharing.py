"""Many at once: the ranks of one experiment, and many experiments."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack

import grpc
from performance.ranks import Rank, serving, spec_of
from performance.raw import LIMITS, MESSAGE_SAMPLES, raw_server, stream_over
from performance.rows import Row, alternate

_M = 1e6
_STREAMS = 3  # one after the other, as epoch follows epoch

_Stream = Callable[[], AsyncIterator[int]]  # samples, message by message


def sharing(num_samples: int, num_repeats: int) -> Iterator[Row]:
    """What all get together against what one gets alone, and what the slowest gets of it."""
    with asyncio.Runner() as loop, serving() as server, raw_server() as raw_address, ExitStack() as stack:

        async def channel(address: str) -> grpc.aio.Channel:
            return grpc.aio.insecure_channel(address, LIMITS)

        def connected(address: str) -> grpc.aio.Channel:
            """Of the event loop that all share: so many threads would take Python's lock in turns."""
            opened = loop.run(channel(address))
            stack.callback(lambda: loop.run(opened.close()))
            return opened

        def stream(name: str, size: int, number: int = 0, world_size: int = 1) -> _Stream:
            rank = stack.enter_context(Rank(server.address, name, spec_of(size), rank=number, world_size=world_size))
            own = connected(server.address)
            return lambda: rank.stream_over(own)

        def raw(size: int) -> _Stream:
            own = connected(raw_address)
            return lambda: stream_over(own, size, MESSAGE_SAMPLES)

        alone, raw_alone = stream("alone", num_samples), raw(num_samples)
        crowds = {
            "64 ranks of one experiment": [stream("ranks", num_samples, number, 64) for number in range(64)],
            "50 experiments": [stream(f"experiment-{number}", num_samples // 50) for number in range(50)],
        }
        for name, crowd in crowds.items():
            raws = [raw(num_samples // len(crowd)) for _ in crowd]
            yield from _crowd(name, num_samples, loop, (crowd, [alone], raws, [raw_alone]), num_repeats)


def _crowd(
    name: str, num_samples: int, loop: asyncio.Runner, all_streams: Sequence[Sequence[_Stream]], num_repeats: int
) -> Iterator[Row]:
    slowest: list[float] = []

    def rate_of(streams: Sequence[_Stream]) -> float:
        rate, share = loop.run(_together(streams))
        if streams is all_streams[0]:
            slowest.append(share)
        return rate / _M

    together, alone, raws, raw_alone = alternate(num_repeats, *(lambda s=s: rate_of(s) for s in all_streams))
    name = f"{name} at once, {num_samples:,} samples"
    yield Row(
        f"{name}, ids and prior scores together",
        together,
        "M samples/s",
        compared_with="one client alone",
        compared=alone,
        ratio_target=0.8,
    )
    yield Row(f"{name}: the slowest one's rate, of the mean", slowest[1:], "", 0.5)
    yield Row(
        f"as many raw gRPC streams as {name}",
        raws,
        "M samples/s",
        compared_with="one raw gRPC stream alone",
        compared=raw_alone,
    )


async def _together(streams: Sequence[_Stream]) -> tuple[float, float]:
    """Samples a second of all, and the slowest one's rate as a share of the mean."""
    began_s = time.perf_counter()
    found = await asyncio.gather(*map(_streamed, streams))
    seconds = time.perf_counter() - began_s
    rates = [num_samples / took_s for num_samples, took_s in found]
    return sum(num_samples for num_samples, _ in found) / seconds, min(rates) * len(rates) / sum(rates)


async def _streamed(stream: _Stream) -> tuple[int, float]:
    """Samples that came in several streams, and the seconds that they took."""
    began_s, num_samples = time.perf_counter(), 0
    for _ in range(_STREAMS):
        async for num_received in stream():
            num_samples += num_received
    return num_samples, time.perf_counter() - began_s
