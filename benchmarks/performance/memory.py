"""What an experiment takes of the store's memory, and of the server's."""

from __future__ import annotations

from collections.abc import Iterator

import redis
from memory import server_bytes, used_bytes
from performance.ranks import Rank, serving, spec_of
from performance.rows import Row

_GIB = 2**30


def memory(num_samples: int, prune_ratio: float) -> Iterator[Row]:
    """After two turns: two epochs are retained, and the store has seen its most."""
    with serving() as server, redis.Redis(unix_socket_path=server.store_socket) as store:
        empty_bytes = used_bytes(store)
        with Rank(server.address, "memory", spec_of(num_samples, prune_ratio=prune_ratio)) as rank:
            for epoch in range(3):
                rank.turn_s(epoch)
            committed_bytes = used_bytes(store) - empty_bytes
            peak_bytes = int(store.info("memory")["used_memory_peak"]) - empty_bytes
            most_bytes = server_bytes(server, "VmHWM")
    name = f"store: used_memory a sample, {num_samples:,} samples, r = {prune_ratio:g}"
    yield Row(f"{name}: two epochs retained", [committed_bytes / num_samples], "bytes", 44, higher_is_better=False)
    yield Row(f"{name}: in a turn", [peak_bytes / num_samples], "bytes", 72, higher_is_better=False)
    yield Row(
        f"server: resident memory at the most, {num_samples:,} samples, r = {prune_ratio:g}",
        [most_bytes / _GIB],
        "GiB",
        4,
        higher_is_better=False,
    )
