"""The draws beside each other: what they include, how long they take, and what they do to a training.

`python benchmarks/draws.py [--num-draws N] [--max-samples N] [--num-train N] [--num-seeds N]`
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/mnist"))

import compare as trainings
from digits import Mnist
from mnist_arrays import load_digits

import evosample
from evosample.comparison import Trial
from evosample.sampling import DrawMethod, Purpose, draw, random_bits

METHODS: tuple[DrawMethod, ...] = get_args(DrawMethod)
_NUM_ROWS, _NUM_DRAWN = 64, 16


def bits_of(number: int, num_rows: int) -> NDArray[np.uint64]:
    """Random bits of the draw of this number."""
    return random_bits(0, Purpose.PRUNE, number, 0, 0, num_rows)


def inclusion(num_draws: int) -> Table:
    """How often rows are drawn, and how far an estimate made from a draw varies."""
    chance = np.random.default_rng(0)
    weights = np.sort(chance.lognormal(0, 1.5, _NUM_ROWS)).astype(np.float32)
    values = weights * chance.uniform(0.5, 1.5, _NUM_ROWS)
    proportional = weights / weights.sum()
    shown = [0, _NUM_ROWS // 4, _NUM_ROWS // 2, 3 * _NUM_ROWS // 4, -2, -1]
    table = Table(
        "draw",
        *(f"w = {weights[row]:.2g}" for row in shown),
        "bias of the mean (%)",
        "its deviation (%)",
        title=f"times that rows are drawn, {_NUM_DRAWN} of {_NUM_ROWS}; the mean of values about as large as weights",
        title_justify="left",
    )
    table.add_row("(k * p)", *(f"{_NUM_DRAWN * proportional[row]:.3f}" for row in shown), "", "")
    for method in METHODS:
        times, estimates = np.zeros(_NUM_ROWS), []
        for number in range(num_draws):
            drawn = draw(method, weights, _NUM_DRAWN, bits_of(number, _NUM_ROWS))
            np.add.at(times, drawn.rows, 1)
            estimates.append((values[drawn.rows] / drawn.inclusion_probabilities).sum() / _NUM_ROWS)
        bias, deviation = np.mean(estimates) / values.mean() - 1, np.std(estimates) / values.mean()
        table.add_row(
            method, *(f"{times[row] / num_draws:.3f}" for row in shown), f"{100 * bias:+.2f}", f"{100 * deviation:.1f}"
        )
    return table


def durations(max_samples: int) -> Table:
    """Milliseconds of a draw, medians."""
    sizes = [10**power for power in range(3, 8) if 10**power <= max_samples]
    table = Table("draw", *(f"n = {size:,}" for size in sizes), title="milliseconds, k = 0.8 n", title_justify="left")
    seconds: dict[tuple[DrawMethod, int], list[float]] = {}
    for size in sizes:
        weights = np.random.default_rng(0).lognormal(0, 1, size).astype(np.float32)
        bits = bits_of(0, size)
        for _ in range(5):  # in turn, so that a noisy neighbour slows all alike
            for method in METHODS:
                began_s = time.perf_counter()
                draw(method, weights, size * 4 // 5, bits)
                seconds.setdefault((method, size), []).append(time.perf_counter() - began_s)
    for method in METHODS:
        table.add_row(method, *(f"{1000 * statistics.median(seconds[method, size]):.3g}" for size in sizes))
    return table


def effects(num_train: int, num_seeds: int) -> Table:
    """What an ES training on MNIST comes to by how its mini-batches, or its epochs, are drawn."""
    train_set, test_set = (Mnist(*digits, is_small=True) for digits in load_digits(num_train, 10_000))
    table = Table(
        "draw",
        "of mini-batches",
        "of epochs (prune_ratio 0.3)",
        title=f"accuracy after 4 epochs of {num_train:,} digits, mean ± standard error of {num_seeds} seeds",
        title_justify="left",
    )
    with evosample.connect() as client:
        for method in METHODS:
            cells = []
            for settings in ({"batch_draw": method}, {"set_draw": method, "prune_ratio": 0.3}):
                if settings.get("set_draw") == "with_replacement":
                    cells.append("-")
                    continue
                found = []
                for seed in range(num_seeds):
                    policy = evosample.EvolvedSampling(**settings)
                    trial = Trial(client, method, {"policy": policy}, 4, seed)
                    found.append(trainings.train(trial, train_set, test_set)["accuracy"])
                error = statistics.stdev(found) / num_seeds**0.5 if num_seeds > 1 else 0.0
                cells.append(f"{100 * statistics.mean(found):.2f} ± {100 * error:.2f} %")
            table.add_row(method, *cells)
    return table


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--num-draws", type=int, default=20_000)
    arguments.add_argument("--max-samples", type=int, default=10_000_000)
    arguments.add_argument("--num-train", type=int, default=12_000)
    arguments.add_argument("--num-seeds", type=int, default=3)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    console = Console(width=140)
    for table in (inclusion(given.num_draws), durations(given.max_samples), effects(given.num_train, given.num_seeds)):
        console.print(table)


if __name__ == "__main__":
    main()
