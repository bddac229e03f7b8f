"""Reading WebDataset shards by sample id, against plain webdataset: `python benchmarks/shards.py [--quick]`.

MNIST in 30 shards, as PNG and label. Side by side and in turn, an epoch each: plain `webdataset.WebDataset` over the
files; `evosample.webdataset.Dataset` over the same files, planned by a private server that prunes nothing; and the same
from an HTTP server that fails 5 % of all requests, through a cache that has room for two thirds of the shards. All
decode and collate alike, in 4 workers, and train a linear model, so that loading is what takes time. Then the bytes
that a pruned epoch reads, how many shards a batch comes from, and how mixed its labels are.

Ends with exit code 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import urllib3
import webdataset
from numpy.typing import NDArray
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/webdataset"))

from mnist_shards import write_shards

import evosample
import evosample.torch
from evosample.webdataset import Dataset, Shards, index_shards

SERVER = Path(__file__).parents[1] / "tests/shard_server.py"
BATCH_SIZE = 256
NUM_WORKERS = 4
PRUNE_RATIO = 0.3
FAILURE_RATE = 0.05
MIN_SPEED_RATIO = 0.90

Row = tuple[str, str, str, bool | None]
"""What, its figure, the target in words, and whether it was met: None if there is no target."""


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="few samples: whether it works; speeds are not judged")
    options = arguments.parse_args()
    num_samples, num_shards, repeats = (3_000, 30, 1) if options.quick else (60_000, 30, 5)
    warnings.filterwarnings("ignore", "This DataLoader will create")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name, evosample.connect() as client:
        folder = Path(name)
        urls = write_shards(folder, num_samples, samples_per_shard=num_samples // num_shards)
        began_s = time.perf_counter()
        index_shards(urls)
        index_s = time.perf_counter() - began_s
        with http_server(folder, FAILURE_RATE) as failing, http_server(folder, 0.0) as sound:
            rows: list[Row] = [("index, samples/s", f"{num_samples / index_s:,.0f}", "", None)]
            speeds, scores = measure_speeds(client, urls, failing, folder, repeats)
            rows += speed_rows(speeds, is_judged=not options.quick)
            downloaded = num_bytes_sent(failing) / sum(Path(url).stat().st_size for url in urls) / (repeats + 1)
            rows.append(("the same, bytes downloaded in an epoch / bytes of all shards", f"{downloaded:.2f}", "", None))
            rows += byte_rows(client, urls, sound, folder, scores)
        rows += batch_rows(client, urls, "shards in random order")
        sorted_folder = folder / "sorted"
        sorted_folder.mkdir()
        sorted_urls = write_shards(
            sorted_folder, num_samples, samples_per_shard=num_samples // num_shards, sorted_by_label=True
        )
        index_shards(sorted_urls)
        rows += batch_rows(client, sorted_urls, "shards sorted by label")
    print(f"MNIST, {num_samples:,} samples in {num_shards} shards; medians of {repeats} epochs each")
    for what, figure, target, is_met in rows:
        print(f"  {what:92} {figure:>7}  {target:8} {'' if is_met is None else 'met' if is_met else 'MISSED'}")
    raise SystemExit(any(is_met is False for *_, is_met in rows))


# Speed


def decoded(dataset: Any) -> Any:
    """The same filters for both."""
    return dataset.decode("torchl8").to_tuple("png", "cls")


def train(batches: Iterable[Any], mean: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Train a linear model; samples/s."""
    model = torch.nn.Linear(28 * 28, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    num_samples = 0
    began_s = time.perf_counter()
    for images, digits in batches:
        loss = mean(losses_of(model, images, digits))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        num_samples += len(digits)
    return num_samples / (time.perf_counter() - began_s)


def losses_of(model: torch.nn.Module, images: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
    """Per sample."""
    return torch.nn.functional.cross_entropy(model(images.flatten(1) / 255), digits, reduction="none")


def plain_loader(urls: list[str]) -> DataLoader[Any]:
    """What one would write without evosample."""
    dataset = decoded(webdataset.WebDataset(urls, shardshuffle=100).shuffle(1000))
    return DataLoader(dataset, batch_size=BATCH_SIZE, num_workers=NUM_WORKERS)


def planned_loader(
    client: evosample.Client, name: str, dataset: Dataset, num_epochs: int, *, num_workers: int, **spec: Any
) -> evosample.torch.Loader:
    """A loader of an experiment of its own."""
    settings: dict[str, Any] = {"policy": evosample.Uniform(), "shard_sizes": dataset.shards.shard_sizes} | spec
    experiment = client.create_experiment(
        name, num_samples=len(dataset), num_epochs=num_epochs, meta_batch_size=BATCH_SIZE, **settings
    )
    model = torch.nn.Linear(28 * 28, 10)
    return evosample.torch.Loader(
        decoded(dataset), experiment, model=model, score=lambda batch: losses_of(model, *batch), num_workers=num_workers
    )


def slug(what: str) -> str:
    """A name for an experiment."""
    return what.replace(" ", "-")


def measure_speeds(
    client: evosample.Client, urls: list[str], server: str, folder: Path, repeats: int
) -> tuple[dict[str, list[float]], evosample.ExportedScores]:
    """Samples/s of each kind, and the scores after all epochs."""
    shards, remote = Shards(urls), remote_shards(server, urls, folder)
    cache_bytes = 2 * int(shards.shard_bytes.sum()) // 3
    through_cache = Dataset(remote, read="cache", cache_dir=folder / "cache", cache_bytes=cache_bytes)
    local = planned_loader(client, "local", Dataset(shards), repeats + 1, num_workers=NUM_WORKERS)
    cached = planned_loader(client, "cached", through_cache, repeats + 1, num_workers=NUM_WORKERS)
    kinds: dict[str, Callable[[], float]] = {
        "plain webdataset, local files": lambda: train(plain_loader(urls), torch.mean),
        "evosample, local files": lambda: train(local, local.mean),
        "evosample, failing HTTP server, whole shards cached": lambda: train(cached, cached.mean),
    }
    speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for repeat in range(repeats + 1):  # in turn, so that a noisy neighbour slows all alike
        for kind, measure in kinds.items():
            speed = measure()
            if repeat:  # the first time files come from the disk
                speeds[kind].append(speed)
    return speeds, local.experiment.export_scores()


def speed_rows(speeds: dict[str, list[float]], *, is_judged: bool) -> list[Row]:
    """Medians, and ratios to the first."""
    medians = {kind: statistics.median(each) for kind, each in speeds.items()}
    rows: list[Row] = [(f"{kind}, samples/s", f"{median:,.0f}", "", None) for kind, median in medians.items()]
    plain, *others = medians
    for kind in others:
        ratio = medians[kind] / medians[plain]
        is_met = ratio >= MIN_SPEED_RATIO if is_judged else None
        rows.append((f"{kind} / {plain}", f"{ratio:.2f}", f">= {MIN_SPEED_RATIO:.2f}", is_met))
    return rows


# HTTP


@contextlib.contextmanager
def http_server(folder: Path, failure_rate: float) -> Iterator[str]:
    """A server of the folder in a process of its own."""
    command = [sys.executable, str(SERVER), str(folder), "--failure-rate", str(failure_rate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def remote_shards(server: str, urls: list[str], folder: Path) -> Shards:
    """The same shards on the server."""
    return Shards([f"{server}/{Path(url).name}" for url in urls], index_dir=folder)


def num_bytes_sent(server: str) -> int:
    """What the server has sent so far."""
    return int(json.loads(urllib3.request("GET", f"{server}/counts").data)["bytes"])


# Bytes


def byte_rows(
    client: evosample.Client, urls: list[str], server: str, folder: Path, scores: evosample.ExportedScores
) -> list[Row]:
    """What a pruned epoch reads, of files and by HTTP ranges; against the bytes of all samples."""
    shards, remote = Shards(urls), remote_shards(server, urls, folder)
    sizes = sample_sizes(shards)
    policy = evosample.EvolvedSampling(prune_ratio=PRUNE_RATIO)
    rows: list[Row] = []
    for kind, dataset, num_read in (
        ("local files", Dataset(shards), num_bytes_of_process),
        ("HTTP ranges", Dataset(remote), lambda: num_bytes_sent(server)),
    ):
        settings = {"policy": policy, "mini_batch_size": BATCH_SIZE // 4, "initial_scores": scores}
        loader = planned_loader(client, f"pruned-{slug(kind)}", dataset, 2, num_workers=0, **settings)
        before = num_read()
        with shard_openings() as openings:
            train(loader, loader.mean)
        share = (num_read() - before) / int(sizes.sum())
        rows.append(
            (
                f"{kind}: bytes of an epoch that prunes {PRUNE_RATIO} / bytes of all samples",
                f"{share:.4f}",
                f"<= {1 - PRUNE_RATIO}",
                share <= 1 - PRUNE_RATIO,
            )
        )
        if openings:
            rows.append((f"{kind}: shards opened in that epoch, of {len(urls)}", f"{len(openings)}", "", None))
    return rows


def sample_sizes(shards: Shards) -> NDArray[np.uint64]:
    """Bytes of each sample, with its headers."""
    return np.concatenate([shards.rows(shard)["size"][:-1] for shard in range(len(shards.urls))])


def num_bytes_of_process() -> int:
    """Bytes that this process has read from files."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


_openings: list[str] = []


@contextlib.contextmanager
def shard_openings() -> Iterator[list[str]]:
    """Collects the shards that this process opens."""
    _openings.clear()
    yield _openings


def _note_opening(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and str(arguments[0]).endswith(".tar"):
        _openings.append(str(arguments[0]))


sys.addaudithook(_note_opening)


# Batches


def batch_rows(client: evosample.Client, urls: list[str], what: str) -> list[Row]:
    """Shards and label entropy of a batch, for both ways to shuffle."""
    shards = Shards(urls)
    digits = np.array(
        [
            int(sample["cls"])
            for first in range(0, len(shards), 1000)
            for sample in Dataset(shards).__getitems__(range(first, min(first + 1000, len(shards))))
        ]
    )
    rows: list[Row] = []
    for kind, sizes in (("shuffled by shard", shards.shard_sizes), ("shuffled globally", ())):
        experiment = client.create_experiment(
            slug(f"{what} {kind}"),
            num_samples=len(shards),
            num_epochs=1,
            meta_batch_size=BATCH_SIZE,
            policy=evosample.Uniform(),
            shard_sizes=sizes,
        )
        num_shards, entropies = [], []
        for epoch in experiment.epochs():
            for batch in epoch:
                batch.report(np.zeros(len(batch.sample_ids)))
                num_shards.append(len(np.unique(shards.shards_of(batch.sample_ids))))
                entropies.append(entropy(digits[batch.sample_ids]))
        rows.append((f"{what}, {kind}: shards of a batch", f"{statistics.mean(num_shards):.1f}", "", None))
        rows.append((f"{what}, {kind}: label entropy of a batch, bits", f"{statistics.mean(entropies):.3f}", "", None))
    return rows


def entropy(digits: NDArray[np.int64]) -> float:
    """Of the labels of a batch, in bits."""
    shares = np.bincount(digits) / len(digits)
    return -sum(float(share * np.log2(share)) for share in shares if share)


if __name__ == "__main__":
    main()
