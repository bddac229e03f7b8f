"""Measures the loader against a plain DataLoader, and the wait at an epoch's end."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from performance.ranks import MINI_BATCH_SIZE, serving
from performance.rows import Row, alternate
from torch.utils.data import DataLoader, Dataset

import evosample
import evosample.torch

_NUM_FEATURES = 64
_PER_SAMPLE_S = 20e-6  # what a worker takes to load a sample


class _Rows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Batches that cost next to nothing: what is left is the loader's own."""

    def __init__(self, num_samples: int) -> None:
        self.rows = torch.randn(num_samples, _NUM_FEATURES)
        self.labels = torch.zeros(num_samples, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, sample_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Some work on every sample, as for a worker."""
        until_s = time.perf_counter() + _PER_SAMPLE_S
        while time.perf_counter() < until_s:
            pass
        return self.rows[sample_id], self.labels[sample_id]


class _WholeBatches(_Rows):
    def __getitems__(self, sample_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rows[sample_ids], self.labels[sample_ids]


def loading(num_steps: int, num_repeats: int) -> Iterator[Row]:
    """A step of the loader against one of a DataLoader, b = 64: in process, and with two workers."""
    num_samples = 4 * MINI_BATCH_SIZE * num_steps
    weights = torch.zeros(_NUM_FEATURES, requires_grad=True)
    with serving() as server, evosample.connect(server.address) as client:

        def of_both(dataset: Dataset[Any], name: str, **options: Any) -> tuple[list[float], list[float]]:
            """Microseconds a step."""
            experiment = client.create_experiment(
                name,
                num_samples=num_samples,
                num_epochs=num_repeats + 1,
                mini_batch_size=MINI_BATCH_SIZE,
                policy=evosample.EvolvedSampling(),
            )
            ours = evosample.torch.Loader(dataset, experiment, **options)
            ids = np.random.default_rng(0).permutation(num_samples)[: num_steps * MINI_BATCH_SIZE]
            batches = ids.reshape(num_steps, MINI_BATCH_SIZE).tolist()
            plain = DataLoader(dataset, batch_sampler=batches, **options)

            def step_us(loader: Iterable[Any], mean: Callable[[torch.Tensor], torch.Tensor]) -> float:
                moments = [time.perf_counter()]
                for rows, _ in loader:
                    mean((rows @ weights).exp())
                    moments.append(time.perf_counter())
                # Workers hand over batches in bursts: there the mean counts, without the start of the workers.
                if options.get("num_workers"):
                    return 1e6 * (moments[-1] - moments[2]) / (len(moments) - 3)
                return 1e6 * statistics.median(later - sooner for sooner, later in itertools.pairwise(moments))

            found = alternate(num_repeats, lambda: step_us(ours, ours.mean), lambda: step_us(plain, torch.mean))
            return found[0], found[1]

        ours, plain = of_both(_WholeBatches(num_samples), "in-process", collate_fn=_itself)
        yield Row(
            "a step of the loader, b = 64, a dataset with __getitems__, in process: more than a DataLoader's",
            [more - less for more, less in zip(ours, plain, strict=True)],
            "us",
            30,
            higher_is_better=False,
            note=f"{statistics.median(ours):.0f} against {statistics.median(plain):.0f} us",
        )
        ours, plain = of_both(_Rows(num_samples), "two-workers", num_workers=2)
        yield Row(
            "a step of the loader, b = 64, two workers, 20 us a sample",
            ours,
            "us",
            higher_is_better=False,
            compared_with="a DataLoader's",
            compared=plain,
            ratio_target=1.15,
        )


def _itself(batch: Any) -> Any:
    return batch


def epoch_ends(sizes: list[int], num_epochs: int) -> Iterator[Row]:
    """From an epoch's last losses to the next one's first batch, in the core client."""
    with serving() as server, evosample.connect(server.address) as client:
        for num_samples in sizes:
            experiment = client.create_experiment(
                f"ends-{num_samples}",
                num_samples=num_samples,
                num_epochs=num_epochs + 2,
                mini_batch_size=MINI_BATCH_SIZE,
                policy=evosample.EvolvedSampling(),
            )
            losses = np.random.default_rng(0).random(MINI_BATCH_SIZE, np.float32)
            waits, reported_s = [], 0.0
            for epoch in experiment.epochs():
                for batch in epoch:
                    if not batch.step and epoch.number > 1:
                        waits.append(1e3 * (time.perf_counter() - reported_s))
                    batch.report(losses)
                reported_s = time.perf_counter()
            yield Row(
                f"waiting in the core client at an epoch's end, {num_samples:,} samples",
                waits,
                "ms",
                6,
                higher_is_better=False,
            )
