"""A bad network for tests: a proxy that stands between a client and its server, or between a server and its Redis."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

_CHUNK_BYTES = 2**16


class _Cut(Exception):
    """`cut` or `truncate` has struck."""


class Proxy:
    """Listens on a port of its own and passes everything on to a target, but for the faults that are switched on.

    Faults may be switched at any time and from any thread. Chance has a generator of its own: the same seed brings the
    same faults as far as the network cuts the traffic into the same chunks. If the target can't be reached, or ends a
    connection, so does the proxy.

    Args:
        target: "HOST:PORT" or "unix:/PATH".
        seed: of all chance.

    Attributes:
        target: another one counts for new connections.
        cut: probability that a chunk ends its connection, after it was passed on or before (even odds).
        truncate: probability that only the beginning of a chunk is passed on, and its connection ends.
        delay: seconds that a chunk waits at most. The chunks of a connection stay in order.
        duplicate: probability that after a chunk from a client all that it has sent on this connection is sent again,
            on another one whose answers are thrown away. With HTTP/2 and with Redis that repeats whole requests.
        refuse: whether new connections are ended at once.
        counts: how often cut, truncate, duplicate and refuse have struck.
        held: set once `hold` has met its pattern.
    """

    def __init__(self, target: str, *, seed: int = 0) -> None:
        self.target = target
        self.cut = 0.0
        self.truncate = 0.0
        self.delay = 0.0
        self.duplicate = 0.0
        self.refuse = False
        self.counts: Counter[str] = Counter()
        self.held = threading.Event()
        self._random = random.Random(seed)
        self._pattern = b""
        self._connections: set[asyncio.Task[None]] = set()
        self._is_ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._is_ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._is_closing.set)
        self._thread.join()

    @property
    def address(self) -> str:
        """Where it listens: 127.0.0.1:PORT."""
        return self._address

    def cut_all(self) -> None:
        """End all connections that are open."""
        asyncio.run_coroutine_threadsafe(self._cut_all(), self._loop).result()

    def stall(self) -> None:
        """Pass nothing on, in no direction, until `resume`. Connections stay open, and new ones are accepted."""
        self._call(self._is_flowing.clear)

    def resume(self) -> None:
        """End a stall: what came meanwhile is passed on."""
        self._call(self._is_flowing.set)

    def hold(self, pattern: bytes) -> None:
        """Where a client sends this pattern, keep the chunk that completes it and all that follows on its connection.

        Until `release`. Answers pass, and so do connections that have not sent the pattern since this call.
        """

        def arm() -> None:
            self.held.clear()
            self._pattern = pattern
            self._is_released.clear()

        self._call(arm)

    def release(self) -> None:
        """Pass on what is held, also where the client has gone meanwhile, and hold nothing from here on."""

        def disarm() -> None:
            self._pattern = b""
            self._is_released.set()

        self._call(disarm)

    def _call(self, action: Callable[[], object]) -> None:
        """Run in the proxy's thread: asyncio's events are not safe to use from others."""

        async def run() -> None:
            action()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._is_closing, self._is_flowing, self._is_released = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._is_flowing.set()
        async with asyncio.TaskGroup() as self._tasks:
            server = await asyncio.start_server(
                lambda reader, writer: self._start(self._relay(reader, writer)), "127.0.0.1", 0
            )
            self._address = "{}:{}".format(*server.sockets[0].getsockname())
            self._is_ready.set()
            await self._is_closing.wait()
            server.close()
            await self._cut_all()

    def _start(self, connection: Coroutine[Any, Any, None]) -> None:
        task = self._tasks.create_task(connection)
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _cut_all(self) -> None:
        for connection in self._connections:
            connection.cancel()
        if self._connections:
            await asyncio.wait(self._connections)

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.target.startswith("unix:"):
            return await asyncio.open_unix_connection(self.target.removeprefix("unix:"))
        host, _, port = self.target.rpartition(":")
        return await asyncio.open_connection(host, int(port))

    async def _relay(self, client_reader: asyncio.StreamReader, client_writer: asyncio.StreamWriter) -> None:
        """A client's connection, from beginning to end."""
        writers = [client_writer]
        is_cut = True
        try:
            if self.refuse:
                self._strike("refuse")
            target_reader, target_writer = await self._open()
            writers.append(target_writer)
            async with asyncio.TaskGroup() as directions:
                directions.create_task(self._pass_on(client_reader, target_writer, bytearray()))
                directions.create_task(self._pass_on(target_reader, client_writer))
            is_cut = False
        except* (OSError, _Cut):
            pass
        finally:
            for writer in writers:
                if is_cut:
                    self._abort(writer)
                else:
                    writer.close()

    async def _pass_on(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, sent: bytearray | None = None
    ) -> None:
        """One direction of a connection; `sent` keeps what passes from the client to the target."""
        while chunk := await source.read(_CHUNK_BYTES):
            if sent is not None:
                sent += chunk
                # from where a pattern may have begun that only this chunk completes
                if (
                    self._pattern
                    and sent.find(self._pattern, max(0, len(sent) - len(chunk) - len(self._pattern) + 1)) >= 0
                ):
                    self.held.set()
                    await self._is_released.wait()
            if self.delay:
                await asyncio.sleep(self._random.uniform(0, self.delay))
            await self._is_flowing.wait()
            if self._strikes(self.truncate):
                sink.write(chunk[: self._random.randrange(len(chunk))])
                self._strike("truncate")
            is_cut = self._strikes(self.cut)
            if not is_cut or self._strikes(0.5):
                sink.write(chunk)
                await sink.drain()
            if is_cut:
                self._strike("cut")
            if sent is not None and self._strikes(self.duplicate):
                self.counts["duplicate"] += 1
                self._start(self._repeat(bytes(sent)))
        await self._is_flowing.wait()
        sink.write_eof()

    def _strikes(self, probability: float) -> bool:
        return self._random.random() < probability

    def _strike(self, fault: str) -> None:
        self.counts[fault] += 1
        raise _Cut

    async def _repeat(self, sent: bytes) -> None:
        """Send it all on a connection of its own, which stays open for as long as the target likes it."""
        with suppress(OSError):
            reader, writer = await self._open()
            try:
                writer.write(sent)
                while await reader.read(_CHUNK_BYTES):
                    pass
            finally:
                self._abort(writer)

    def _abort(self, writer: asyncio.StreamWriter) -> None:
        """End one side without sending what is still in the buffers: with a RST or a FIN, at even odds."""
        if self._strikes(0.5):
            with suppress(OSError):  # closed already
                now = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
        writer.transport.abort()
