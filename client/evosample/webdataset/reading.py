"""Ranges of bytes of shards: from files by position, from HTTP servers by Range requests."""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, NamedTuple, Protocol

import urllib3
from urllib3.exceptions import HTTPError, MaxRetryError
from webdataset import gopen

from evosample.errors import DataLossError, EvosampleError, UnavailableError, UnimplementedError
from evosample.webdataset.index import Shards, decoded, is_http, local_path

_MAX_OPEN_FILES = 64
_COPIED_BYTES = 1 << 16


_REMEDY = (
    "Restore the shard; or, if it is as it should be, index it with `evosample index --force` and begin a new "
    'experiment; or go on without such samples (on_error="skip")'
)


class Sample(NamedTuple):
    """A row of an index: where a sample lies in its shard."""

    key: bytes
    offset: int
    size: int
    crc32: int


class Part(NamedTuple):
    """What a batch needs of one shard.

    Attributes:
        shard: its number.
        positions: of the samples in the batch.
        samples: in the order of their offsets.
    """

    shard: int
    positions: list[int]
    samples: list[Sample]


Blobs = list[bytes] | DataLossError
"""The bytes of each sample of a part; or what is wrong with the shard as a whole."""


class Reader(Protocol):
    """Reads parts of shards."""

    def read(self, parts: Sequence[Part]) -> list[Blobs]:
        """The bytes of each part, unchecked."""


def damage(blob: bytes, sample: Sample, url: str) -> DataLossError | None:
    """What is wrong with the bytes of a sample."""
    if len(blob) == sample.size and zlib.crc32(blob) == sample.crc32:
        return None
    what = "damaged" if len(blob) == sample.size else f"cut off after {len(blob):,} of {sample.size:,} bytes"
    return DataLossError(
        f"sample {decoded(sample.key)!r} at byte {sample.offset:,} of {url} is {what}, or the shard has changed since "
        f"its index was made. {_REMEDY}"
    )


class LocalFiles:
    """Reads files of this machine by position. The last few stay open, until the reader is garbage."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._descriptors: dict[int, int] = {}

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def read(self, parts: Sequence[Part]) -> list[Blobs]:
        """See `Reader`."""
        return [self._read(part) for part in parts]

    def _read(self, part: Part) -> Blobs:
        url = self._shards.urls[part.shard]
        try:
            descriptor = self._open(part.shard)
        except OSError as error:
            return DataLossError(f"{url} can't be read: {error.strerror}. {_REMEDY}")
        return read_by_position(descriptor, part)

    def _open(self, shard: int) -> int:
        descriptor = self._descriptors.pop(shard, None)
        if descriptor is None:
            descriptor = os.open(local_path(self._shards.urls[shard]), os.O_RDONLY | os.O_CLOEXEC)
            if len(self._descriptors) >= _MAX_OPEN_FILES:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))  # the one used longest ago
        self._descriptors[shard] = descriptor
        return descriptor


def read_by_position(descriptor: int, part: Part) -> list[bytes]:
    """The samples of a part, short where the file ends."""
    return [_pread(descriptor, sample.size, sample.offset) for sample in part.samples]


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    blob = os.pread(descriptor, size, offset)
    while len(blob) < size and (more := os.pread(descriptor, size - len(blob), offset + len(blob))):
        blob += more  # one call reads 2 GiB at most
    return blob


class Remote:
    """Shards on other machines, through urllib3 or, where that doesn't reach, webdataset's `gopen`.

    Args:
        headers: sent with every request, such as {"Authorization": ...}.
        retries: what is tried again, how often and after what time.
        num_connections: to one host.
        timeout_s: how long a server may say nothing.
    """

    def __init__(
        self, headers: Mapping[str, str], retries: urllib3.Retry, num_connections: int, timeout_s: float
    ) -> None:
        self._headers = dict(headers)
        self._retries = retries
        timeout = urllib3.Timeout(connect=min(timeout_s, 10), read=timeout_s)
        self._pool = urllib3.PoolManager(maxsize=num_connections, timeout=timeout)

    def range(self, url: str, first: int, stop: int, shard_bytes: int) -> bytes:
        """Bytes [first, stop) of a shard.

        Raises:
            DataLossError: the shard is gone, or has another size.
            UnavailableError: the server does not answer, or does not give it.
            UnimplementedError: it does not answer Range requests.
        """
        headers = self._headers | {"Range": f"bytes={first}-{stop - 1}"}
        try:
            response = self._pool.request("GET", url, headers=headers, retries=self._retries)
        except HTTPError as error:
            raise _unavailable(url, error) from error
        if response.status == 200:
            raise UnimplementedError(
                f'{url}: the server answers a Range request with all of the file: use read="cache"'
            )
        if response.status != 206:
            raise _refused(url, response.status)
        got = response.headers.get("Content-Range", "")
        span, _, total = got.partition("/")
        if span != f"bytes {first}-{stop - 1}":
            raise UnimplementedError(
                f'{url}: asked for the range "bytes {first}-{stop - 1}", the server gave {got!r}: use read="cache"'
            )
        if total not in ("*", str(shard_bytes)):
            raise _changed(url, total, shard_bytes)
        return response.data

    def download(self, url: str, file: BinaryIO, shard_bytes: int) -> None:
        """Write a whole shard to the beginning of a file; after an interruption it goes on where it was.

        Raises:
            DataLossError: the shard is gone, or has another size.
            UnavailableError: the server, or the command of a pipe, does not give it.
        """
        retries = self._retries
        while True:
            before = file.tell()
            try:
                if is_http(url):
                    self._download_rest(url, file, shard_bytes, retries)
                else:
                    file.seek(0)
                    with gopen(url) as stream:
                        _copy(iter(lambda: stream.read(_COPIED_BYTES), b""), file, url, shard_bytes)
                break
            except MaxRetryError as error:
                raise _unavailable(url, error) from error
            except EvosampleError:  # what is no use to try again; UnavailableError is an OSError
                raise
            except (HTTPError, OSError) as error:
                if is_http(url) and file.tell() > before:
                    retries = self._retries  # what gets on may be interrupted any number of times
                try:
                    retries = retries.increment("GET", url, error=error)
                except HTTPError:
                    raise _unavailable(url, error) from error
                retries.sleep()
        if file.tell() != shard_bytes:
            raise _changed(url, f"{file.tell():,}", shard_bytes)

    def _download_rest(self, url: str, file: BinaryIO, shard_bytes: int, retries: urllib3.Retry) -> None:
        start = file.tell()
        headers = self._headers | ({"Range": f"bytes={start}-"} if start else {})
        response = self._pool.request("GET", url, headers=headers, retries=retries, preload_content=False)
        try:
            if response.status not in (200, 206):
                raise _refused(url, response.status)
            if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                file.seek(0)  # all of it comes again
            _copy(response.stream(_COPIED_BYTES), file, url, shard_bytes)
        finally:
            response.close()


def _copy(chunks: Iterable[bytes], file: BinaryIO, url: str, shard_bytes: int) -> None:
    for data in chunks:
        if file.tell() + len(data) > shard_bytes:
            raise _changed(url, f"more than {shard_bytes:,}", shard_bytes)
        file.write(data)


def _unavailable(url: str, error: Exception) -> UnavailableError:
    return UnavailableError(f"{url} can't be had: {error}. Begin again when it can; training goes on where it stopped")


def _refused(url: str, status: int) -> DataLossError | UnavailableError:
    if status in (404, 410, 416):  # 416: it ends before the range
        return DataLossError(f"{url} is gone or has been cut short: the server answered {status}. {_REMEDY}")
    return UnavailableError(f"{url}: the server answered {status}. Is the URL right, are `headers` what it wants?")


def _changed(url: str, found: str, expected: int) -> DataLossError:
    return DataLossError(f"{url} has {found} bytes, expected {expected:,}: it is truncated or has changed. {_REMEDY}")


class Ranges:
    """Reads what a batch needs by concurrent Range requests.

    Args:
        max_gap_bytes: neighbours at most so far apart are one request.
    """

    def __init__(self, shards: Shards, remote: Remote, *, max_gap_bytes: int, num_connections: int) -> None:
        self._shards = shards
        self._remote = remote
        self._max_gap_bytes = max_gap_bytes
        self._threads = ThreadPoolExecutor(num_connections, thread_name_prefix="evosample-ranges")

    def read(self, parts: Sequence[Part]) -> list[Blobs]:
        """See `Reader`."""
        requested = [[(span, self._request(part.shard, span)) for span in self._spans(part)] for part in parts]
        try:
            return [_blobs(answers) for answers in requested]
        except BaseException:  # what waits for its turn would keep the process from ending, retry by retry
            for _, answer in itertools.chain(*requested):
                answer.cancel()
            raise

    def _spans(self, part: Part) -> list[list[Sample]]:
        spans: list[list[Sample]] = []
        stop = -1
        for sample in part.samples:
            if spans and sample.offset - stop <= self._max_gap_bytes:
                spans[-1].append(sample)
            else:
                spans.append([sample])
            stop = sample.offset + sample.size
        return spans

    def _request(self, shard: int, span: list[Sample]) -> Future[bytes]:
        stop = span[-1].offset + span[-1].size
        shard_bytes = int(self._shards.shard_bytes[shard])
        return self._threads.submit(self._remote.range, self._shards.urls[shard], span[0].offset, stop, shard_bytes)


def _blobs(answers: list[tuple[list[Sample], Future[bytes]]]) -> Blobs:
    blobs = []
    try:
        for span, answer in answers:
            data = answer.result()
            for sample in span:
                first = sample.offset - span[0].offset
                blobs.append(data[first : first + sample.size])
    except DataLossError as error:
        return error
    return blobs
