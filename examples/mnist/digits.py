"""MNIST and what is made of it: a domain or class that is rare, or labels that are wrong; and a small CNN for it."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from mnist_arrays import Digits, load_digits
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import Dataset

MAX_LEARNING_RATE = 8e-3
IMBALANCE = 100
WRONG_SHARE = 0.2
NUM_DOMAINS = 8

Batch = tuple[torch.Tensor, torch.Tensor]


class Mnist(Dataset[Batch]):
    """Images, float32 [n, 1, 28, 28], and their digits, int64 [n].

    Args:
        images: float32 [n, 784] in [0, 1].
        is_small: halve height and width.
    """

    def __init__(self, images: NDArray[np.float32], digits: NDArray[np.int64], *, is_small: bool = False) -> None:
        self.images = torch.from_numpy((images.reshape(-1, 1, 28, 28) - 0.1307) / 0.3081)
        if is_small:
            self.images = nn.functional.avg_pool2d(self.images, 2)
        self.digits = torch.from_numpy(digits)

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, sample_id: int) -> Batch:
        return self.images[sample_id], self.digits[sample_id]

    def __getitems__(self, sample_ids: list[int]) -> Batch:
        """A whole batch at once; a DataLoader asks for it where it is there. It spares Python work on every sample."""
        return self.images[sample_ids], self.digits[sample_ids]


def load_mnist(num_train: int, num_test: int) -> tuple[Mnist, Mnist]:
    """The first samples of the training set (60,000) and of the test set (10,000)."""
    train, test = load_digits(num_train, num_test)
    return Mnist(*train), Mnist(*test)


def all_digits() -> tuple[Mnist, Mnist]:
    """All 60,000 digits."""
    train, test = _digits()
    return Mnist(*train, is_small=True), Mnist(*test, is_small=True)


def eight_domains(seed: int) -> tuple[Mnist, Mnist]:
    """Digits upright, turned by 90, 180 and 270 degrees, and each of these inverted: 10,240 of the first, then half as
    many of each next one. The test set has 1,250 of each.
    """
    train, test = _digits()
    rows = np.random.default_rng(seed).permutation(len(train.digits))
    sizes = [10_240 >> domain for domain in range(NUM_DOMAINS)]
    parts = np.split(rows[: sum(sizes)], np.cumsum(sizes)[:-1])
    tests = np.split(np.arange(len(test.digits)), NUM_DOMAINS)
    return _in_domains(train, parts), _in_domains(test, tests)


def _in_domains(digits: Digits, parts: list[NDArray[np.intp]]) -> Mnist:
    images = []
    for domain, rows in enumerate(parts):
        turned = np.rot90(digits.images[rows].reshape(-1, 28, 28), domain // 2, axes=(1, 2)).reshape(-1, 784)
        images.append(1 - turned if domain % 2 else turned)
    return Mnist(np.concatenate(images), digits.digits[np.concatenate(parts)], is_small=True)


def long_tailed(seed: int) -> tuple[Mnist, Mnist]:
    """About 12,600 digits, 100 times as many zeros as nines: class c has 5,000 * 100^(-c / 9)."""
    train, test = _digits()
    chance = np.random.default_rng(seed)
    rows = [
        chance.choice(np.flatnonzero(train.digits == digit), round(5_000 * IMBALANCE ** (-digit / 9)), replace=False)
        for digit in range(10)
    ]
    some = np.sort(np.concatenate(rows))
    return Mnist(train.images[some], train.digits[some], is_small=True), Mnist(*test, is_small=True)


def wrong_labels(seed: int) -> tuple[Mnist, Mnist]:
    """All 60,000 digits, of which 20 % have a wrong label."""
    train, test = _digits()
    chance = np.random.default_rng(seed)
    is_wrong = chance.random(len(train.digits)) < WRONG_SHARE
    wrong = (train.digits + chance.integers(1, 10, len(train.digits))) % 10
    return Mnist(train.images, np.where(is_wrong, wrong, train.digits), is_small=True), Mnist(*test, is_small=True)


@functools.cache
def _digits() -> tuple[Digits, Digits]:
    return load_digits(60_000, 10_000)


def make_model() -> nn.Module:
    """A CNN of 24,000 parameters, for images of 14 x 14."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 3 * 3, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def learning_rate(progress: float) -> float:
    """One cycle: a cosine up during the first 30 % of the steps, a cosine down to nothing during the others."""
    phase = 1 - progress / 0.3 if progress < 0.3 else (progress - 0.3) / 0.7
    return MAX_LEARNING_RATE * max(0.5 * (1 + math.cos(math.pi * phase)), 0.01)


@torch.no_grad()
def accuracy(model: nn.Module, test_set: Mnist) -> float:
    """Share of the test set that the model gets right, in [0, 1]."""
    num_right = 0
    for first in range(0, len(test_set), 500):
        rows = slice(first, first + 500)
        num_right += int((model(test_set.images[rows]).argmax(1) == test_set.digits[rows]).sum())
    return num_right / len(test_set)
