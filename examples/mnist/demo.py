"""Train a small CNN four ways through a live selection server, for as much time each, and compare their accuracies.

`make demo` runs it, in about five minutes on two cores. `train` and the `client` lines of `main` are what it takes to
use evosample with PyTorch; the rest measures and reports.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
import torch
import typer
from digits import Batch, Mnist, accuracy, eight_domains, learning_rate, long_tailed, make_model, wrong_labels
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch.nn import functional

import evosample
import evosample.torch
from evosample.comparison import Difference

BATCH_SIZE = 64
META_BATCH_SIZE = 256  # what a step that scores chooses its 64 from

ORDINARY, RANDOM, SCORED, UNSCORED = "ordinary training", "random subsets", "ES with scoring", "ES"
WAYS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        ORDINARY: {"policy": evosample.Uniform()},  # shuffled epochs over everything
        RANDOM: {"policy": evosample.RandomSubset()},  # another quarter of the data each epoch
        SCORED: {"policy": evosample.EvolvedSampling(), "meta_batch_size": META_BATCH_SIZE},  # as published
        UNSCORED: {"policy": evosample.EvolvedSampling()},  # the default
    }
)


NUM_ORDINARY_EPOCHS = 4
DATA_SETS: Mapping[str, Callable[[int], tuple[Mnist, Mnist]]] = MappingProxyType(
    {
        "eight domains": eight_domains,
        "long-tailed MNIST": long_tailed,
        "wrong labels": wrong_labels,
    }
)
"""What is trained on: (training set, test set) by seed."""


def train(train_set: Mnist, experiment: evosample.Experiment, seed: int) -> tuple[torch.nn.Module, float, int]:
    """Train a new model through all epochs of an experiment: the model, the seconds, and the rows back-propagated."""
    torch.manual_seed(seed)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())

    def per_sample(batch: Batch) -> torch.Tensor:
        images, digits = batch
        return functional.cross_entropy(model(images), digits, reduction="none")

    needs: dict[str, Any] = {"model": model, "score": per_sample} if experiment.spec.selects else {}
    loader = evosample.torch.Loader(train_set, experiment, collate_fn=lambda batch: batch, **needs)
    num_trained = 0
    began_s = time.perf_counter()
    for _ in range(experiment.spec.num_epochs):
        for batch in loader:
            # By progress, not by a count of steps: the ways differ in the number of steps they take.
            optimizer.param_groups[0]["lr"] = learning_rate(loader.progress)
            loader.mean(per_sample(batch)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            num_trained += len(batch[1])
    return model, time.perf_counter() - began_s, num_trained


# As much time


@dataclass(frozen=True)
class StepCosts:
    """Seconds that the parts of a step take on this machine, by the number of samples: medians."""

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
    """Time scoring passes and training steps on a model that is thrown away."""
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

    parts = (score, lambda: step(META_BATCH_SIZE), lambda: step(BATCH_SIZE))
    seconds: list[list[float]] = []
    for _ in range(repetitions + 3):  # in turn, so that a noisy neighbour slows all parts alike
        seconds.append([])
        for part in parts:
            began_s = time.perf_counter()
            part()
            seconds[-1].append(time.perf_counter() - began_s)
    score_s, train_all_s, train_subset_s = map(statistics.median, zip(*seconds[3:], strict=True))
    return StepCosts({META_BATCH_SIZE: score_s}, {META_BATCH_SIZE: train_all_s, BATCH_SIZE: train_subset_s})


def num_epochs_of(way: str, num_samples: int, num_ordinary: int, costs: StepCosts) -> int:
    """For how many epochs a way trains in the time of so many ordinary ones."""

    def spec(way: str, num_epochs: int) -> evosample.ExperimentSpec:
        return evosample.ExperimentSpec(
            num_samples=num_samples, num_epochs=num_epochs, mini_batch_size=BATCH_SIZE, **WAYS[way]
        )

    if way != SCORED:  # a step costs the same: as many steps
        one = spec(way, 1)
        return round(num_ordinary * spec(ORDINARY, 1).total_steps / one.total_steps)
    limit_s = costs.predicted_s(spec(ORDINARY, num_ordinary))
    found = 3  # with fewer none would select
    while costs.predicted_s(spec(SCORED, found + 1)) <= limit_s:
        found += 1
    return found


# The report


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        predicted_s: what it would take if it were nothing but forward and backward passes.
    """

    data_set: str
    way: str
    seed: int
    num_epochs: int
    num_steps: int
    samples_backpropagated: int
    train_seconds: float
    predicted_s: float
    test_accuracy: float


def of_way(runs: list[Run], data_set: str, way: str) -> list[Run]:
    """The runs of a way on a data set, in the order of their seeds."""
    return [run for run in runs if (run.data_set, run.way) == (data_set, way)]


def difference(runs: list[Run], data_set: str, way: str, other: str) -> Difference:
    """Of the accuracies of two ways, in points, paired by seed."""
    pairs = zip(of_way(runs, data_set, way), of_way(runs, data_set, other), strict=True)
    return Difference.of([100 * (one.test_accuracy - two.test_accuracy) for one, two in pairs])


def shown(found: Difference) -> str:
    """A difference with its interval."""
    interval = "" if found.interval is None else " [{:+.1f}, {:+.1f}]".format(*found.interval)
    return f"{found.mean:+.1f}{interval}"


def table(runs: list[Run], data_set: str) -> Table:
    """The figures, for people: means over the seeds, and the standard deviation of accuracies."""
    title = f"{data_set}, seeds: {len({run.seed for run in runs})}"
    rows = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    rows.add_column("", no_wrap=True)
    for heading in ("test\naccuracy", "training\ntime", "\nsteps", "\nsamples", "against ordinary,\npoints"):
        rows.add_column(heading, justify="right", no_wrap=True)
    for way in WAYS:
        found = of_way(runs, data_set, way)
        accuracies = [100 * run.test_accuracy for run in found]
        spread = f" ± {statistics.stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
        rows.add_row(
            way,
            f"{statistics.fmean(accuracies):.1f}{spread} %",
            f"{statistics.fmean(run.train_seconds for run in found):.1f} s",
            f"{found[0].num_steps:,}",
            f"{found[0].samples_backpropagated:,}",
            "" if way == ORDINARY else shown(difference(runs, data_set, way, ORDINARY)),
        )
    return rows


def verdict(runs: list[Run], data_set: str) -> str:
    """The differences that count, in words."""
    against = ", ".join(f"{other} {shown(difference(runs, data_set, UNSCORED, other))}" for other in (ORDINARY, RANDOM))
    return f"{data_set}: ES against {against} points of accuracy, for as many steps (95 % intervals, paired by seed)."


CAPTION = (
    "Eight domains and the long tail are sets where selection pays: some samples are rare, and learned late. Where all "
    "samples are learned alike it gains little, and where hard samples are wrongly labelled it harms: try "
    '--data "wrong labels", and see docs/comparison.md.'
)


def disturbance(runs: list[Run]) -> str:
    """A warning if the measured times are not fit to be compared; or nothing."""
    slowdowns = {
        way: statistics.median(run.train_seconds / run.predicted_s for run in runs if run.way == way) for way in WAYS
    }
    if max(slowdowns.values()) < 1.3 * min(slowdowns.values()):
        return ""
    factors = ", ".join(f"{way} {slowdown:.1f}" for way, slowdown in slowdowns.items())
    return (
        "The training times should not be compared: each way took this many times as long as its forward and backward "
        f"passes alone: {factors}. Other work on the machine does that. The accuracies do not depend on it."
    )


def plot(runs: list[Run]) -> Figure:
    """Test accuracies, a panel for each data set: every run, and the means."""
    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    names = list(dict.fromkeys(run.data_set for run in runs))
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for row, way in enumerate(WAYS):
            percent = [100 * run.test_accuracy for run in of_way(runs, name, way)]
            colour = "C0" if way == UNSCORED else "0.45"
            mean = statistics.fmean(percent)
            axes.plot(percent, np.full(len(percent), row), "o", color=colour, alpha=0.5, markersize=5)
            axes.plot([mean], [row], "|", color=colour, markersize=22, markeredgewidth=3)
            axes.annotate(f"{mean:.1f}", (mean, row), (0, 14), textcoords="offset points", ha="center", color=colour)
        axes.set_yticks(range(len(WAYS)), list(WAYS))
        axes.set_ylim(len(WAYS) - 0.5, -0.7)
        axes.set_xlabel("test accuracy (%)")
        axes.set_title(name)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("A small CNN, trained for as much time each way; bars are means over seeds")
    return figure


def report(runs: list[Run], costs: StepCosts) -> dict[str, Any]:
    """The figures, for programs."""
    names = dict.fromkeys(run.data_set for run in runs)
    return {
        "runs": [asdict(run) for run in runs],
        "differences": [
            {"data_set": name, "way": way, "against": other, **asdict(difference(runs, name, way, other))}
            for name, way, other in itertools.product(names, WAYS, (ORDINARY, RANDOM))
            if way != other
        ],
        "setup": {
            "batch_size": BATCH_SIZE,
            "meta_batch_size": META_BATCH_SIZE,
            "score_seconds": costs.score_s,
            "train_step_seconds": costs.train_s,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
    }


def main(
    data: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(DATA_SETS)}; may be repeated. Default: the first two."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each way, with the seeds 0, 1, ...", min=1)] = 3,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="One seed and a few steps: to see that everything works. Its figures say nothing about the ways.",
        ),
    ] = False,
    report_dir: Annotated[
        Path, typer.Option(help="Where report.json and accuracy.png go; made if need be.", file_okay=False)
    ] = Path("demo-report"),
) -> None:
    """Train a small CNN four ways through a live selection server, for as much time each.

    Ordinary training: shuffled epochs over everything, 64 samples a step.
    Random subsets: a random quarter of the data each epoch.
    ES with scoring: each step scores 256 samples and trains on 64 of them.
    ES: a quarter of the data each epoch, drawn by the losses that training
    itself has reported; nothing is scored.

    On two sets made of MNIST: eight domains, and long-tailed classes.
    """
    names = data or list(DATA_SETS)[:2]
    for name in names:
        if name not in DATA_SETS:
            raise typer.BadParameter(f"{name!r}: expected one of {', '.join(DATA_SETS)}", param_hint="--data")
    torch.set_num_threads(1)  # so small a network gains nothing by more
    console = Console()
    made = {(name, seed): DATA_SETS[name](seed) for name in names for seed in range(1 if quick else seeds)}
    if quick:
        made = {key: (_some(train_set, 2_048), test_set) for key, (train_set, test_set) in made.items()}
    with console.status("measuring what forward and backward passes cost on this machine"):
        costs = measure_step_costs(made[names[0], 0][0], repetitions=5 if quick else 40)
    jobs = [(name, way, seed) for name in names for seed in range(1 if quick else seeds) for way in WAYS]
    runs = []
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with evosample.connect() as client, Progress(*columns, console=console) as progress:  # no address: a private server
        task = progress.add_task("", total=len(jobs))
        for name, way, seed in jobs:
            progress.update(task, description=f"{name}, {way}, seed {seed}")
            train_set, test_set = made[name, seed]
            num_epochs = num_epochs_of(way, len(train_set), NUM_ORDINARY_EPOCHS, costs)
            experiment = client.create_experiment(
                f"{name}-{way}-{seed}".replace(" ", "-"),
                num_samples=len(train_set),
                num_epochs=num_epochs,
                mini_batch_size=BATCH_SIZE,
                seed=seed,
                **WAYS[way],
            )
            model, seconds, num_trained = train(train_set, experiment, seed)
            runs.append(
                Run(
                    data_set=name,
                    way=way,
                    seed=seed,
                    num_epochs=num_epochs,
                    num_steps=experiment.total_steps,
                    samples_backpropagated=num_trained,
                    train_seconds=seconds,
                    predicted_s=costs.predicted_s(experiment.spec),
                    test_accuracy=accuracy(model, test_set),
                )
            )
            progress.update(task, advance=1)

    for name in names:
        console.print(table(runs, name), "")
    said = [*(verdict(runs, name) for name in names), CAPTION, disturbance(runs)]
    console.print(*filter(None, said), sep="\n\n")
    report_dir.mkdir(parents=True, exist_ok=True)
    (report_dir / "report.json").write_text(json.dumps(report(runs, costs), indent=2) + "\n")
    plot(runs).savefig(report_dir / "accuracy.png")
    console.print(f"\nAll figures are in {report_dir}/report.json, a plot in {report_dir}/accuracy.png.")


def _some(train_set: Mnist, num_samples: int) -> Mnist:
    rows = np.linspace(0, len(train_set) - 1, num_samples).astype(int)
    train_set.images, train_set.digits = train_set.images[rows], train_set.digits[rows]
    return train_set


if __name__ == "__main__":
    typer.run(main)
