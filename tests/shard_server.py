"""An HTTP server of shards, over real sockets, that fails as it is told: `python tests/shard_server.py FOLDER`."""

from __future__ import annotations

import argparse
import json
import random
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self


class ShardServer(ThreadingHTTPServer):
    """Serves the files of a folder, whole or by Range requests, and counts.

    Attributes:
        failure_rate: share of requests that are answered 503, or cut in the middle.
        ignores_ranges: answers 200 with the whole file, whatever was asked for.
        status: what every request is answered with, if it is set.
        token: what requests must bring in a header Authorization, if it is set.
        requests: the path and the Range of each request, in the order of their arrival.
        num_bytes: sent in bodies.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, *, failure_rate: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.failure_rate = failure_rate
        self.ignores_ranges = False
        self.status = 0
        self.token = ""
        self.requests: list[tuple[str, str]] = []
        self.num_bytes = 0
        self.counting = threading.Lock()
        self.random = random.Random(0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ShardServer

    def do_GET(self) -> None:
        server = self.server
        if self.path == "/counts":
            return self._answer(200, json.dumps({"requests": len(server.requests), "bytes": server.num_bytes}).encode())
        with server.counting:
            server.requests.append((self.path, self.headers.get("Range", "")))
            fails, is_cut = server.random.random() < server.failure_rate, server.random.random() < 0.5
        file = server.folder / self.path.lstrip("/")
        if server.token and self.headers.get("Authorization") != f"Bearer {server.token}":
            return self._answer(401, b"")
        if server.status or not file.is_file():
            return self._answer(server.status or 404, b"")
        if fails and not is_cut:
            return self._answer(503, b"")
        size = file.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, stop = 0, size
        if asked and not server.ignores_ranges:
            first, stop = int(asked[1]), min(int(asked[2] or size - 1) + 1, size)
            if first >= size:
                return self._answer(416, b"")
        self.send_response(206 if asked and not server.ignores_ranges else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - first))
        self.end_headers()
        num_sent = (stop - first) // 2 if fails else stop - first
        with server.counting:
            server.num_bytes += num_sent
        with file.open("rb") as content:
            self.wfile.flush()
            self.connection.sendfile(content, first, num_sent)
        self.close_connection = fails
        return None

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Not to the terminal."""


def main() -> None:
    """Serve until killed; the first line of the output is the URL."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--failure-rate", type=float, default=0.0)
    options = arguments.parse_args()
    with ShardServer(options.folder, failure_rate=options.failure_rate) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
