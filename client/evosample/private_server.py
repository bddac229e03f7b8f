"""A server of one's own: a child process on a unix socket that ends with its parent."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import weakref
from pathlib import Path

from evosample.errors import UnavailableError

_STOP_TIMEOUT_S = 40.0


class PrivateServer:
    """A running server that only this user can reach.

    Args:
        data_dir: where it keeps its data. Default: a temporary folder, removed when the server is closed.

    Raises:
        UnavailableError: it does not start; with what it had to say.
    """

    def __init__(self, data_dir: str | os.PathLike[str] | None = None) -> None:
        folder = Path(tempfile.mkdtemp(prefix="evosample-"))  # mode 0700
        if len(str(folder)) > 90:  # a unix socket's path has at most 107 bytes
            folder.rmdir()
            folder = Path(tempfile.mkdtemp(prefix="evosample-", dir="/tmp"))
        self.address = f"unix:{folder}/server.sock"
        self._log_path = folder / "server.log"
        # -P: a folder of this name in the working directory is not the package
        self._command = [sys.executable, "-P", "-m", "evosample_server", "--listen", self.address]
        self._command += ["--data-dir", str(data_dir or folder / "data"), "--parent-pid", str(os.getpid())]
        self._command += ["--log-level", "warning"]
        self._starting = threading.Lock()
        self._processes: list[subprocess.Popen[bytes]] = []  # those that have ended, and the one that runs
        self._close = weakref.finalize(self, _stop, self._processes, folder, os.getpid())
        self.keep_running()

    def keep_running(self) -> None:
        """Start the server, if it does not run, with the data that an earlier one has left."""
        with self._starting:
            if self.is_running:
                return
            environment = {name: value for name, value in os.environ.items() if not name.startswith("EVOSAMPLE_")}
            with self._log_path.open("wb") as log:
                process = subprocess.Popen(  # noqa: S603  # our own interpreter and arguments
                    self._command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C reaches the training job, which then still has a server
                )
            self._processes.append(process)
            assert process.stdout is not None
            with process.stdout as output:
                ready = output.readline()
            if not ready:
                process.wait()
                said = self._said()
                self.close()
                raise UnavailableError(f"the private server could not start: {said}")

    @property
    def is_running(self) -> bool:
        """Whether the child lives."""
        return bool(self._processes) and self._processes[-1].poll() is None

    def _said(self) -> str:
        """How a server that has ended explains itself: the end of its log, or its exit code."""
        log = self._log_path.read_text(errors="replace").strip() if self._log_path.exists() else ""
        return log[-1000:] or f"exit code {self._processes[-1].returncode}"

    def close(self) -> None:
        """Stop the server; repeating it does nothing. Also done when the interpreter ends."""
        self._close()


def _stop(processes: list[subprocess.Popen[bytes]], folder: Path, parent_pid: int) -> None:
    if os.getpid() != parent_pid:  # a forked worker ends: the server is not its own
        return
    for process in processes:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    shutil.rmtree(folder, ignore_errors=True)
