"""Train a small CNN on MNIST five ways through a live selection server, and compare accuracy and time.

`make demo` runs it, in about five minutes on two cores. `Mnist`, `train` and the `client` lines of `main` are what it
takes to use evosample with PyTorch; the rest measures and reports.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from mnist_arrays import load_digits
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

import evosample
import evosample.torch

META_BATCH_SIZE = 256
MINI_BATCH_SIZE = 64
MAX_LEARNING_RATE = 2e-3
SEED = 0

Batch = tuple[torch.Tensor, torch.Tensor]


# The data


class Mnist(Dataset[Batch]):
    """Images, float32 [n, 1, 28, 28], and their digits, int64 [n]."""

    def __init__(self, images: NDArray[np.float32], digits: NDArray[np.int64]) -> None:
        self.images = torch.from_numpy((images.reshape(-1, 1, 28, 28) - 0.1307) / 0.3081)
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


# Training


def make_model() -> nn.Module:
    """A CNN of 185,000 parameters: small, but large enough that computing dominates a step."""
    model = nn.Sequential(
        nn.Conv2d(1, 32, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # CPUs compute faster in this layout
    return model


def learning_rate(progress: float) -> float:
    """One cycle: a cosine up during the first 30 % of the steps, a cosine down to nothing during the others."""
    phase = 1 - progress / 0.3 if progress < 0.3 else (progress - 0.3) / 0.7
    return MAX_LEARNING_RATE * max(0.5 * (1 + math.cos(math.pi * phase)), 0.01)


class Epoch(NamedTuple):
    """How a run stood at an epoch's end.

    Attributes:
        train_seconds: since the run began.
        samples_backpropagated: rows of all its steps so far that were trained on.
        model: a copy.
    """

    train_seconds: float
    samples_backpropagated: int
    model: nn.Module


def train(train_set: Mnist, experiment: evosample.Experiment, on_step: Callable[[float], None]) -> list[Epoch]:
    """Train a new model through all epochs of an experiment; `on_step` is told the share of the steps done."""
    torch.manual_seed(SEED)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())

    def per_sample(batch: Batch) -> torch.Tensor:
        images, digits = batch
        return functional.cross_entropy(model(images), digits, reduction="none")

    loader = evosample.torch.Loader(
        train_set, experiment, model=model, score=per_sample, collate_fn=lambda batch: batch
    )
    epochs = []
    samples_backpropagated = 0
    began_s = time.perf_counter()
    for _ in range(experiment.spec.num_epochs):
        for batch in loader:
            # By progress, not by a count of steps: policies differ in the number of steps they take.
            optimizer.param_groups[0]["lr"] = learning_rate(loader.progress)
            loader.mean(per_sample(batch)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            samples_backpropagated += len(batch[1])
            on_step(loader.progress)
        # The copies are tested after training: a test here would give the server time off the clock to plan an epoch.
        epochs.append(Epoch(time.perf_counter() - began_s, samples_backpropagated, copy.deepcopy(model)))
    return epochs


@torch.no_grad()
def accuracy(model: nn.Module, test_set: Mnist) -> float:
    """Share of the test set that the model gets right, in [0, 1]."""
    num_right = 0
    for first in range(0, len(test_set), 500):
        rows = slice(first, first + 500)
        num_right += int((model(test_set.images[rows]).argmax(1) == test_set.digits[rows]).sum())
    return num_right / len(test_set)


# What to expect


@dataclass(frozen=True)
class StepCosts:
    """Seconds that the parts of a step take on this machine, by the number of samples."""

    score_s: dict[int, float]
    train_s: dict[int, float]

    def predicted_s(self, spec: evosample.ExperimentSpec) -> float:
        """Seconds of a whole run: the forward and backward passes of its steps, and nothing else."""
        total_s = 0.0
        for epoch in range(spec.num_epochs):
            shape = spec.shape(epoch)
            step_s = self.train_s[shape.trained_rows] + (self.score_s[shape.step_rows] if shape.selects else 0)
            total_s += shape.num_steps * step_s
        return total_s


def measure_step_costs(train_set: Mnist, repetitions: int) -> StepCosts:
    """Time scoring passes and training steps on a model that is thrown away: medians."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())

    def losses(num_samples: int) -> torch.Tensor:
        return functional.cross_entropy(
            model(train_set.images[:num_samples]), train_set.digits[:num_samples], reduction="none"
        )

    def score() -> None:
        with torch.no_grad():
            losses(META_BATCH_SIZE)

    def step(num_samples: int) -> None:
        losses(num_samples).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    parts = (score, lambda: step(META_BATCH_SIZE), lambda: step(MINI_BATCH_SIZE))
    seconds: list[list[float]] = []
    for _ in range(repetitions + 3):  # in turn, so that a noisy neighbour slows all parts alike
        seconds.append([])
        for part in parts:
            began_s = time.perf_counter()
            part()
            seconds[-1].append(time.perf_counter() - began_s)
    score_s, train_all_s, train_subset_s = map(statistics.median, zip(*seconds[3:], strict=True))
    return StepCosts({META_BATCH_SIZE: score_s}, {META_BATCH_SIZE: train_all_s, MINI_BATCH_SIZE: train_subset_s})


# The report


@dataclass(frozen=True)
class Run:
    """One row of the table.

    Attributes:
        curve: (training seconds, test accuracy in [0, 1]) at each epoch's end.
        predicted_s: what its training would take if it were nothing but forward and backward passes.
    """

    policy: str
    curve: list[tuple[float, float]]
    samples_backpropagated: int
    predicted_s: float

    @property
    def train_seconds(self) -> float:
        return self.curve[-1][0]

    @property
    def test_accuracy(self) -> float:
        return self.curve[-1][1]

    def saving(self, first: Run) -> float:
        """The share of the first run's training time that this one did without."""
        return 1 - self.train_seconds / first.train_seconds

    def predicted_saving(self, first: Run) -> float:
        """The same, of predicted times."""
        return 1 - self.predicted_s / first.predicted_s


def run_one(
    experiment: evosample.Experiment,
    costs: StepCosts,
    train_set: Mnist,
    test_set: Mnist,
    progress: Progress,
    task: TaskID,
) -> Run:
    """Train, then test the copies; shows how far it is."""
    progress.start_task(task)
    progress.update(task, state="training")
    epochs = train(train_set, experiment, lambda share: progress.update(task, completed=share))
    progress.stop_task(task)
    progress.update(task, state="testing")
    curve = [(epoch.train_seconds, accuracy(epoch.model, test_set)) for epoch in epochs]
    progress.update(task, state=f"{curve[-1][1]:.2%}")
    return Run(experiment.name, curve, epochs[-1].samples_backpropagated, costs.predicted_s(experiment.spec))


def table(runs: list[Run]) -> Table:
    """The figures, for people."""
    rows = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    rows.add_column("run")
    for title in ("test\naccuracy", "training\ntime", "samples\nback-\npropagated", "saving", "predicted\nsaving"):
        rows.add_column(title, justify="right")
    for run in runs:
        rows.add_row(
            run.policy,
            f"{run.test_accuracy:.2%}",
            f"{run.train_seconds:.1f} s",
            f"{run.samples_backpropagated:,}",
            f"{run.saving(runs[0]):.1%}",
            f"{run.predicted_saving(runs[0]):.1%}",
        )
    return rows


def comparison(runs: list[Run], num_test: int) -> str:
    """What to compare, in words, and what the figures don't say."""
    _, _, baseline, *selecting = runs
    differences = ", ".join(
        f"{run.policy} {100 * (run.test_accuracy - baseline.test_accuracy):+.2f} points in {run.train_seconds:.0f} s"
        for run in selecting
    )
    error = math.sqrt(baseline.test_accuracy * (1 - baseline.test_accuracy) / num_test)
    return (
        "Any selection has to beat a random subset trained for as long, since that needs no scoring pass. "
        f"{baseline.policy}: {baseline.test_accuracy:.2%} in {baseline.train_seconds:.0f} s; against it {differences}. "
        f"Each is a single run, and {num_test:,} test images leave a standard error of {100 * error:.2f} points: "
        "smaller differences say little."
    )


def disturbance(runs: list[Run]) -> str:
    """A warning if the measured times are not fit to be compared; or nothing."""
    slowdowns = {run.policy: run.train_seconds / run.predicted_s for run in runs}
    if max(slowdowns.values()) < 1.3 * min(slowdowns.values()):
        return ""
    factors = ", ".join(f"{policy} {slowdown:.1f}" for policy, slowdown in slowdowns.items())
    return (
        "The training times are not fit to be compared. Each run took this many times as long as predicted: "
        f"{factors}. Other work on the machine does that: go by the predicted savings, or run the demo again."
    )


def plot(runs: list[Run]) -> Figure:
    """Test accuracy against training time."""
    figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    styles = [("0.25", "-", "o"), ("C1", ":", "s"), ("C1", "-", "s"), ("C0", "-", "D"), ("C2", "-", "^")]
    for run, (colour, line, marker) in zip(runs, styles, strict=True):
        seconds = [second for second, _ in run.curve]
        percent = [100 * share for _, share in run.curve]
        label = f"{run.policy}: {run.test_accuracy:.2%} in {run.train_seconds:.0f} s"
        axes.plot(seconds, percent, color=colour, linestyle=line, marker=marker, markersize=4, label=label)
        axes.plot(seconds[-1], percent[-1], color=colour, marker=marker, markersize=10)
    least_error = 100 * (1 - max(run.test_accuracy for run in runs))
    axes.set_ylim(100 - 4 * least_error, 100 - 0.5 * least_error)  # where the runs differ: all begin far below
    axes.set_xlim(left=0)
    axes.set_xlabel("training time (seconds)")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title("MNIST, a small CNN: test accuracy at the end of each epoch")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def report(runs: list[Run], costs: StepCosts, num_train: int, num_test: int) -> dict[str, Any]:
    """The figures, for programs."""
    return {
        "runs": [
            {
                "policy": run.policy,
                "test_accuracy": run.test_accuracy,
                "train_seconds": run.train_seconds,
                "samples_backpropagated": run.samples_backpropagated,
                "saving": run.saving(runs[0]),
                "predicted_saving": run.predicted_saving(runs[0]),
            }
            for run in runs
        ],
        "curves": {
            run.policy: [{"train_seconds": seconds, "test_accuracy": share} for seconds, share in run.curve]
            for run in runs
        },
        "setup": {
            "dataset": "MNIST",
            "num_train": num_train,
            "num_test": num_test,
            "meta_batch_size": META_BATCH_SIZE,
            "mini_batch_size": MINI_BATCH_SIZE,
            "num_epochs": {run.policy: len(run.curve) for run in runs},
            "max_learning_rate": MAX_LEARNING_RATE,
            "seed": SEED,
            "score_seconds": costs.score_s,
            "train_step_seconds": costs.train_s,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
    }


def main(
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Train on 3,000 samples for 3 epochs: some seconds, to see that everything works. Its figures say "
            "nothing about the policies.",
        ),
    ] = False,
    report_dir: Annotated[
        Path, typer.Option(help="Where report.json and accuracy.png go; made if need be.", file_okay=False)
    ] = Path("demo-report"),
) -> None:
    """Train a small CNN on MNIST five ways through a live selection server, and compare.

    On everything; on a random 64 of every 256 samples, for as many epochs
    and for as much time as ES; by Evolved Sampling (ES), which chooses the 64
    by the losses of a scoring pass; and by ES with pruning (ESWP), whose
    epochs also leave out 20 % of the samples. All start from equal weights.
    """
    num_train, num_test, num_epochs = (3_000, 1_000, 3) if quick else (60_000, 10_000, 6)
    train_set, test_set = load_mnist(num_train, num_test)
    console = Console()
    with console.status("measuring what forward and backward passes cost on this machine"):
        costs = measure_step_costs(train_set, repetitions=5 if quick else 40)

    with evosample.connect() as client:  # no address: a private server, as a child process

        def create(name: str, policy: evosample.Policy, num_epochs: int = num_epochs) -> evosample.Experiment:
            return client.create_experiment(
                name,
                num_samples=num_train,
                num_epochs=num_epochs,
                meta_batch_size=META_BATCH_SIZE,
                mini_batch_size=MINI_BATCH_SIZE,
                policy=policy,
                seed=SEED,
            )

        subset = create("random-subset-same-epochs", evosample.RandomSubset())
        es = create("ES", evosample.EvolvedSampling())
        num_equal_epochs = round(num_epochs * costs.predicted_s(es.spec) / costs.predicted_s(subset.spec))
        experiments = [
            create("everything", evosample.Uniform()),
            subset,
            create("random-subset-same-time", evosample.RandomSubset(), max(num_equal_epochs, 1)),
            es,
            create("ESWP", evosample.EvolvedSampling(prune_ratio=0.2)),
        ]
        columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.fields[state]}"))
        with Progress("{task.description}", *columns, console=console, refresh_per_second=4) as progress:
            tasks = [progress.add_task(experiment.name, start=False, total=1, state="") for experiment in experiments]
            runs = [
                run_one(experiment, costs, train_set, test_set, progress, task)
                for experiment, task in zip(experiments, tasks, strict=True)
            ]

    said = [comparison(runs, num_test), disturbance(runs)]
    console.print(table(runs), *filter(None, said), sep="\n\n")
    report_dir.mkdir(parents=True, exist_ok=True)
    (report_dir / "report.json").write_text(json.dumps(report(runs, costs, num_train, num_test), indent=2) + "\n")
    plot(runs).savefig(report_dir / "accuracy.png")
    console.print(f"The figures are in {report_dir}/report.json, the curves in {report_dir}/accuracy.png.")


if __name__ == "__main__":
    typer.run(main)
