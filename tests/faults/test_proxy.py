"""The bad network itself: each fault does what it says, and nothing else does."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from faults.proxy import Proxy


class Echo:
    """A server that answers with what it gets, and remembers it."""

    def __init__(self, server: type[socketserver.TCPServer], address: Any) -> None:
        self.received: list[bytearray] = []
        received = self.received

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                mine = bytearray()
                received.append(mine)
                try:
                    while data := self.request.recv(2**16):
                        mine.extend(data)
                        self.request.sendall(data)
                except ConnectionError:
                    pass

        self.server = server(address, Handler)
        self.address = address if isinstance(address, str) else "{}:{}".format(*self.server.socket.getsockname())
        self.thread = threading.Thread(target=lambda: self.server.serve_forever(0.01))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


class TcpServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 100  # with 5, connections that come all at once wait for the repetition of a SYN


class UnixServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo(TcpServer, ("127.0.0.1", 0))
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(echo.address) as between:
        yield between


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


@pytest.fixture
def dial(proxy: Proxy) -> Iterator[Callable[[], socket.socket]]:
    """Opens connections to the proxy, whose reads are bounded."""
    opened: list[socket.socket] = []

    def connected() -> socket.socket:
        opened.append(connect(proxy.address))
        return opened[-1]

    yield connected
    for client in opened:
        client.close()


def read(client: socket.socket, num_bytes: int) -> bytes:
    """So many bytes, or fewer if the connection ends before."""
    data = b""
    try:
        while len(data) < num_bytes and (more := client.recv(num_bytes - len(data))):
            data += more
    except ConnectionError:
        pass
    return data


def ends_at_once(dial: Callable[[], socket.socket]) -> bool:
    """Whether a new connection can't be made, or ends before anything comes."""
    try:
        with dial() as client:
            return client.recv(1) == b""
    except ConnectionResetError:
        return True


def is_quiet(client: socket.socket) -> bool:
    """Whether nothing comes for a moment, neither data nor an end."""
    client.settimeout(0.1)
    try:
        client.recv(1)
    except TimeoutError:
        return True
    except ConnectionError:
        return False
    finally:
        client.settimeout(10)
    return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.005)


def test_without_faults_everything_passes_in_both_directions(
    echo: Echo, proxy: Proxy, dial: Callable[[], socket.socket]
) -> None:
    client = dial()
    data = bytes(range(256)) * 4096
    sender = threading.Thread(target=client.sendall, args=[data])
    sender.start()
    assert read(client, len(data)) == data
    sender.join()
    client.shutdown(socket.SHUT_WR)
    assert read(client, 1) == b""
    assert echo.received == [data]
    assert not proxy.counts


def test_a_unix_socket_may_be_the_target(tmp_path: Path) -> None:
    server = Echo(UnixServer, str(tmp_path / "socket"))
    with Proxy(f"unix:{server.address}") as proxy, connect(proxy.address) as client:
        client.sendall(b"hello")
        assert read(client, 5) == b"hello"
    server.close()


def test_a_target_that_is_away_ends_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = "{}:{}".format(*free.getsockname())
    with Proxy(address) as proxy:
        assert ends_at_once(lambda: connect(proxy.address))


def test_cutting_ends_every_connection_and_later_ones_work(proxy: Proxy, dial: Callable[[], socket.socket]) -> None:
    clients = [dial() for _ in range(20)]
    for client in clients:
        client.sendall(b"hello")
        assert read(client, 5) == b"hello"
    proxy.cut_all()
    ends = set()
    for client in clients:
        try:
            ends.add(client.recv(1))
        except ConnectionResetError:
            ends.add(b"reset")
    assert ends == {b"", b"reset"}, "some end with a FIN, some with a RST"
    client = dial()
    client.sendall(b"hello")
    assert read(client, 5) == b"hello"


def test_chance_cuts_before_and_after_a_chunk_was_passed_on(
    echo: Echo, proxy: Proxy, dial: Callable[[], socket.socket]
) -> None:
    proxy.cut = 1.0
    for _ in range(30):
        client = dial()
        client.sendall(b"hello")
        assert read(client, 5) == b""
    assert proxy.counts == {"cut": 30}
    wait_until(lambda: len(echo.received) == 30)
    assert {bytes(received) for received in echo.received} == {b"", b"hello"}


def test_a_truncated_chunk_arrives_in_part(echo: Echo, proxy: Proxy, dial: Callable[[], socket.socket]) -> None:
    client = dial()
    client.sendall(b"whole")
    assert read(client, 5) == b"whole"
    proxy.truncate = 1.0
    client.sendall(b"0123456789" * 100)
    assert read(client, 1) == b""
    (received,) = echo.received
    wait_until(lambda: len(received) > len(b"whole"))
    assert (b"whole" + b"0123456789" * 100).startswith(received)
    assert len(received) < 1005
    assert proxy.counts["truncate"] == 1


def test_delayed_chunks_arrive_in_order(proxy: Proxy, dial: Callable[[], socket.socket]) -> None:
    client = dial()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    proxy.delay = 0.02
    pieces = [bytes([i]) * 10 for i in range(50)]
    for piece in pieces:
        client.sendall(piece)
        time.sleep(0.001)
    assert read(client, 500) == b"".join(pieces)


def test_a_duplicate_repeats_all_that_was_sent_and_its_answers_are_thrown_away(
    echo: Echo, proxy: Proxy, dial: Callable[[], socket.socket]
) -> None:
    client = dial()
    client.sendall(b"one ")
    assert read(client, 4) == b"one "
    proxy.duplicate = 1.0
    client.sendall(b"two")
    assert read(client, 3) == b"two"
    wait_until(lambda: echo.received == [b"one two"] * 2)
    assert is_quiet(client)
    proxy.cut_all()
    assert proxy.counts == {"duplicate": 1}


def test_a_duplicate_of_http2_repeats_whole_requests() -> None:
    served: list[bytes] = []

    def serve(request: bytes, _: Any) -> bytes:
        served.append(request)
        return b"answer"

    method: Any = grpc.unary_unary_rpc_method_handler(serve)
    server = grpc.server(ThreadPoolExecutor())
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("service", {"Method": method})])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with Proxy(f"127.0.0.1:{port}") as proxy, grpc.insecure_channel(proxy.address) as channel:
        call: Any = channel.unary_unary("/service/Method")
        assert call(b"one") == b"answer"
        proxy.duplicate = 1.0
        assert call(b"two") == b"answer"
        wait_until(lambda: served.count(b"one") >= 2 and served.count(b"two") >= 2)
    server.stop(0).wait()


def test_refused_connections_end_at_once_and_open_ones_stay(
    echo: Echo, proxy: Proxy, dial: Callable[[], socket.socket]
) -> None:
    before = dial()
    before.sendall(b"hello")
    assert read(before, 5) == b"hello"
    proxy.refuse = True
    assert ends_at_once(dial)
    before.sendall(b"again")
    assert read(before, 5) == b"again"
    assert len(echo.received) == 1
    proxy.refuse = False
    after = dial()
    after.sendall(b"hello")
    assert read(after, 5) == b"hello"


def test_a_stall_passes_nothing_and_loses_nothing(echo: Echo, proxy: Proxy, dial: Callable[[], socket.socket]) -> None:
    client = dial()
    proxy.stall()
    other = dial()
    client.sendall(b"hello")
    other.sendall(b"world")
    other.shutdown(socket.SHUT_WR)
    assert is_quiet(client)
    assert is_quiet(other)
    assert b"".join(echo.received) == b""
    proxy.resume()
    assert read(client, 5) == b"hello"
    assert read(other, 6) == b"world"


@pytest.mark.parametrize("cuts", [[0, 3], [2, 4], [4, 5, 6], [9]])
def test_a_held_pattern_stops_its_connection_there_and_no_other(
    echo: Echo, proxy: Proxy, dial: Callable[[], socket.socket], cuts: list[int]
) -> None:
    client, other = dial(), dial()
    proxy.hold(b"needle")
    client.sendall(b"hay ")
    assert read(client, 4) == b"hay "
    pieces = [b"needle..."[begin:end] for begin, end in zip([0, *cuts], [*cuts, None], strict=True)]
    for piece in pieces[:-1]:  # a piece at a time: each is a chunk of its own, as its echo tells
        client.sendall(piece)
        if not proxy.held.is_set():
            wait_until(lambda: proxy.held.is_set() or b"".join(echo.received).endswith(piece))  # noqa: B023
    client.sendall(pieces[-1])
    assert proxy.held.wait(10)
    client.sendall(b" more")
    other.sendall(b"other")
    assert read(other, 5) == b"other"
    assert b"needle" not in b"".join(echo.received)
    proxy.release()
    assert read(client, 14) == b"needle... more"
    client.sendall(b"needle")
    assert read(client, 6) == b"needle"


def test_what_is_held_arrives_although_its_sender_has_gone(
    echo: Echo, proxy: Proxy, dial: Callable[[], socket.socket]
) -> None:
    client = dial()
    proxy.hold(b"needle")
    client.sendall(b"a needle")
    assert proxy.held.wait(10)
    client.close()
    proxy.release()
    wait_until(lambda: echo.received == [b"a needle"])


def test_a_pattern_is_met_once_for_every_hold(proxy: Proxy, dial: Callable[[], socket.socket]) -> None:
    client = dial()
    for _ in range(3):
        proxy.hold(b"needle")
        assert not proxy.held.is_set()
        client.sendall(b"needle")
        assert proxy.held.wait(10)
        proxy.release()
        assert read(client, 6) == b"needle"
