"""The page of the comparison, from outcomes that are made up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from evosample.comparison import Comparison, Outcome

ROOT = Path(__file__).parents[2]


def test_a_row_says_what_the_figures_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), str(ROOT / "examples/mnist"), *sys.path])
    import comparison

    def outcomes(name: str, num_epochs: int, accuracies: list[float], seconds: float) -> list[Outcome]:
        return [
            Outcome(name, "", num_epochs, seed, {"accuracy": accuracy}, seconds, seconds, 1_000 * num_epochs)
            for seed, accuracy in enumerate(accuracies)
        ]

    found = Comparison.of(
        outcomes("RandomSubset", 6, [0.9, 0.91, 0.92], 10)
        + outcomes("ES", 6, [0.95, 0.96, 0.98], 20)
        + outcomes("RandomSubset", 12, [0.96, 0.97, 0.96], 20),
        {"ES": 12},
        clock="cpu",
        higher_is_better=True,
    )
    page = comparison.page(dict.fromkeys(comparison.FUNCTIONS, found))
    row = (
        "| ES | 6 | 96.33 ± 0.88 | 20 | 6,000 | +5.33 [+3.90, +6.77] | +0.00 [-4.30, +4.30] (12 epochs) | not better |"
    )
    assert page.count(row) == 3
    assert page.count("| RandomSubset | 12 | 96.33 ± 0.33 | 20 | 12,000 |  |  |  |") == 3
    assert "ES: not better" in page
    assert all(f"images/comparison-{name}.svg" in page for name in comparison.FUNCTIONS)
