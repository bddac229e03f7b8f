from __future__ import annotations

import gc
import gzip
import io
import itertools
import logging
import multiprocessing
import os
import pickle
import shlex
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import urllib3
import webdataset
from mnist_shards import write_shards
from torch.utils.data import DataLoader
from typer.testing import CliRunner

import evosample
import evosample.torch
from evosample import cli
from evosample.webdataset import Dataset, Location, Shards, index_shards
from shard_server import ShardServer
from stores import wait_until

N, SHARD = 300, 50  # samples of MNIST, and those of a shard
PATIENT = urllib3.Retry(8, backoff_factor=0.01, status_forcelist=(503,))

# PyTorch warns where a machine has fewer processors than a test has workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six indexed shards of MNIST, which tests leave as they are."""
    path = tmp_path_factory.mktemp("shards")
    index_shards(write_shards(path, N, samples_per_shard=SHARD))
    return path


@pytest.fixture
def urls(folder: Path) -> list[str]:
    return sorted(map(str, folder.glob("*.tar")))


@pytest.fixture
def own_urls(urls: list[str], tmp_path: Path) -> list[str]:
    """Copies of two shards and their indexes, for a test to damage."""
    for url in urls[:2]:
        for name in (url, f"{url}.idx.npy"):
            (tmp_path / Path(name).name).write_bytes(Path(name).read_bytes())
    return [str(tmp_path / Path(url).name) for url in urls[:2]]


@pytest.fixture
def http(folder: Path) -> Iterator[ShardServer]:
    with ShardServer(folder) as server:
        yield server


@pytest.fixture
def remote(http: ShardServer, urls: list[str], folder: Path) -> Shards:
    """The shards on an HTTP server."""
    return Shards([f"{http.url}/{Path(url).name}" for url in urls], index_dir=folder)


def plain(urls: list[str]) -> list[dict[str, Any]]:
    """The samples as webdataset itself gives them."""
    return gone_through(webdataset.WebDataset(urls, shardshuffle=False))


def gone_through(dataset: Any) -> list[Any]:
    """All samples of a WebDataset, which leaves its files for the garbage collector to close."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(dataset)
        del dataset
        gc.collect()
    return samples


def contents(samples: list[Any]) -> list[dict[str, Any]]:
    """Without where they come from."""
    return [
        {key: value for key, value in sample.items() if key not in ("__url__", "__local_path__")} for sample in samples
    ]


def every_id(shards: Shards) -> list[int]:
    ids: list[int] = np.random.default_rng(5).permutation(len(shards)).tolist()
    return ids


def in_order(ids: list[int], samples: list[Any]) -> list[Any]:
    return [samples[position] for position in np.argsort(ids)]


def write_tar(path: Path, names: list[str], **options: Any) -> str:
    with tarfile.open(path, "w", **options) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            if name.endswith("/"):
                member.type = tarfile.DIRTYPE
            else:
                member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    return str(path)


# What is read


def test_samples_are_webdatasets_own_in_its_order(urls: list[str]) -> None:
    shards = Shards(urls)
    dataset = Dataset(shards)
    assert len(dataset) == len(shards) == sum(shards.shard_sizes) == N
    assert dataset.__getitems__(list(range(N))) == plain(urls)
    assert [dataset[3], dataset[N - 1]] == dataset.__getitems__([3, N - 1])


def test_a_batch_comes_in_the_order_of_its_ids(urls: list[str]) -> None:
    ids = [299, 7, 7, 120, 0, 298]
    expected = plain(urls)
    assert Dataset(Shards(urls)).__getitems__(ids) == [expected[each] for each in ids]
    assert Dataset(Shards(urls)).__getitems__([]) == []


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_unusual_members_are_read_as_webdataset_does(tmp_path: Path, tar_format: int) -> None:
    long = "d" * 90 + "/" + "k" * 90
    names = [
        "__meta__",
        "a.Seg.PNG",
        "a.cls",
        "no-extension",
        "dir/",
        "dir/b.cls",
        "dir/b.c/",
        "dir/b.txt",
        "__m__/x.y",
    ]
    names += [f"{long}.cls", f"{long}.jpg", "æ ø.txt", "README"]
    url = write_tar(tmp_path / "odd.tar", names, format=tar_format)
    index_shards([url])
    shards = Shards(url)
    samples = Dataset(shards).__getitems__(list(range(len(shards))))
    assert samples == plain([url])
    assert [sample["__key__"] for sample in samples] == ["a", "dir/b", long, "æ ø"]
    assert shards.locate(2) == Location(url, long)


def test_the_order_of_shards_tells(urls: list[str]) -> None:
    assert Dataset(Shards(urls)).fingerprint == Dataset(Shards(urls)).fingerprint
    assert Dataset(Shards(urls)).fingerprint != Dataset(Shards(urls[::-1])).fingerprint


def test_a_star_is_no_pattern(urls: list[str]) -> None:
    with pytest.raises(evosample.InvalidArgumentError, match="braces are expanded"):
        Shards(str(Path(urls[0]).parent / "*.tar"))


def test_filters_are_webdatasets_own(urls: list[str]) -> None:
    def filtered(dataset: Any) -> Any:
        decoded = dataset.decode("torchl8").rename(image="png", digit="cls", keep=False)
        return decoded.map_dict(image=torch.neg).to_tuple("image", "digit").map_tuple(None, str)

    expected = gone_through(filtered(webdataset.WebDataset(urls, shardshuffle=False)))
    samples = filtered(Dataset(Shards(urls))).__getitems__(list(range(N)))
    for (image, digit), (expected_image, expected_digit) in zip(samples, expected, strict=True):
        assert torch.equal(image, expected_image)
        assert digit == expected_digit


def test_only_the_bytes_of_the_samples_are_read(urls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards(urls)
    ids = every_id(shards)[:40]
    num_read = 0
    pread = os.pread

    def counting_pread(descriptor: int, size: int, offset: int) -> bytes:
        nonlocal num_read
        num_read += len(data := pread(descriptor, size, offset))
        return data

    monkeypatch.setattr(os, "pread", counting_pread)
    Dataset(shards).__getitems__(ids)
    assert num_read == sum(int(shards.rows(each // SHARD)["size"][each % SHARD]) for each in ids)


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_few_files_stay_open(tmp_path: Path) -> None:
    urls = [write_tar(tmp_path / f"{number:03}.tar", [f"{number}.txt"]) for number in range(100)]
    index_shards(urls)
    dataset = Dataset(Shards(urls))
    before = num_open_files()
    assert [sample["txt"] for sample in dataset.__getitems__(list(range(100)))] == [b"%d.txt" % n for n in range(100)]
    assert num_open_files() - before < 170  # 64 shards, 100 indexes
    del dataset
    assert num_open_files() - before < 10


def test_samples_are_found_by_key(urls: list[str]) -> None:
    shards = Shards(urls)
    for sample_id in (0, 77, N - 1):
        url, key = shards.locate(sample_id)
        assert url == urls[sample_id // SHARD]
        assert shards.sample_id(key) == shards.sample_id(key, url) == sample_id
    with pytest.raises(evosample.NotFoundError, match="'12 3'"):
        shards.sample_id("12 3")
    with pytest.raises(IndexError, match="0 to 299"):
        shards.locate(N)
    with pytest.raises(IndexError, match="0 to 299"):
        Dataset(shards)[-1]


def test_a_key_of_several_shards_is_ambiguous(tmp_path: Path) -> None:
    urls = [write_tar(tmp_path / f"{number}.tar", ["a.txt", "b.txt"]) for number in range(2)]
    index_shards(urls)
    with pytest.raises(evosample.InvalidArgumentError, match="url="):
        Shards(urls).sample_id("b")
    assert Shards(urls).sample_id("b", urls[1]) == 3


# Workers


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_may_be_started_in_any_way(method: str, http: ShardServer, urls: list[str], folder: Path) -> None:
    mixed = [url if number % 2 else f"{http.url}/{Path(url).name}" for number, url in enumerate(urls)]
    dataset = Dataset(Shards(mixed, index_dir=folder), retries=PATIENT)
    ids = every_id(dataset.shards)
    dataset.__getitems__(ids)  # files and connections are open here
    http.failure_rate = 0.05
    batches = [ids[first : first + 50] for first in range(0, N, 50)]
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=2, multiprocessing_context=method, collate_fn=list)
    assert contents(in_order(ids, list(itertools.chain(*loader)))) == contents(plain(urls))


def test_pickling_keeps_no_file(urls: list[str]) -> None:
    dataset = Dataset(Shards(urls)).decode("l8").to_tuple("png", "cls")
    expected = dataset[5]
    loaded = pickle.loads(pickle.dumps(dataset))
    assert loaded[5][1] == expected[1]
    assert len(pickle.dumps(dataset)) < 5_000


class Job:
    """A small training job on shards, shuffled one shard at a time."""

    def __init__(
        self, client: evosample.Client, name: str, dataset: Dataset, *, num_epochs: int, **options: Any
    ) -> None:
        self.experiment = client.create_experiment(
            name,
            num_samples=len(dataset),
            num_epochs=num_epochs,
            meta_batch_size=30,
            mini_batch_size=10,
            policy=evosample.EvolvedSampling(prune_ratio=0.3),
            max_skipped_epochs=1,
            shard_sizes=dataset.shards.shard_sizes,
            shuffle_block_samples=SHARD,
        )
        self.model = torch.nn.Linear(28 * 28, 10)
        decoded = dataset.decode("torchl8").to_tuple("__url__", "png", "cls")
        self.loader = evosample.torch.Loader(decoded, self.experiment, model=self.model, score=self.losses, **options)

    def losses(self, batch: Any) -> torch.Tensor:
        images = batch[1].flatten(1) / 255
        return torch.nn.functional.cross_entropy(self.model(images), batch[2], reduction="none")

    def train(self) -> list[set[str]]:
        """Go through all epochs; the shards of each batch."""
        shards = []
        for _ in range(self.experiment.spec.num_epochs):
            for batch in self.loader:
                shards.append(set(batch[0]))
                self.loader.mean(self.losses(batch))
        return shards


def test_a_training_job_reads_nearly_one_shard_after_the_other(
    urls: list[str], client: evosample.Client, name: str
) -> None:
    job = Job(client, name, Dataset(Shards(urls)), num_epochs=3)
    assert max(map(len, job.train())) <= 3
    visits = job.experiment.export_scores().num_visits
    assert visits.sum() == 2 * N + 7 * 30  # the first epoch and the last anneal
    assert visits.min() >= 2


def test_a_training_job_goes_on_without_damaged_samples(
    own_urls: list[str], client: evosample.Client, name: str
) -> None:
    corrupt(Path(own_urls[0]))
    dataset = Dataset(Shards(own_urls), on_error="skip")
    num_lost = sum(sample is None for sample in dataset.__getitems__(list(range(2 * SHARD))))
    job = Job(client, name, dataset, num_epochs=3)
    job.train()
    assert (job.experiment.export_scores().num_visits == 0).sum() == num_lost


# HTTP


def test_ranges_bring_the_bytes_of_the_samples_alone(remote: Shards, http: ShardServer, urls: list[str]) -> None:
    ids = every_id(remote)[:40]
    expected = plain(urls)
    samples = Dataset(remote).__getitems__(ids)
    assert contents(samples) == contents([expected[each] for each in ids])
    assert samples[0]["__url__"] == remote.locate(ids[0]).url
    assert http.num_bytes == sum(int(remote.rows(each // SHARD)["size"][each % SHARD]) for each in ids)


def test_neighbours_share_a_request(remote: Shards, http: ShardServer, urls: list[str]) -> None:
    expected = contents(plain(urls))
    ids = [10, 11, 12, 14, 60]
    assert contents(Dataset(remote).__getitems__(ids)) == [expected[each] for each in ids]
    assert len(http.requests) == 3
    assert contents(Dataset(remote, max_gap_bytes=1_000_000).__getitems__(ids)) == [expected[each] for each in ids]
    assert len(http.requests) == 3 + 2  # one a shard


@pytest.mark.parametrize("read", ["ranges", "cache"])
def test_every_sample_comes_whole_through_failing_requests(
    read: Any, remote: Shards, http: ShardServer, urls: list[str], tmp_path: Path
) -> None:
    cache: dict[str, Any] = {"cache_dir": tmp_path, "cache_bytes": 10**9} if read == "cache" else {}
    dataset = Dataset(remote, read=read, retries=PATIENT, **cache)
    http.failure_rate = 0.2 if read == "ranges" else 0.5
    ids = every_id(remote)
    samples = [sample for first in range(0, N, 20) for sample in dataset.__getitems__(ids[first : first + 20])]
    assert contents(in_order(ids, samples)) == contents(plain(urls))
    assert len(http.requests) > (200 if read == "ranges" else len(urls))


def test_a_download_goes_on_where_it_was_cut(remote: Shards, http: ShardServer, tmp_path: Path) -> None:
    dataset = Dataset(remote, read="cache", cache_dir=tmp_path, cache_bytes=10**9, retries=PATIENT)
    http.failure_rate = 0.5
    for shard in range(len(remote.urls)):
        dataset[shard * SHARD]
    continued = [asked for _, asked in http.requests if asked]
    assert continued
    assert all(int(asked[6:-1]) > 0 for asked in continued)
    assert http.num_bytes < remote.shard_bytes.sum() + len(continued) * 2**16  # only what was on its way comes twice


def test_a_server_that_is_away_is_no_damage(folder: Path, urls: list[str]) -> None:
    with ShardServer(folder) as server:
        shards = Shards([f"{server.url}/{Path(urls[0]).name}"], index_dir=folder)
    impatient = urllib3.Retry(1, backoff_factor=0.01)
    with pytest.raises(evosample.UnavailableError, match="can't be had"):
        Dataset(shards, retries=impatient, on_error="skip")[0]


def test_what_waits_for_its_turn_is_not_asked_for_any_more_after_an_error(remote: Shards, http: ShardServer) -> None:
    http.status = 403
    with pytest.raises(evosample.UnavailableError, match="answered 403"):
        Dataset(remote, num_connections=2).__getitems__(every_id(remote))
    time.sleep(0.3)
    assert len(http.requests) < N / 2


@pytest.mark.parametrize("read", ["ranges", "cache"])
def test_what_a_server_refuses_is_told(read: Any, remote: Shards, http: ShardServer, tmp_path: Path) -> None:
    cache: dict[str, Any] = {"cache_dir": tmp_path, "cache_bytes": 10**9} if read == "cache" else {}
    dataset = Dataset(remote, read=read, **cache)
    http.status = 403
    with pytest.raises(evosample.UnavailableError, match="answered 403"):
        dataset[0]
    http.status = 404
    with pytest.raises(evosample.DataLossError, match="gone"):
        dataset[0]
    assert len(http.requests) == 2  # to ask again is no use


def test_a_server_without_ranges_is_told(remote: Shards, http: ShardServer) -> None:
    http.ignores_ranges = True
    with pytest.raises(evosample.UnimplementedError, match='read="cache"'):
        Dataset(remote, on_error="skip")[0]


@pytest.mark.parametrize("read", ["ranges", "cache"])
def test_a_shard_that_has_grown_on_its_server_has_changed(read: Any, own_urls: list[str], tmp_path: Path) -> None:
    cache: dict[str, Any] = {"cache_dir": tmp_path / "cache", "cache_bytes": 10**9} if read == "cache" else {}
    with ShardServer(tmp_path) as server:
        shards = Shards([f"{server.url}/{Path(url).name}" for url in own_urls], index_dir=tmp_path)
        with Path(own_urls[0]).open("ab") as shard:
            shard.write(bytes(512))
        dataset = Dataset(shards, read=read, **cache)
        with pytest.raises(evosample.DataLossError, match=r"expected [\d,]+: it is truncated or has changed"):
            dataset[0]
        assert dataset[SHARD]["cls"]


# The cache


def cached(shards: Shards, folder: Path, num_shards: int, **options: Any) -> Dataset:
    """A dataset whose cache has room for so many of the largest shards."""
    options = {"retries": PATIENT} | options
    num_bytes = num_shards * int(shards.shard_bytes.max())
    return Dataset(shards, read="cache", cache_dir=folder, cache_bytes=num_bytes, **options)


def size_of(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def _read_all(dataset: Dataset, first: int, digits: Any) -> None:
    """All samples in their order, but begun with those from `first` on."""
    ids = [*range(first, N), *range(first)]
    samples = [sample for first in range(0, N, 20) for sample in dataset.__getitems__(ids[first : first + 20])]
    digits.put([int(sample["cls"]) for sample in in_order(ids, samples)])


def test_processes_share_a_cache_that_stays_bounded(
    remote: Shards, http: ShardServer, urls: list[str], tmp_path: Path
) -> None:
    dataset = cached(remote, tmp_path, 2)
    bound = 2 * int(remote.shard_bytes.max())
    http.failure_rate = 0.05
    context = multiprocessing.get_context("fork")
    digits = context.Queue()
    readers = [context.Process(target=_read_all, args=(dataset, first, digits)) for first in (0, 100, 200)]
    for reader in readers:
        reader.start()
    sizes = []
    while any(reader.is_alive() for reader in readers):
        sizes.append(size_of(tmp_path))
        time.sleep(0.001)
    for reader in readers:
        reader.join()
        assert digits.get() == [int(sample["cls"]) for sample in plain(urls)]
    assert [reader.exitcode for reader in readers] == [0, 0, 0]
    assert max(sizes) > 0
    assert max(sizes) <= bound


def test_a_shard_is_downloaded_once_for_all_processes(remote: Shards, http: ShardServer, tmp_path: Path) -> None:
    dataset = cached(remote, tmp_path, len(remote.urls))
    loader = DataLoader(dataset, batch_size=10, shuffle=True, num_workers=3, collate_fn=list)
    assert len(list(itertools.chain(*loader))) == N
    assert len(http.requests) == len(remote.urls)
    cached(remote, tmp_path, len(remote.urls))[0]
    assert len(http.requests) == len(remote.urls)


def test_what_was_used_longest_ago_makes_room(remote: Shards, http: ShardServer, tmp_path: Path) -> None:
    dataset = cached(remote, tmp_path, 3)
    for shard in (0, 1, 2, 0, 3):
        dataset[shard * SHARD]
    http.requests.clear()
    for shard in (0, 2, 3):
        dataset[shard * SHARD]
    assert not http.requests
    dataset[1 * SHARD]
    assert len(http.requests) == 1


def test_a_shard_beyond_the_bound_is_refused(remote: Shards, tmp_path: Path) -> None:
    with pytest.raises(evosample.InvalidArgumentError, match="the largest shard alone") as raised:
        Dataset(remote, read="cache", cache_dir=tmp_path, cache_bytes=int(remote.shard_bytes.max()) - 1)
    assert raised.value.field == "cache_bytes"


def test_what_a_killed_download_leaves_takes_no_room(remote: Shards, tmp_path: Path) -> None:
    dataset = cached(remote, tmp_path, 1)
    (tmp_path / "mnist-005.tar.00000000.part").write_bytes(bytes(int(remote.shard_bytes[0])))
    assert dataset[0]["cls"]
    assert not list(tmp_path.glob("*.part"))


def test_files_of_others_in_the_folder_stay(remote: Shards, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_bytes(bytes(10**6))
    dataset = cached(remote, tmp_path, 1)
    assert dataset[0]["cls"]
    assert dataset[SHARD]["cls"]
    assert (tmp_path / "thesis.tex").exists()


def test_a_damaged_copy_is_fetched_again(remote: Shards, http: ShardServer, tmp_path: Path) -> None:
    dataset = cached(remote, tmp_path, 2)
    expected = dataset[0]
    (copy,) = tmp_path.glob("*.shard")
    copy.write_bytes(bytes(copy.stat().st_size))
    assert dataset[0] == expected
    assert len(http.requests) == 2


def test_prefetching_brings_shards_in_their_order(remote: Shards, http: ShardServer, tmp_path: Path) -> None:
    dataset = cached(remote, tmp_path, len(remote.urls))
    assert dataset.prefetch_samples == N
    order = [4, 1, 5, 0]
    dataset.prefetch(
        np.array([shard * SHARD + sample for shard in order for sample in range(SHARD)]), dataset.prefetch_samples
    )
    wait_until(lambda: len(list(tmp_path.glob("*.shard"))) == len(order), "all four shards")
    assert [path for path, _ in http.requests] == [f"/mnist-{shard:03d}.tar" for shard in order]
    for shard in order:
        dataset[shard * SHARD]
    assert len(http.requests) == len(order)


def test_prefetching_deletes_nothing_that_is_still_needed(remote: Shards, http: ShardServer, tmp_path: Path) -> None:
    dataset = cached(remote, tmp_path, 3)
    assert dataset.prefetch_samples < 2 * SHARD
    whole = [np.arange(SHARD) + shard * SHARD for shard in range(6)]
    dataset.prefetch(whole[0][:20], dataset.prefetch_samples)
    dataset.prefetch(whole[1][:20], dataset.prefetch_samples)
    dataset.prefetch(whole[2][:20], dataset.prefetch_samples)  # now the window is not yet over: all three are needed
    dataset.prefetch(whole[3][:5], dataset.prefetch_samples)

    def there() -> set[int]:
        return {int(path.name[6:9]) for path in tmp_path.glob("*.shard")}

    wait_until(lambda: there() == {0, 1, 2}, "the first three shards")
    time.sleep(0.3)
    assert there() == {0, 1, 2}
    dataset.prefetch(whole[3][5:], dataset.prefetch_samples)
    dataset.prefetch(
        whole[3], dataset.prefetch_samples
    )  # 20 + 20 + 50 + 50: those of shard 0 lie more than a window and a quarter behind
    wait_until(lambda: there() == {1, 2, 3}, "the fourth shard in the place of the first")


def test_workers_read_while_shards_are_prefetched(
    remote: Shards, http: ShardServer, urls: list[str], tmp_path: Path
) -> None:
    dataset = cached(remote, tmp_path, len(remote.urls))
    http.failure_rate = 0.2
    dataset.prefetch(np.arange(N), dataset.prefetch_samples)
    loader = DataLoader(dataset, batch_size=10, num_workers=3, collate_fn=list)
    assert contents(list(itertools.chain(*loader))) == contents(plain(urls))


def test_samples_may_be_arrays(urls: list[str]) -> None:
    dataset = Dataset(Shards(urls), on_error="skip").decode("l8").map(lambda sample: sample["png"])
    assert [image.shape for image in dataset.__getitems__([0, 1])] == [(28, 28)] * 2


def test_other_ways_of_reading_take_no_notice_of_prefetching(urls: list[str], remote: Shards) -> None:
    for dataset in (Dataset(Shards(urls)), Dataset(remote)):
        assert dataset.prefetch_samples == 0
        dataset.prefetch(np.arange(10), dataset.prefetch_samples)


def test_a_training_job_through_a_small_cache_downloads_a_shard_about_once_an_epoch(
    remote: Shards, http: ShardServer, client: evosample.Client, name: str, tmp_path: Path
) -> None:
    job = Job(client, name, cached(remote, tmp_path, 4), num_epochs=3, num_workers=1)
    job.train()
    assert len(http.requests) <= 3 * len(remote.urls)
    assert job.experiment.export_scores().num_visits.min() >= 2


def test_a_failed_prefetch_leaves_it_to_the_reader(
    remote: Shards, http: ShardServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = cached(remote, tmp_path, 3, retries=urllib3.Retry(0))
    http.status = 503
    dataset.prefetch(np.arange(10), dataset.prefetch_samples)
    wait_until(lambda: "prefetching" in caplog.text, "a warning")
    http.status = 0
    assert dataset[0]["cls"]


def test_shards_that_want_a_header_are_indexed_and_read(
    http: ShardServer, urls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    http.token = "secret"
    behind = [f"{http.url}/{Path(url).name}" for url in urls]
    with pytest.raises(evosample.UnavailableError, match=r"answered 401.*--header"):
        index_shards(behind, tmp_path)
    index = ["index", *behind, "--output", str(tmp_path)]
    done = CliRunner().invoke(cli.app, [*index, "--header", "Authorization: Bearer secret"])
    assert f"{N} samples in {len(urls)} shards" in done.output
    shards = Shards(behind, index_dir=tmp_path)
    dataset = Dataset(shards, headers={"Authorization": "Bearer secret"})
    assert contents(dataset.__getitems__(list(range(N)))) == contents(plain(urls))
    done = CliRunner().invoke(cli.app, [*index, "--force", "--header", "secret"])
    assert "expected 'NAME: VALUE'" in str(done.exception)


def test_a_download_that_breaks_off_makes_no_index(http: ShardServer, urls: list[str], tmp_path: Path) -> None:
    http.failure_rate = 1
    behind = [f"{http.url}/{Path(urls[0]).name}"]
    for seed in range(8):  # it is cut, or refused until the retries are over
        http.random.seed(seed)
        with pytest.raises(evosample.UnavailableError, match="can't be had"):
            index_shards(behind, tmp_path)
    assert not list(tmp_path.iterdir())


def test_pipes_are_read_through_the_cache(urls: list[str], tmp_path: Path) -> None:
    pipes = [f"pipe:cat {shlex.quote(url)}" for url in urls]
    index_shards(pipes, tmp_path / "indexes")
    shards = Shards(pipes, index_dir=tmp_path / "indexes")
    ids = every_id(shards)
    samples = cached(shards, tmp_path / "cache", 2).__getitems__(ids)
    assert contents(in_order(ids, samples)) == contents(plain(urls))
    with pytest.raises(evosample.InvalidArgumentError, match='read="cache"'):
        Dataset(shards)


def test_a_pipe_that_fails_is_told(own_urls: list[str], tmp_path: Path) -> None:
    pipes = [f"pipe:cat {own_urls[0]}"]
    index_shards(pipes, tmp_path)
    Path(own_urls[0]).unlink()
    dataset = cached(Shards(pipes, index_dir=tmp_path), tmp_path / "cache", 1, retries=urllib3.Retry(1))
    with pytest.raises(evosample.UnavailableError, match=r"pipe:cat .* can't be had"):
        dataset[0]
    with pytest.raises(evosample.DataLossError, match="can't be read"):
        index_shards(pipes, tmp_path, force=True)


# Damage


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def corrupt(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size * 3 // 4)
        file.write(b"?" * 6_000)


def replace(path: Path) -> None:
    data = path.read_bytes()
    path.with_suffix(".new").write_bytes(data[4096:] + data[:4096])
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("damage", [truncate, corrupt, replace, Path.unlink])
def test_damage_is_told_with_shard_offset_and_key(
    damage: Callable[[Path], None], own_urls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    expected = plain(own_urls)
    damage(Path(own_urls[0]))
    shards = Shards(own_urls)
    with pytest.raises(evosample.DataLossError) as raised:
        Dataset(shards).__getitems__(list(range(len(shards))))
    told = str(raised.value)
    assert own_urls[0] in told
    assert "evosample index --force" in told
    if damage is not Path.unlink:
        lost = next(each for each in range(SHARD) if repr(shards.locate(each).key) in told)
        assert f"at byte {shards.rows(0)['offset'][lost]:,}" in told
    dataset = Dataset(shards, on_error="skip").decode("l8")
    with caplog.at_level(logging.WARNING, "evosample"):
        samples = dataset.__getitems__(list(range(len(shards))))
        dataset.__getitems__(list(range(10)))
    assert len(caplog.records) == 1
    assert told in caplog.text
    num_lost = sum(sample is None for sample in samples)
    assert 0 < num_lost <= dataset.num_skipped
    for sample, plain_sample in zip(samples, expected, strict=True):
        assert sample is None or sample["__key__"] == plain_sample["__key__"]
    assert None not in samples[SHARD:]


def test_a_filter_that_fails_says_on_which_sample(urls: list[str], caplog: pytest.LogCaptureFixture) -> None:
    def picky(sample: dict[str, Any]) -> dict[str, Any]:
        if sample["cls"] == b"3":
            raise RuntimeError("no threes")
        return sample

    shards = Shards(urls)
    digits = [int(sample["cls"]) for sample in plain(urls)]
    first = shards.locate(digits.index(3))
    with pytest.raises(RuntimeError) as raised:
        Dataset(shards).map(picky).__getitems__(list(range(N)))
    assert first.key in raised.value.__notes__[0]
    dataset = Dataset(shards, on_error="skip").map(picky).decode("l8").to_tuple("png", "cls")
    samples = dataset.__getitems__(list(range(N)))
    assert [sample and sample[1] for sample in samples] == [None if digit == 3 else digit for digit in digits]
    assert dataset.num_skipped == digits.count(3)
    assert first.key in caplog.text


def test_a_filter_that_drops_a_planned_sample_is_told(urls: list[str]) -> None:
    even = Dataset(Shards(urls)).select(lambda sample: int(sample["__key__"]) % 2 == 0)
    with pytest.raises(evosample.UsageError, match="has dropped sample"):
        even.__getitems__(list(range(N)))
    skipping = Dataset(Shards(urls), on_error="skip").select(lambda sample: int(sample["__key__"]) % 2 == 0)
    assert skipping.__getitems__(list(range(N))).count(None) == skipping.num_skipped == N // 2


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_filter_that_takes_no_samples_is_told(urls: list[str], on_error: Any) -> None:
    def failing(samples: Iterator[Any]) -> Iterator[Any]:
        raise FileNotFoundError("missing.pt")
        yield

    dataset = Dataset(Shards(urls), on_error=on_error)
    with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
        dataset.compose(failing)[0]
    with pytest.raises(evosample.UsageError, match="without taking a sample"):
        dataset.compose(lambda _: iter([]))[0]


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_filter_that_looks_ahead_is_told(urls: list[str], on_error: Any) -> None:
    def late(samples: Iterator[Any]) -> Iterator[Any]:
        before = next(samples)
        for sample in samples:
            yield before
            before = sample
        yield before

    dataset = Dataset(Shards(urls), on_error=on_error).compose(late)
    with pytest.raises(evosample.UsageError, match="takes samples ahead"):
        dataset.__getitems__([0, 1, 2])


def test_filters_for_streams_are_refused(urls: list[str]) -> None:
    dataset = Dataset(Shards(urls))
    for compose in (
        lambda: dataset.shuffle(100),
        lambda: dataset.batched(10),
        lambda: dataset.slice(10),
        lambda: dataset.mcached(),
        lambda: dataset.compose(webdataset.detshuffle()),
    ):
        with pytest.raises(evosample.UsageError, match="is for streams"):
            compose()
    with pytest.raises(evosample.UsageError, match="several samples of one"):
        dataset.compose(_twice)[0]


def _twice(samples: Iterator[Any]) -> Iterator[Any]:
    for sample in samples:
        yield sample
        yield sample


# Indexes


def run(*arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, ["index", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == exit_code
    return result.output


def test_the_command_indexes_what_is_not_up_to_date(own_urls: list[str], tmp_path: Path) -> None:
    pattern = str(tmp_path / "mnist-{000..001}.tar")
    first = Path(f"{own_urls[0]}.idx.npy")
    expected = first.read_bytes()
    first.unlink()
    output = run(pattern)
    assert "100 samples in 2 shards; 1 indexes were up to date" in output
    assert first.read_bytes() == expected
    assert "2 indexes were up to date" in run(pattern)
    assert "0 indexes were up to date" in run(pattern, "--force")
    write_tar(Path(own_urls[1]), ["new.txt"])
    assert "51 samples in 2 shards; 1 indexes" in run(pattern)
    first.write_bytes(expected[:-1] + bytes([expected[-1] ^ 1]))
    output = run(pattern)
    assert "was damaged; it is made anew" in " ".join(output.split())
    assert first.read_bytes() == expected
    assert not list(tmp_path.glob(".*"))


def test_the_command_indexes_over_http(http: ShardServer, urls: list[str], tmp_path: Path) -> None:
    run(f"{http.url}/mnist-{{000..005}}.tar", "--output", str(tmp_path / "made"))
    for url in urls:
        assert (tmp_path / "made" / f"{Path(url).name}.idx.npy").read_bytes() == Path(f"{url}.idx.npy").read_bytes()
    with pytest.raises(evosample.InvalidArgumentError, match="--output"):
        run(f"{http.url}/mnist-000.tar")


def test_help_teaches() -> None:
    result = CliRunner().invoke(cli.app, ["index", "--help"], env={"COLUMNS": "200"})
    for taught in ("train-{000..029}.tar", "https://", "pipe:", "--output", "--force"):
        assert taught in result.output


@pytest.mark.parametrize("harm", [Path.unlink, truncate, lambda path: path.write_bytes(b"?")])
def test_a_missing_or_damaged_index_names_the_command_that_makes_it(
    harm: Callable[[Path], None], own_urls: list[str]
) -> None:
    harm(Path(f"{own_urls[1]}.idx.npy"))
    with pytest.raises(evosample.EvosampleError) as raised:
        Shards(own_urls)
    (command,) = [part for part in str(raised.value).split("`") if part.startswith("evosample index")]
    assert f"{own_urls[1]}.idx.npy" in str(raised.value)
    run(*shlex.split(command)[2:])
    assert len(Shards(own_urls)) == 2 * SHARD


def bad_shard(path: Path, what: str) -> str:
    """A shard that can't be indexed."""
    url = write_tar(path, ["a.png", "a.cls", "b.png", "b.cls"])
    data = bytearray(path.read_bytes())
    if what == "missing":
        path.unlink()
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "no samples":
        write_tar(path, ["README"])
    elif what == "apart":
        write_tar(path, ["a.png", "b.png", "a.cls"])
    elif what == "twice":
        write_tar(path, ["a.png", "a.PNG"])
    elif what == "compressed":
        path.write_bytes(gzip.compress(data))
    elif what == "truncated":
        path.write_bytes(data[:3072])
    elif what == "truncated in a member":
        path.write_bytes(data[:2700])
    elif what == "header truncated":
        path.write_bytes(data[:2300])
    elif what == "header damaged":
        data[2048 + 10] ^= 1
        path.write_bytes(data)
    return url


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("missing", "No such file"),
        ("empty", "no sound tar file"),
        ("no samples", "holds no samples"),
        ("apart", "members of sample 'a' don't follow each other"),
        ("twice", "two members .png"),
        ("compressed", "compressed"),
        ("truncated", "truncated at byte 3072"),
        ("truncated in a member", "unexpected end of data"),
        ("header truncated", "damaged at byte 2048"),
        ("header damaged", "damaged at byte 2048"),
    ],
)
def test_a_shard_that_can_not_be_indexed_is_told(what: str, told: str, tmp_path: Path) -> None:
    url = bad_shard(tmp_path / "bad.tar", what)
    with pytest.raises(evosample.DataLossError, match=told) as raised:
        index_shards([url])
    assert url in str(raised.value)
    assert not list(tmp_path.glob("*.npy"))


def test_shards_that_would_share_an_index_are_refused(own_urls: list[str], tmp_path: Path) -> None:
    with pytest.raises(evosample.InvalidArgumentError, match="would share the index"):
        Shards([own_urls[0], own_urls[0]])
    with pytest.raises(evosample.InvalidArgumentError, match="at least one"):
        Shards([])
    with pytest.raises(evosample.InvalidArgumentError, match="can't be opened"):
        index_shards(["s4://bucket/0.tar"], tmp_path)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"read": "tape"}, "read"),
        ({"on_error": "ignore"}, "on_error"),
        ({"max_gap_bytes": -1}, "max_gap_bytes"),
        ({"num_connections": 0}, "num_connections"),
        ({"read": "cache"}, "cache_dir"),
        ({"cache_bytes": 10}, "cache_dir"),
        ({"shards": "train.tar"}, "shards"),
    ],
)
def test_bad_arguments_are_told(options: dict[str, Any], field: str, urls: list[str]) -> None:
    with pytest.raises(evosample.InvalidArgumentError) as raised:
        Dataset(**({"shards": Shards(urls)} | options))
    assert raised.value.field == field
