"""Where each sample lies: one pass over a shard makes its index, the indexes of all shards map sample ids."""

from __future__ import annotations

import os
import shlex
import tarfile
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
import urllib3
from numpy.typing import NDArray
from urllib3.exceptions import HTTPError
from webdataset import gopen
from webdataset.cache import url_to_cache_name
from webdataset.shardlists import expand_urls

from evosample.errors import (
    DataLossError,
    EvosampleError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from evosample.webdataset.tar import BLOCK_BYTES, key_and_extension

Urls = str | Sequence[str | os.PathLike[str]]

_FIELDS = ("key", "offset", "size", "crc32")
_MAX_OPEN_INDEXES = 256


class IndexedShard(NamedTuple):
    """What `index_shards` did with a shard.

    Attributes:
        url: of the shard.
        path: of its index.
        num_samples: in the shard.
        outcome: "made"; "kept", for the index was there and fits; or "mended", for it was there, but damaged.
    """

    url: str
    path: Path
    num_samples: int
    outcome: Literal["made", "kept", "mended"]


RETRIES = urllib3.Retry(
    8, backoff_factor=0.2, backoff_max=20, backoff_jitter=0.2, status_forcelist=(429, 500, 502, 503, 504)
)
"""What of HTTP is tried again, and when, unless something else is asked for."""


def index_shards(
    urls: Urls,
    output_dir: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
    headers: Mapping[str, str] | None = None,
    on_shard: Callable[[IndexedShard], None] = lambda _: None,
) -> list[IndexedShard]:
    """Write the index of each shard, in one pass over it; shards may come through pipes.

    An index is a structured `.npy` array. Each of its rows is a sample, in the order of the shard: `key` (bytes,
    UTF-8), `offset` and `size` of the range of its members with their headers, in bytes, and the `crc32` of that range.
    A last row without key holds the size of the shard as its offset, and the crc32 of all rows before it.

    Args:
        urls: a pattern such as "train-{000..029}.tar", or a list of shards: paths, http(s) and `pipe:` URLs, and
            whatever else `webdataset.gopen` opens.
        output_dir: where `<name of the shard>.idx.npy` goes; made if need be. Default: beside the shard.
        force: whether to make indexes anew that are there and fit. The index of a remote shard fits as long as it is
            undamaged: the shard is not looked at.
        headers: sent to HTTP servers, such as {"Authorization": "Bearer ..."}.
        on_shard: called after each shard.

    Raises:
        InvalidArgumentError: no shards; a remote one without `output_dir`; two whose indexes would have one name.
        DataLossError: a shard is missing, truncated, damaged or compressed, holds no samples, or one twice.
        UnavailableError: an HTTP server does not answer, or breaks off; begin again, what was indexed is kept.
    """
    indexed = []
    for url, path in _with_index_paths(urls, output_dir, "output_dir"):
        outcome: Literal["made", "kept", "mended"] = "made"
        try:
            rows = load_index(path, url)
            is_kept = not force and (not is_local(url) or _is_up_to_date(path, rows, local_path(url)))
        except FailedPreconditionError:  # there is none
            is_kept = False
        except DataLossError:
            is_kept, outcome = False, "mended"
        if is_kept:
            outcome = "kept"
        else:
            rows = _scanned(url, headers or {})
            try:
                _write(path, rows)
            except OSError as error:
                raise EvosampleError(f"can't write {path}: {error.strerror}") from error
        indexed.append(IndexedShard(url, path, len(rows) - 1, outcome))
        on_shard(indexed[-1])
    return indexed


class Location(NamedTuple):
    """Where a sample is: the URL of its shard, and its key there."""

    url: str
    key: str


class Shards:
    """The samples of indexed shards: sample ids follow the order of the shards, and of the samples in each.

    The same list in the same order means the same ids: keep it as long as an experiment lives. Pickling keeps no file.

    Args:
        urls: as in `index_shards`.
        index_dir: where the indexes are, if not beside the shards.

    Attributes:
        urls: of the shards, patterns expanded.
        shard_sizes: samples of each shard: what `client.create_experiment(shard_sizes=...)` takes.
        shard_bytes: int64 [num_shards], the size of each tar file.
        checksums: int64 [num_shards], crc32 of each index.
        first_ids: int64 [num_shards + 1], the id of each shard's first sample, and at last the number of all samples.

    Raises:
        FailedPreconditionError: an index is missing; which, and the command that makes it.
        DataLossError: an index is damaged.
        InvalidArgumentError: as in `index_shards`.
    """

    def __init__(self, urls: Urls, *, index_dir: str | os.PathLike[str] | None = None) -> None:
        with_paths = _with_index_paths(urls, index_dir, "index_dir")
        self.urls = tuple(url for url, _ in with_paths)
        self._paths = [path for _, path in with_paths]
        self._open: dict[int, NDArray[Any]] = {}
        # The indexes are opened when they are needed: of ten thousand no process can hold all.
        ends = [
            (len(rows) - 1, rows["offset"][-1], rows["crc32"][-1]) for rows in map(self._load, range(len(self.urls)))
        ]
        num_samples, self.shard_bytes, self.checksums = np.array(ends, np.int64).T
        self.shard_sizes = tuple(num_samples.tolist())
        self.first_ids = np.concatenate([[0], np.cumsum(num_samples)])

    def __len__(self) -> int:
        """Samples of all shards."""
        return int(self.first_ids[-1])

    def __repr__(self) -> str:
        return f"Shards({len(self.urls):,} shards from {self.urls[0]} to {self.urls[-1]}, {len(self):,} samples)"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def shards_of(self, sample_ids: NDArray[np.int64]) -> NDArray[np.intp]:
        """The number of the shard that holds each sample, [k]."""
        return np.searchsorted(self.first_ids, sample_ids, side="right") - 1

    def locate(self, sample_id: int) -> Location:
        """Where a sample is; raises IndexError."""
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample_id={sample_id}: expected 0 to {len(self) - 1:,}")
        shard = int(self.shards_of(np.array([sample_id]))[0])
        key = self.rows(shard)["key"][sample_id - self.first_ids[shard]]
        return Location(self.urls[shard], decoded(key))

    def sample_id(self, key: str, url: str | None = None) -> int:
        """The id of the sample with this key, looked for in one shard or in all: their indexes are gone through.

        Raises:
            NotFoundError: there is none.
            InvalidArgumentError: several shards have such a sample: name one.
        """
        encoded = key.encode("utf-8", "surrogateescape")
        among = range(len(self.urls)) if url is None else [self.urls.index(url)] if url in self.urls else []
        found = {
            self.urls[shard]: int(self.first_ids[shard] + row)
            for shard in among
            for row in np.flatnonzero(self.rows(shard)["key"][:-1] == encoded)
        }
        if not found:
            raise NotFoundError(f"there is no sample {key!r} in {url or self}", field="key")
        if len(found) > 1:
            raise InvalidArgumentError(f"key={key!r} is in {', '.join(found)}: say in which with url=...", field="key")
        return next(iter(found.values()))

    def rows(self, shard: int) -> NDArray[Any]:
        """The index of a shard, [shard_sizes[shard] + 1]; see `index_shards`."""
        rows = self._open.pop(shard, None)
        if rows is None:
            rows = self._load(shard)
            if (len(rows) - 1, rows["crc32"][-1]) != (self.shard_sizes[shard], self.checksums[shard]):
                raise DataLossError(f"the index {self._paths[shard]} was changed while it was in use: start anew")
            if len(self._open) >= _MAX_OPEN_INDEXES:
                self._open.pop(next(iter(self._open)))  # the one that was used longest ago
        self._open[shard] = rows
        return rows

    def _load(self, shard: int) -> NDArray[Any]:
        return load_index(self._paths[shard], self.urls[shard])


def load_index(path: Path, url: str) -> NDArray[Any]:
    """Map an index into memory, and check it.

    Raises:
        FailedPreconditionError: it isn't there.
        DataLossError: it is damaged.
    """
    try:
        rows: NDArray[Any] = np.asarray(np.load(path, mmap_mode="r"))
        is_sound = (
            rows.ndim == 1
            and rows.dtype.names == _FIELDS
            and len(rows) > 1
            and rows["crc32"][-1] == zlib.crc32(rows[:-1].data)
        )
    except FileNotFoundError:
        raise FailedPreconditionError(
            f"{url} has no index, expected at {path}. Make it with `{index_command(path, url)}`"
        ) from None
    except (OSError, ValueError, EOFError):  # a file that numpy can't make out
        is_sound = False
    if not is_sound:
        raise DataLossError(f"the index {path} is damaged. Make it anew with `{index_command(path, url)}`")
    return rows


def index_command(path: Path, url: str, *options: str) -> str:
    """The command that makes an index."""
    is_beside = is_local(url) and path.parent == local_path(url).parent
    return shlex.join(["evosample", "index", *options, url, *([] if is_beside else ["--output", str(path.parent)])])


def decoded(key: bytes) -> str:
    """A key as webdataset has it."""
    return key.decode("utf-8", "surrogateescape")


def is_local(url: str) -> bool:
    """Whether a shard is a file of this machine."""
    return urlparse(url).scheme in ("", "file")


def is_http(url: str) -> bool:
    """Whether a shard is on an HTTP server."""
    return urlparse(url).scheme in ("http", "https")


def local_path(url: str) -> Path:
    """The file of a local shard."""
    return Path(url2pathname(urlparse(url).path) if url.startswith("file:") else url)


def _with_index_paths(urls: Urls, index_dir: str | os.PathLike[str] | None, field: str) -> list[tuple[str, Path]]:
    """All shards, patterns expanded, with the places of their indexes."""
    shards: list[str] = expand_urls(urls) if isinstance(urls, str) else [os.fspath(url) for url in urls]
    if not shards:
        raise InvalidArgumentError("urls: expected at least one shard", field="urls")
    by_path: dict[Path, str] = {}
    for url in shards:
        if is_local(url) and "*" in url:
            raise InvalidArgumentError(
                f"{url}: braces are expanded, as in train-{{000..029}}.tar, but no *: let the shell do that, or pass "
                "sorted(glob.glob(...))",
                field="urls",
            )
        if index_dir is not None:
            path = Path(index_dir) / f"{url_to_cache_name(url)}.idx.npy"
        elif is_local(url):
            path = Path(f"{local_path(url)}.idx.npy")
        else:
            raise InvalidArgumentError(
                f"{url} is no local file: say where indexes are to be kept with {field} (--output of the command)",
                field=field,
            )
        if path in by_path:
            raise InvalidArgumentError(
                f"{by_path[path]} and {url} would share the index {path}: every shard comes once, and with {field} "
                "shards of one name need folders of their own",
                field="urls",
            )
        by_path[path] = url
    return [(url, path) for path, url in by_path.items()]


def _is_up_to_date(path: Path, rows: NDArray[Any], shard: Path) -> bool:
    try:
        stat = shard.stat()
    except OSError:
        return False  # scanning it says what is wrong
    return stat.st_size == rows["offset"][-1] and stat.st_mtime_ns <= path.stat().st_mtime_ns


def _write(path: Path, rows: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with unfinished.open("wb") as file:
            np.save(file, rows)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


class _Tape:
    """A stream that keeps what was read of it until that is forgotten."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._kept = bytearray()
        self.num_read = 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._kept += data
        self.num_read += len(data)
        return data

    def crc32(self, start: int, stop: int) -> int:
        """Of a range of bytes that is kept as a whole."""
        first = self.num_read - len(self._kept)
        with memoryview(self._kept) as kept:
            return zlib.crc32(kept[start - first : stop - first])

    def forget(self, stop: int) -> None:
        """Keep only what comes after."""
        del self._kept[: max(stop - (self.num_read - len(self._kept)), 0)]

    def has_only_zeros(self) -> bool:
        """Whether what is kept and what follows to the end are zeros."""
        is_zero = True
        while self._kept:
            is_zero = is_zero and not any(self._kept)
            self.forget(self.num_read)
            self.read(1 << 16)
        return is_zero


def _scanned(url: str, headers: Mapping[str, str]) -> NDArray[Any]:
    try:
        with _opened(url, headers) as stream:
            return _index_of(_Tape(stream), url)
    except EvosampleError:
        raise
    except ValueError as error:  # a scheme that gopen doesn't know
        raise InvalidArgumentError(f"{url} can't be opened: {error}", field="urls") from error
    except HTTPError as error:
        raise UnavailableError(f"{url} can't be had: {error}. Begin again: indexes that are there are kept") from error
    except OSError as error:
        raise DataLossError(f"{url} can't be read: {error}") from error


def _opened(url: str, headers: Mapping[str, str]) -> Any:
    """A stream of all of a shard."""
    if not is_http(url):
        return gopen(url)
    response = urllib3.request("GET", url, headers=headers, retries=RETRIES, preload_content=False)
    if response.status != 200:
        response.close()
        raise (DataLossError if response.status == 404 else UnavailableError)(
            f"{url} can't be read: the server answered {response.status}. Is the URL right, are `headers` "
            "(--header of the command) what it wants?"
        )
    return response


def _index_of(tape: _Tape, url: str) -> NDArray[Any]:
    rows: list[tuple[bytes, int, int, int]] = []
    keys: set[str] = set()
    key, start, stop, extensions = "", 0, 0, set[str]()
    end = 0  # of the last member, whether it belongs to a sample or not

    def end_sample() -> None:
        if key:
            rows.append((key.encode("utf-8", "surrogateescape"), start, stop - start, tape.crc32(start, stop)))

    try:
        with tarfile.open(fileobj=tape, mode="r|") as tar:  # type: ignore[call-overload]
            while (member := tar.next()) is not None:
                tar.members.clear()  # it keeps all it has seen
                end = tar.offset
                split = key_and_extension(member.name) if member.isreg() else None
                if split is None:
                    continue
                if split[0] != key:
                    end_sample()
                    tape.forget(member.offset)
                    key, start, extensions = split[0], member.offset, set()
                    if key in keys:
                        raise DataLossError(
                            f"{url}: the members of sample {key!r} don't follow each other: others come before "
                            f"{member.name!r} at byte {member.offset}. Write the shard anew, sorted by name"
                        )
                    keys.add(key)
                if split[1] in extensions:
                    raise DataLossError(
                        f"{url}: sample {key!r} has two members .{split[1]}, the second at byte {member.offset}"
                    )
                extensions.add(split[1])
                stop = end
            end_sample()
            tape.forget(end)
    except tarfile.TarError as error:
        raise DataLossError(
            f"{url}: no sound tar file after byte {end}: {error}. It may be truncated, or compressed: samples are read "
            "by their position, so unpack such shards first"
        ) from error
    if not tape.has_only_zeros():  # tarfile takes what it can't read for the archive's end
        raise DataLossError(f"{url}: damaged at byte {end}: expected the header of a tar member, or the archive's end")
    if tape.num_read < end + BLOCK_BYTES:
        raise DataLossError(
            f"{url}: truncated at byte {end}, where the next sample or the archive's end would begin. If you know that "
            "it is whole, append 1,024 zero bytes to it, which end an archive"
        )
    if not rows:
        raise DataLossError(f"{url} holds no samples: leave it out. Members are expected to be called KEY.EXTENSION")
    width = max(len(row[0]) for row in rows)
    dtype = np.dtype(list(zip(_FIELDS, (f"S{width}", "<u8", "<u8", "<u4"), strict=True)))
    samples = np.array(rows, dtype)
    end_row = np.array([(b"", tape.num_read, 0, zlib.crc32(samples.data))], dtype)
    return np.concatenate([samples, end_row])
