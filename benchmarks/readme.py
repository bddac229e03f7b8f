"""Run the README's loop before and after, word for word, on MNIST: is the model as good, in the same time?

`make bench-readme` runs it, in about two minutes: a new user's ten epochs, and what the README makes of them.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from evosample.comparison import Difference

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples/mnist"))

from digits import Mnist, accuracy, all_digits, make_model  # noqa: E402


def loops() -> tuple[str, str]:
    """The first two blocks of Python in the README."""
    before, after, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return before, after


def run(code: str, train_set: Mnist, test_set: Mnist, seed: int) -> tuple[float, float]:
    """Accuracy and seconds of a loop, from what a user's script has before it."""
    torch.manual_seed(seed)
    model = make_model()
    names: dict[str, Any] = {
        "DataLoader": DataLoader,
        "F": functional,
        "train_set": TensorDataset(train_set.images, train_set.digits),
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), 1e-3),
    }
    began_s = time.perf_counter()
    exec(code, names)
    seconds = time.perf_counter() - began_s
    if "client" in names:
        names["client"].close()
    return accuracy(model, test_set), seconds


def main(
    samples: Annotated[int, typer.Option(help="Of MNIST, to train on.", min=256, max=60_000)] = 20_000,
    seeds: Annotated[int, typer.Option(help="Runs of each loop, with the seeds 0, 1, ...", min=1)] = 3,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    train_set, test_set = all_digits()
    train_set.images, train_set.digits = train_set.images[:samples], train_set.digits[:samples]
    found: dict[str, list[tuple[float, float]]] = {"before": [], "after": []}
    for seed in track(range(seeds), "seeds"):
        for name, code in zip(found, loops(), strict=True):
            found[name].append(run(code, train_set, test_set, seed))
    table = Table("the README's loop", "test accuracy", "training time")
    for name, results in found.items():
        accuracies, seconds = ([result[column] for result in results] for column in (0, 1))
        each = " ".join(f"{100 * share:.2f}" for share in accuracies)
        shown = f"{100 * statistics.fmean(accuracies):.2f} % ({each})"
        table.add_row(name, shown, f"{statistics.fmean(seconds):.1f} s")
    difference = Difference.of(
        [100 * (after[0] - before[0]) for before, after in zip(found["before"], found["after"], strict=True)]
    )
    Console().print(table, f"after minus before, in points, paired by seed: {difference}")


if __name__ == "__main__":
    typer.run(main)
