"""Whole shards of other machines in a folder of this one: bounded, and shared by all its processes."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from webdataset.cache import url_to_cache_name

from evosample.errors import DataLossError, EvosampleError, UnavailableError
from evosample.webdataset.index import Shards, is_local
from evosample.webdataset.reading import Blobs, Part, Remote, damage, read_by_position

_log = logging.getLogger("evosample")

_SHARD, _UNFINISHED = ".shard", ".part"
_WAIT_S = 0.05
_RETRY_S = 1.0
_LOG_INTERVAL_S = 30.0
_MAX_WAIT_S = 900.0


class ShardCache:
    """Reads shards out of a folder, and downloads those that are not there, each by one process at a time.

    A file is called after its shard and the checksum of the index, so that a shard that was made anew is another one.
    These files never have more than `max_bytes` in all: a download begins with an empty file of the final size, for
    which those are deleted that were used longest ago. They are open only while a batch is read, so what is deleted is
    soon gone.
    """

    def __init__(self, shards: Shards, remote: Remote, folder: Path, max_bytes: int) -> None:
        self._shards = shards
        self._remote = remote
        self._folder = folder
        self._max_bytes = max_bytes
        self._fetched_again: set[int] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, parts: Sequence[Part]) -> list[Blobs]:
        """See `Reader`."""
        return [self._read(part) for part in parts]

    def _read(self, part: Part) -> Blobs:
        try:
            with self._opened(part.shard) as descriptor:
                blobs = read_by_position(descriptor, part)
                if part.shard in self._fetched_again or not self._is_damaged(blobs, part):
                    return blobs
                self._fetched_again.add(part.shard)  # once: it may be the copy that is damaged, or the shard itself
                self._forget(part.shard, descriptor)
            with self._opened(part.shard) as descriptor:
                return read_by_position(descriptor, part)
        except DataLossError as error:
            return error

    def _is_damaged(self, blobs: list[bytes], part: Part) -> bool:
        url = self._shards.urls[part.shard]
        return any(damage(blob, sample, url) for blob, sample in zip(blobs, part.samples, strict=True))

    def _forget(self, shard: int, descriptor: int) -> None:
        """Delete the copy that is open, unless it has been replaced."""
        path = self.path(shard)
        with _lock(path), contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                path.unlink()

    def fetch(self, shard: int, *, spared: Collection[Path]) -> bool:
        """Download a shard if it isn't there; whether there was room for it without deleting what is to be spared."""
        descriptor = self._open(shard, spared)
        if descriptor is None:
            return False
        os.close(descriptor)
        return True

    def path(self, shard: int) -> Path:
        """Where a shard is when it is there."""
        name = url_to_cache_name(self._shards.urls[shard])
        return self._folder / f"{name}.{self._shards.checksums[shard]:08x}{_SHARD}"

    @contextlib.contextmanager
    def _opened(self, shard: int) -> Iterator[int]:
        patience = _Patience(f"room in {self._folder}, which unfinished downloads fill, for {self._shards.urls[shard]}")
        while (descriptor := self._open(shard, ())) is None:
            time.sleep(_WAIT_S)  # for the downloads of others, which take all the room: what they bring can be deleted
            patience.check()
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _open(self, shard: int, spared: Collection[Path]) -> int | None:
        """A descriptor of a shard that is there, or was brought; None if there is no room."""
        path = self.path(shard)
        if (descriptor := _open_used(path)) is not None:
            return descriptor
        with self._download_lock(shard):
            if (descriptor := _open_used(path)) is not None:  # another process has brought it meanwhile
                return descriptor
            unfinished = path.with_suffix(_UNFINISHED)
            shard_bytes = int(self._shards.shard_bytes[shard])
            if not self._make_room(unfinished, shard_bytes, spared):
                return None
            try:
                with unfinished.open("r+b") as file:
                    self._remote.download(self._shards.urls[shard], file, shard_bytes)
                descriptor = os.open(unfinished, os.O_RDONLY | os.O_CLOEXEC)  # before others may delete it
                with self._space():
                    unfinished.rename(path)
            finally:
                unfinished.unlink(missing_ok=True)
            return descriptor

    @contextlib.contextmanager
    def _download_lock(self, shard: int) -> Iterator[None]:
        """Held by the one process that brings a shard; others wait for it."""
        lock = _lock(self.path(shard), timeout_s=_LOG_INTERVAL_S)
        patience = _Patience(
            f"another process to download {self._shards.urls[shard]}, the one that holds {lock.lock_file}"
        )
        while True:
            try:
                lock.acquire()
                break
            except Timeout:
                patience.check()
        try:
            yield
        finally:
            lock.release()

    def _space(self) -> FileLock:
        """Held while files are counted, and while they change."""
        return _lock(self._folder / "space")

    def _make_room(self, unfinished: Path, num_bytes: int, spared: Collection[Path]) -> bool:
        with self._space():
            unfinished.unlink(missing_ok=True)  # of a process that was killed
            files = self._files()
            excess = sum(stat.st_size for stat in files.values()) + num_bytes - self._max_bytes
            evicted = []
            for path in sorted(files, key=lambda path: files[path].st_mtime_ns):
                if excess > 0 and path.suffix == _SHARD and path not in spared:
                    evicted.append(path)
                    excess -= files[path].st_size
            if excess > 0:
                return False
            for path in evicted:
                path.unlink(missing_ok=True)
            with unfinished.open("wb") as file:
                file.truncate(num_bytes)
            return True

    def _files(self) -> dict[Path, os.stat_result]:
        """All shards and downloads; what killed processes have left of theirs is deleted."""
        files = {}
        for path in self._folder.iterdir():
            if path.suffix == _UNFINISHED:
                with contextlib.suppress(Timeout), _lock(path, timeout_s=0):
                    path.unlink(missing_ok=True)
            if path.suffix in (_SHARD, _UNFINISHED):
                with contextlib.suppress(FileNotFoundError):
                    files[path] = path.stat()
        return files


class _Patience:
    """A bound for a wait, which says now and then what is waited for."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._began_s = self._logged_s = time.monotonic()

    def check(self) -> None:
        """Raises UnavailableError once it is over."""
        now_s = time.monotonic()
        waited_s = now_s - self._began_s
        if waited_s > _MAX_WAIT_S:
            raise UnavailableError(
                f"waited for {waited_s:.0f} s for {self._what}. Is a job stuck, or cache_bytes too small for so many?"
            )
        if now_s - self._logged_s >= _LOG_INTERVAL_S:
            self._logged_s = now_s
            _log.warning("waiting since %.0f s for %s", waited_s, self._what)


def _lock(path: Path, *, timeout_s: float = -1) -> FileLock:
    return FileLock(path.with_suffix(".lock"), timeout=timeout_s)


def _open_used(path: Path) -> int | None:
    """Open a file, and note in its time that it was used; None if it isn't there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    os.utime(descriptor)
    return descriptor


class Prefetch:
    """Downloads shards in the background, in the order in which their samples will be needed.

    The shards of samples that were announced are deleted for no others until a quarter more than `num_ahead` further
    samples were announced: workers are still to load some of what has left that window.
    """

    def __init__(self, cache: ShardCache, shards: Shards) -> None:
        self._cache = cache
        self._shards = shards
        self._announced: queue.SimpleQueue[tuple[NDArray[np.int64], int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="evosample-prefetch", daemon=True)
        self._thread.start()

    def announce(self, sample_ids: NDArray[np.int64], num_ahead: int) -> None:
        """Say what will be needed, int64 [k] in this order, after all that was announced before."""
        self._announced.put((sample_ids, num_ahead))

    def close(self) -> None:
        """End the thread, after the download that it is at."""
        self._announced.put(None)

    def _run(self) -> None:
        num_announced = num_ahead = 0
        needed_until = np.full(len(self._shards.urls), -1)
        to_fetch: dict[int, None] = {}  # in this order
        has_room = True
        while True:
            wait_s = None if not to_fetch else 0.0 if has_room else _RETRY_S
            sample_ids = np.empty(0, np.int64)
            with contextlib.suppress(queue.Empty):
                announced = self._announced.get(timeout=wait_s)
                if announced is None:
                    return
                sample_ids, num_ahead = announced
            shards = self._shards.shards_of(sample_ids)
            needed_until[shards] = num_announced + np.arange(len(shards)) + num_ahead + num_ahead // 4
            num_announced += len(shards)
            to_fetch |= dict.fromkeys(shard for shard in shards.tolist() if not is_local(self._shards.urls[shard]))
            if not to_fetch:
                continue
            shard = next(iter(to_fetch))
            spared = {self._cache.path(int(each)) for each in np.flatnonzero(needed_until >= num_announced)}
            try:
                has_room = self._cache.fetch(shard, spared=spared)
            except (EvosampleError, OSError) as error:
                _log.warning("prefetching %s failed, it is read when it is needed: %s", self._shards.urls[shard], error)
                has_room = True
            if has_room:
                del to_fetch[shard]
