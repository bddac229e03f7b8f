"""Compare all policies on MNIST, long-tailed MNIST and MNIST with wrong labels, and write docs/comparison.md.

`make comparison` runs it: three hours of one core, in which it may be stopped at any time; called again it goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

import evosample
from evosample.comparison import METHODS, Comparison, MethodFigures, compare
from evosample.comparison.page import plot_time

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples/mnist"))

import compare as trainings  # noqa: E402
from digits import make_model  # noqa: E402

NUM_EPOCHS = 6
FUNCTIONS = {
    "mnist": trainings.mnist,
    "long-tailed": trainings.long_tailed,
    "wrong-labels": trainings.wrong_labels,
}
ALL_METHODS = {
    **METHODS,
    "loss only": evosample.EvolvedSampling(beta1=0.0, beta2=0.0),
    "Kakurenbo": evosample.Kakurenbo(),
    "SelectiveBackprop": {"policy": evosample.SelectiveBackprop(), "mini_batch_size": 128},
}


def run(name: str, report_dir: Path) -> Comparison:
    """Compare on one of the data sets, or go on with it."""
    return compare(FUNCTIONS[name], ALL_METHODS, num_epochs=NUM_EPOCHS, output=report_dir / name, clock="cpu")


INTRODUCTION = """# Comparison

All policies of evosample on three data sets, with the network of `make demo` ({parameters:,} parameters): {num_epochs}
epochs, mini-batches of 64 samples, drawn from meta-batches of 256 where steps score (SelectiveBackprop: 128 of 256, as
in its paper), one cycle of AdamW's learning rate whatever the number of steps, {num_seeds} seeds, defaults everywhere
else.

`RandomSubset` is the baseline: another random quarter of the data each epoch. It runs for as many epochs as the
methods, and for as many as take as much training time as each of them; **the verdict is by the latter**. Differences
are the method minus the random subset, paired by seed, with the 95 % interval of Student's t: of as many verdicts as
there are here, chance alone makes one or two. Time is processor time of the training process: the machine had two
cores, and other things to do. Another model, data set or number of epochs may well order them otherwise: `evosample
compare` tells of yours.

`make comparison` makes this page, in three to four hours of one core. In words:

{words}
"""
TITLES = {
    "mnist": "MNIST",
    "long-tailed": "Long-tailed MNIST",
    "wrong-labels": "MNIST with wrong labels",
}


def page(comparisons: dict[str, Comparison]) -> str:
    """The page of the documentation."""
    first = next(iter(comparisons.values()))
    words = "\n".join(f"- {TITLES[name]}: {summary(found)}" for name, found in comparisons.items())
    parts = [
        INTRODUCTION.format(
            parameters=sum(len(weights.flatten()) for weights in make_model().parameters()),
            num_epochs=NUM_EPOCHS,
            num_seeds=len(first.seeds),
            words=words,
        )
    ]
    for name, found in comparisons.items():
        parts.append(f"## {TITLES[name]}\n\n{(FUNCTIONS[name].__doc__ or '').strip()}\n")
        parts.append("\n".join(map(row_of, [*found.baselines, *found.methods])).join([HEAD, "\n"]))
        parts.append(f"![Accuracy against training time](images/comparison-{name}.svg)\n")
    return "\n".join(parts)


COLUMNS = (
    "method",
    "epochs",
    "accuracy (%)",
    "time (s)",
    "back-propagated",
    "for as many epochs",
    "for as much time",
    "verdict",
)
HEAD = f"| {' | '.join(COLUMNS)} |\n|---|{'--:|' * (len(COLUMNS) - 2)}---|\n"


def row_of(figures: MethodFigures) -> str:
    """A row of the table, accuracies and their differences in percent."""
    mean, error = 100 * figures.metric.mean, 100 * (figures.metric.standard_error or 0)
    cells = [figures.name, figures.num_epochs, f"{mean:.2f} ± {error:.2f}", f"{figures.seconds.mean:.0f}"]
    cells.append(f"{figures.num_trained.mean:,.0f}")
    for difference in (figures.equal_epochs, figures.equal_time):
        text = ""
        if difference is not None:
            low, high = difference.interval or (difference.mean, difference.mean)
            text = f"{100 * difference.mean:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
        cells.append(text)
    if figures.equal_time_epochs is not None:
        cells[-1] = f"{cells[-1]} ({figures.equal_time_epochs} epochs)"
    return "| " + " | ".join(map(str, [*cells, figures.verdict or ""])) + " |"


def summary(found: Comparison) -> str:
    """The verdicts in a sentence."""
    by_verdict: dict[str, list[str]] = {}
    for method in found.methods:
        by_verdict.setdefault(method.verdict or "unknown", []).append(method.name)
    said = [f"{', '.join(names)}: {verdict}" for verdict, names in sorted(by_verdict.items())]
    return f"against random subsets that trained as long, {'; '.join(said)}."


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(FUNCTIONS)}; and no page is written.")] = None,
    report_dir: Annotated[Path, typer.Option(help="Where the trials are kept.", file_okay=False)] = Path(
        "comparison-report"
    ),
) -> None:
    """Run the comparison, and write its page."""
    torch.set_num_threads(1)  # times of one thread are less disturbed
    comparisons = {name: run(name, report_dir) for name in only or FUNCTIONS}
    if only:
        return
    for name, found in comparisons.items():
        plot_time(found).savefig(ROOT / f"docs/images/comparison-{name}.svg", metadata={"Date": None})
    (ROOT / "docs/comparison.md").write_text(page(comparisons))


if __name__ == "__main__":
    typer.run(main)
