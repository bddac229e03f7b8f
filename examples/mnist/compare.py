"""MNIST as training functions that selection methods are compared on: as it is, long-tailed, and with wrong labels.

evosample compare examples/mnist/compare.py:mnist --epochs 6 --output comparison

`train` is all that it takes to compare methods on a training of your own; `evosample compare --help` tells the rest.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from demo import META_BATCH_SIZE, MINI_BATCH_SIZE, Mnist, accuracy, learning_rate, make_model
from mnist_arrays import load_digits
from numpy.typing import NDArray
from torch.nn import functional

import evosample.torch
from evosample.comparison import Trial

IMBALANCE = 100
WRONG_SHARE = 0.2


def train(trial: Trial, train_set: Mnist, test_set: Mnist) -> dict[str, float]:
    """Train a new model as the trial says, and return what its test on the test set came to."""
    torch.manual_seed(trial.seed)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    experiment = trial.create_experiment(
        num_samples=len(train_set), meta_batch_size=META_BATCH_SIZE, mini_batch_size=MINI_BATCH_SIZE
    )

    def per_sample(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        images, digits = batch
        logits = model(images)
        losses = functional.cross_entropy(logits, digits, reduction="none")
        wants_predictions = bool(experiment.spec.policy.reported_columns)
        return losses, evosample.torch.prediction_columns(logits, digits) if wants_predictions else {}

    with trial.training():
        loader = evosample.torch.Loader(
            train_set, experiment, model=model, score=per_sample, collate_fn=lambda batch: batch
        )
        for _ in range(trial.num_epochs):
            for batch in loader:
                # By progress, not by a count of steps: methods differ in the number of steps they take.
                optimizer.param_groups[0]["lr"] = learning_rate(loader.progress) * loader.learning_rate_factor
                losses, columns = per_sample(batch)
                loader.mean(losses, **columns).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
    return {"accuracy": accuracy(model, test_set)}


def mnist(trial: Trial) -> dict[str, float]:
    """All 60,000 digits."""
    images, digits = _arrays()
    return train(trial, Mnist(images, digits), _test_set())


def long_tailed(trial: Trial) -> dict[str, float]:
    """About 12,600 digits, 100 times as many zeros as nines: class c has 5,000 * 100^(-c / 9)."""
    images, digits = _arrays()
    chance = np.random.default_rng(trial.seed)
    rows = [
        chance.choice(np.flatnonzero(digits == digit), round(5_000 * IMBALANCE ** (-digit / 9)), replace=False)
        for digit in range(10)
    ]
    some = np.sort(np.concatenate(rows))
    return train(trial, Mnist(images[some], digits[some]), _test_set())


def wrong_labels(trial: Trial) -> dict[str, float]:
    """All 60,000 digits, of which 20 % have a wrong label."""
    images, digits = _arrays()
    chance = np.random.default_rng(trial.seed)
    is_wrong = chance.random(len(digits)) < WRONG_SHARE
    wrong = (digits + chance.integers(1, 10, len(digits))) % 10
    return train(trial, Mnist(images, np.where(is_wrong, wrong, digits)), _test_set())


@functools.cache
def _arrays() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    return load_digits(60_000, 10_000)[0]


@functools.cache
def _test_set() -> Mnist:
    return Mnist(*load_digits(60_000, 10_000)[1])
