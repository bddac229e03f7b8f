"""What gRPC itself can do: a server that streams bytes and takes bytes, and knows nothing of samples."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np

_BYTES_A_SAMPLE = 8
LIMITS = [("grpc.max_receive_message_length", 2**26), ("grpc.use_local_subchannel_pool", 1)]
MESSAGE_SAMPLES = 2**16  # about as in a message of ours


async def _serve() -> None:
    async def stream(request: bytes, _: Any) -> AsyncIterator[bytes]:
        num_messages, message_bytes = map(int, request.split())
        message = bytes(message_bytes)
        for _ in range(num_messages):
            yield message

    async def take(_request: bytes, _: Any) -> bytes:
        return b""

    handlers: dict[str, Any] = {
        "Stream": grpc.unary_stream_rpc_method_handler(stream),
        "Take": grpc.unary_unary_rpc_method_handler(take),
    }
    server = grpc.aio.server(options=LIMITS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("raw", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


@contextlib.contextmanager
def raw_server() -> Iterator[str]:
    """The address of one in a process of its own."""
    process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield f"127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


def stream(channel: grpc.Channel, num_samples: int, samples_a_message: int) -> float:
    """Samples a second, as ids and prior scores that become numpy arrays."""
    call: Any = channel.unary_stream("/raw/Stream")
    began_s = time.perf_counter()
    num_received = sum(map(_num_samples, call(_request(num_samples, samples_a_message))))
    return num_received / (time.perf_counter() - began_s)


async def stream_over(channel: grpc.aio.Channel, num_samples: int, samples_a_message: int) -> AsyncIterator[int]:
    """Samples of each message, over a connection of an event loop."""
    call: Any = channel.unary_stream("/raw/Stream")
    async for message in call(_request(num_samples, samples_a_message)):
        yield _num_samples(message)


def _request(num_samples: int, samples_a_message: int) -> bytes:
    return f"{num_samples // samples_a_message} {samples_a_message * _BYTES_A_SAMPLE}".encode()


def _num_samples(message: bytes) -> int:
    ids, scores = np.split(np.frombuffer(message, np.uint32), 2)
    assert len(ids) == len(scores)
    return len(ids)


if __name__ == "__main__":
    asyncio.run(_serve())
