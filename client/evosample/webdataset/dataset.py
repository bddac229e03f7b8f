"""The dataset: planned samples as webdataset gives them."""

from __future__ import annotations

import copy
import logging
import os
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import urllib3
from numpy.typing import NDArray
from webdataset import FluidInterface, PipelineStage, filters

from evosample.epoch import as_invalid_argument
from evosample.errors import DataLossError, InvalidArgumentError, UsageError
from evosample.sampling import check_int, check_seconds
from evosample.webdataset.cache import Prefetch, ShardCache
from evosample.webdataset.index import RETRIES, Shards, is_http, is_local, local_path
from evosample.webdataset.reading import Blobs, LocalFiles, Part, Ranges, Reader, Remote, Sample, damage
from evosample.webdataset.tar import key_and_extension, members_of

_log = logging.getLogger("evosample")

# What makes sense for streams alone: these order, count or batch samples.
_STREAM_FILTERS = {
    getattr(filters, name).f: name for name in ("shuffle", "batched", "unbatched", "unlisted", "slice", "rsample")
}


class Dataset(torch.utils.data.Dataset[Any], FluidInterface):  # type: ignore[misc]
    """The samples of shards by their ids, for `evosample.torch.Loader` and any `DataLoader`.

    A sample is what `webdataset.WebDataset` gives: a dict of `__key__`, `__url__` and the bytes of each extension. It
    goes through webdataset's own filters, added in the same way: `dataset.decode("pil").to_tuple("png", "cls")`. Those
    that order, drop or batch samples have no place here: the experiment says what comes when. Every sample's bytes are
    compared with the checksum in the index. Workers may be forked or spawned: each opens files of its own.

    Args:
        shards: which, with their indexes.
        read: how shards that aren't local files are read: by "ranges", an HTTP request for each sample of a batch; or
            through a "cache" of whole shards on disk, as pipes and whatever else is not HTTP must be.
        cache_dir: where that keeps them; all processes of a user on the machine may share it.
        cache_bytes: what it may take of the disk. It should hold two of the blocks of shards that epochs are shuffled
            in (`shuffle_block_samples`), or shards are downloaded more than once an epoch.
        max_gap_bytes: samples of a batch at most so far apart in their shard are one request.
        num_connections: requests of a worker at a time.
        headers: sent with each request, such as {"Authorization": "Bearer ..."}.
        timeout_s: how long a server may say nothing before a request counts as failed.
        retries: what of HTTP is tried again, and when. Default: connection errors, 429 and 5xx, 8 times, with
            back-off.
        on_error: what a damaged, changed or missing sample does, or one that a filter fails on: "raise" an error, or
            "skip" it, with None in its place.

    Attributes:
        num_skipped: samples that were skipped in this process.
        fingerprint: of the shards and their order: tells whether sample ids still stand for the same samples.
        prefetch_samples: how far ahead `prefetch` is to be told what will be needed, in samples of all processes.

    Raises:
        InvalidArgumentError: the arguments don't fit the shards, or each other.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        read: Literal["ranges", "cache"] = "ranges",
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
        max_gap_bytes: int = 0,
        num_connections: int = 8,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 30.0,
        retries: urllib3.Retry = RETRIES,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        if not isinstance(shards, Shards):
            raise InvalidArgumentError(f"shards={shards!r}: expected evosample.webdataset.Shards(...)", field="shards")
        _check_choice("read", read, ("ranges", "cache"))
        _check_choice("on_error", on_error, ("raise", "skip"))
        with as_invalid_argument():
            check_int("max_gap_bytes", max_gap_bytes, 0, 2**63 - 1)
            check_int("num_connections", num_connections, 1, 10_000)
            check_seconds("timeout_s", timeout_s)
        is_remote = np.array([not is_local(url) for url in shards.urls])
        if read == "cache":
            _check_cache(cache_dir, cache_bytes, int(shards.shard_bytes[is_remote].max(initial=0)))
        else:
            _check_ranges(shards, cache_dir, cache_bytes)
        self.shards = shards
        self.fingerprint = f"shards-{zlib.crc32(shards.checksums.tobytes()):08x}"
        self.num_skipped = 0
        self.prefetch_samples = 0
        if read == "cache" and is_remote.any():
            assert cache_bytes is not None
            remote_bytes = int(shards.shard_bytes[is_remote].sum())
            share = 1.0 if remote_bytes <= cache_bytes else cache_bytes / 2 / remote_bytes
            self.prefetch_samples = max(int(share * len(shards)), 1)
        self._cache_dir = Path(cache_dir) if read == "cache" and cache_dir is not None else None
        self._cache_bytes = cache_bytes
        self._max_gap_bytes = max_gap_bytes
        self._num_connections = num_connections
        self._headers = dict(headers or {})
        self._timeout_s = timeout_s
        self._retries = retries
        self._on_error = on_error
        self._filters: list[Any] = []
        self._has_warned = False
        self._opened: tuple[int, Reader, Reader] | None = None
        self._prefetch: Prefetch | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None, "_prefetch": None, "num_skipped": 0}

    def __len__(self) -> int:
        """Samples of all shards."""
        return len(self.shards)

    def compose(self, *stages: Any) -> Self:
        """A copy with further filters of webdataset, or functions from an iterator of samples to one."""
        for stage in stages:
            name = _STREAM_FILTERS.get(getattr(stage, "f", None))
            if name or isinstance(stage, PipelineStage) or not callable(stage):
                raise UsageError(
                    f"{name or type(stage).__name__} is for streams; here the experiment says which samples come in "
                    "what order, and the loader makes batches: leave it out"
                )
        composed = copy.copy(self)
        composed._filters = [*self._filters, *stages]
        return composed

    def __getitem__(self, sample_id: int) -> Any:
        """One sample; see `__getitems__`."""
        return self.__getitems__([sample_id])[0]

    def __getitems__(self, sample_ids: Sequence[int]) -> list[Any]:
        """A batch of samples, read in the order of their shards and offsets, returned in that of their ids.

        Raises:
            IndexError: there is no such sample.
            DataLossError: a sample is damaged or missing: shard, offset and key (not with on_error="skip").
            UnavailableError: a server does not answer, after all retries.
            UnimplementedError: a server does not answer Range requests.
            UsageError: a filter makes several samples of one, or looks ahead; or it drops one (not with
                on_error="skip").
        """
        parts = self._parts(np.asarray(sample_ids, np.int64))
        samples: list[Any] = [None] * len(sample_ids)
        for part, blobs in zip(parts, self._read(parts), strict=True):
            url = self.shards.urls[part.shard]
            origin = {"__url__": url} | ({"__local_path__": str(local_path(url))} if is_local(url) else {})
            for row, position in enumerate(part.positions):
                sample = part.samples[row]
                error = blobs if isinstance(blobs, DataLossError) else damage(blobs[row], sample, url)
                if error is not None:
                    self._lost(error)
                else:
                    assert not isinstance(blobs, DataLossError)
                    samples[position] = _as_dict(blobs[row], origin)
        if self._filters:
            samples = self._filtered(samples, sample_ids)
        self.num_skipped += sum(sample is None for sample in samples)
        return samples

    def prefetch(self, sample_ids: NDArray[np.int64], num_ahead: int) -> None:
        """Download whole shards in the background, in the order in which samples will be needed.

        Called in the main process, with each id once an epoch, as soon as it comes within `prefetch_samples` of what
        is trained on. Nothing depends on it but time. Other ways of reading than through a cache take no notice.

        Args:
            sample_ids: int64 [k].
            num_ahead: how far ahead of what is trained on it is told, in samples of this process.
        """
        if not self.prefetch_samples:
            return
        if self._prefetch is None:
            cache = self._readers()[1]
            assert isinstance(cache, ShardCache)
            self._prefetch = Prefetch(cache, self.shards)
            weakref.finalize(self, self._prefetch.close).atexit = False  # daemon threads end by themselves
        self._prefetch.announce(np.asarray(sample_ids, np.int64), num_ahead)

    def _readers(self) -> tuple[Reader, Reader]:
        """Of local files, and of others: made anew in each process, for they hold files, connections and threads."""
        if self._opened is None or self._opened[0] != os.getpid():
            remote = Remote(self._headers, self._retries, self._num_connections, self._timeout_s)
            reader: Reader
            if self._cache_dir is not None:
                assert self._cache_bytes is not None
                reader = ShardCache(self.shards, remote, self._cache_dir, self._cache_bytes)
            else:
                reader = Ranges(
                    self.shards, remote, max_gap_bytes=self._max_gap_bytes, num_connections=self._num_connections
                )
            self._opened = os.getpid(), LocalFiles(self.shards), reader
        return self._opened[1:]

    def _parts(self, sample_ids: NDArray[np.int64]) -> list[Part]:
        if not len(sample_ids):
            return []
        if sample_ids.min() < 0 or sample_ids.max() >= len(self):
            raise IndexError(
                f"sample ids from {sample_ids.min()} to {sample_ids.max()}: expected 0 to {len(self) - 1:,}"
            )
        order = np.argsort(sample_ids)
        shards = self.shards.shards_of(sample_ids[order])
        parts = []
        for positions in np.split(order, np.flatnonzero(np.diff(shards)) + 1):
            shard = int(self.shards.shards_of(sample_ids[positions[:1]])[0])
            rows = self.shards.rows(shard)[sample_ids[positions] - self.shards.first_ids[shard]]
            parts.append(Part(shard, positions.tolist(), [Sample(*row) for row in rows.tolist()]))
        return parts

    def _read(self, parts: list[Part]) -> Iterator[Blobs]:
        local, remote = self._readers()
        are_local = [is_local(self.shards.urls[part.shard]) for part in parts]
        from_local = iter(local.read([part for part, here in zip(parts, are_local, strict=True) if here]))
        from_remote = iter(remote.read([part for part, here in zip(parts, are_local, strict=True) if not here]))
        return (next(from_local if here else from_remote) for here in are_local)

    def _filtered(self, samples: list[Any], sample_ids: Sequence[int]) -> list[Any]:
        """What webdataset's filters make of each sample; they work on iterators, and one goes through a whole batch."""
        results: list[Any] = [None] * len(samples)
        position = -1

        def feed() -> Iterator[Any]:
            nonlocal position
            while position + 1 < len(samples):
                position += 1
                if samples[position] is not None:
                    yield samples[position]

        while position + 1 < len(samples):  # filters that have failed, or ended, begin again with the next sample
            before = position
            stream: Iterator[Any] = feed()
            try:
                for stage in self._filters:
                    stream = stage(stream)
                for result in stream:
                    _put(results, position, result)
            except UsageError:  # a filter that is wrong, rather than a sample
                raise
            except Exception as error:
                if position == before:
                    error.add_note("A filter failed before it took a sample")
                    raise
                where = self.shards.locate(sample_ids[position])
                if self._on_error == "raise":
                    error.add_note(f"A filter failed on sample {where.key!r} of {where.url}")
                    raise
                self._skipping(f"a filter failed on sample {where.key!r} of {where.url}: {error!r}")
            if position == before:
                raise UsageError("a filter has ended without taking a sample: expected one that goes through all")
        for sample_id, sample, result in zip(sample_ids, samples, results, strict=True):
            if sample is not None and result is None and not self._has_warned:
                where = self.shards.locate(sample_id)
                dropped = f"a filter has dropped sample {where.key!r} of {where.url}"
                if self._on_error == "raise":
                    raise UsageError(
                        f"{dropped}: every planned sample is expected to be trained on. Leave such samples out of the "
                        'shards, or let them be skipped with on_error="skip"'
                    )
                self._skipping(dropped)
        return results

    def _lost(self, error: DataLossError) -> None:
        if self._on_error == "raise":
            raise error
        self._skipping(str(error))

    def _skipping(self, why: str) -> None:
        if not self._has_warned:
            _log.warning("samples are skipped; the first one: %s", why)
            self._has_warned = True


def _as_dict(blob: bytes, origin: dict[str, str]) -> dict[str, Any]:
    sample: dict[str, Any] = {}
    for name, content in members_of(blob):
        split = key_and_extension(name)
        if split is not None:
            if not sample:
                sample = {"__key__": split[0], **origin}
            sample[split[1]] = content
    return sample


def _put(results: list[Any], position: int, result: Any) -> None:
    if results[position] is not None:
        raise UsageError(
            "a filter has made several samples of one, or takes samples ahead of those that it gives: expected one of "
            "each, before the next is taken"
        )
    results[position] = result


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidArgumentError(f"{field}={value!r}: expected one of {', '.join(map(repr, choices))}", field=field)


def _check_cache(cache_dir: str | os.PathLike[str] | None, cache_bytes: int | None, largest_shard_bytes: int) -> None:
    if cache_dir is None or cache_bytes is None:
        raise InvalidArgumentError('read="cache" needs cache_dir and cache_bytes', field="cache_dir")
    if cache_bytes < largest_shard_bytes:
        raise InvalidArgumentError(
            f"cache_bytes={cache_bytes:,}: the largest shard alone has {largest_shard_bytes:,} bytes; expected room "
            "for two of the blocks of shards that epochs are shuffled in (shuffle_block_samples)",
            field="cache_bytes",
        )


def _check_ranges(shards: Shards, cache_dir: str | os.PathLike[str] | None, cache_bytes: int | None) -> None:
    if cache_dir is not None or cache_bytes is not None:
        raise InvalidArgumentError('cache_dir and cache_bytes are for read="cache"', field="cache_dir")
    for url in shards.urls:
        if not is_local(url) and not is_http(url):
            raise InvalidArgumentError(
                f'{url} is neither a file nor on an HTTP server, and can\'t be read by ranges: pass read="cache", '
                "cache_dir and cache_bytes",
                field="read",
            )
