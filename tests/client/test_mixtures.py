"""Mixtures and floors on real data: digits of three domains, and rare classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from mnist_arrays import load_digits
from numpy.typing import NDArray
from sklearn.datasets import load_digits as load_small_digits
from torch.nn import functional

import evosample
import evosample.torch

NUM_EPOCHS = 8
DOMAINS = ("digits", "MNIST", "rotated MNIST")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def three_domains() -> tuple[torch.Tensor, torch.Tensor, NDArray[np.int64]]:
    """Images of 14 x 14 points, the digits that they show, and from which domain each comes."""
    small = load_small_digits()
    of_small = torch.tensor(small.images, dtype=torch.float32)[:, None] / 16
    images, digits = load_digits(3_600, 0)[0]
    large = torch.tensor(images).reshape(-1, 1, 28, 28)
    domains = [of_small, large[:1_800], torch.rot90(large[1_800:], 1, (2, 3))]
    pixels = torch.cat([functional.interpolate(domain, (14, 14), mode="bilinear") for domain in domains])
    labels = torch.cat([torch.tensor(small.target), torch.tensor(digits)])
    return pixels, labels.long(), np.repeat(np.arange(3), [len(domain) for domain in domains])


def train(
    experiment: evosample.Experiment, images: torch.Tensor, labels: torch.Tensor, rate: float = 0.05
) -> torch.Tensor:
    """Train a linear model through all epochs; the losses that it ends with, one a sample."""
    torch.manual_seed(0)
    model = torch.nn.Linear(images[0].numel(), 10)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)

    def per_sample(batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0].flatten(1)), batch[1], reduction="none")

    dataset = torch.utils.data.TensorDataset(images, labels)
    loader = evosample.torch.Loader(dataset, experiment, model=model, score=per_sample)
    for _ in range(experiment.spec.num_epochs):
        for batch in loader:
            loader.mean(per_sample(batch)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    experiment.export_scores()
    with torch.no_grad():
        found: torch.Tensor = per_sample((images, labels))
    return found


def test_doremi_moves_the_mixture_to_the_domain_with_the_largest_excess_loss(
    client: evosample.Client, name: str
) -> None:
    images, labels, domains = three_domains()
    sizes: dict[str, Any] = {"num_samples": len(images), "meta_batch_size": 50, "num_epochs": NUM_EPOCHS}
    half = evosample.RandomSubset(prune_ratio=0.5)
    reference = client.create_experiment(f"{name}-reference", policy=half, **sizes)
    reference_losses = train(reference, images, labels).numpy()
    experiment = client.create_experiment(
        name, policy=half, groups=domains, mixture=evosample.DoReMi(), reference_losses=reference_losses, **sizes
    )
    train(experiment, images, labels, rate=0.02)  # so that there is something to catch up with
    history = [past.summary.groups for past in experiment.history()]
    excess = np.array([[group.excess_loss for group in groups] for groups in history])
    weights = np.array([[group.weight for group in groups] for groups in history])
    hardest = int(excess.sum(0).argmax())
    assert weights[0].tolist() == pytest.approx(np.bincount(domains) / len(domains))
    moved = weights[-1] - weights[0]
    assert moved.argmax() == hardest, (DOMAINS[hardest], moved)
    assert moved[hardest] > 0.05
    assert moved[excess.sum(0).argmin()] < 0
    rows = np.array([group.num_rows for group in history[-1]])
    np.testing.assert_allclose(rows / rows.sum(), weights[-1], atol=0.02)


@pytest.mark.parametrize(
    "make_policy",
    [
        lambda: evosample.EvolvedSampling(prune_ratio=0.5),
        lambda: evosample.UCB(prune_ratio=0.5),
        evosample.InfoBatch,
    ],
    ids=["ESWP", "UCB", "InfoBatch"],
)
def test_no_class_of_long_tailed_mnist_falls_under_its_floor(
    client: evosample.Client, name: str, make_policy: Callable[[], evosample.Policy]
) -> None:
    images, digits = load_digits(6_000, 0)[0]
    some = np.sort(
        np.concatenate([np.flatnonzero(digits == digit)[: round(500 * 100 ** (-digit / 9))] for digit in range(10)])
    )
    floor, classes = 0.45, digits[some]
    shares: dict[float, list[float]] = {}
    for least in (floor, 0.0):
        experiment = client.create_experiment(
            f"{name}-{least}",
            num_samples=len(some),
            num_epochs=NUM_EPOCHS,
            meta_batch_size=20,
            policy=make_policy(),
            groups=classes,
            group_floor=least,
        )
        train(experiment, torch.tensor(images[some]), torch.tensor(classes))
        shares[least] = [
            min(group.num_rows / group.num_samples for group in past.summary.groups) for past in experiment.history()
        ]
    assert min(shares[floor]) >= floor
    assert min(shares[0.0]) < floor, "the floor has something to do"
