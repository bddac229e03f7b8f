"""The suite's own rules."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def suite_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])


def test_a_ratio_is_the_median_of_those_side_by_side() -> None:
    from performance.rows import Row, alternate

    row = Row("r", [10, 40, 30], "s", 35, compared_with="that", compared=[10, 20, 10], ratio_target=2.5)
    assert (row.value, row.compared_value, row.ratio) == (30, 10, 2)
    assert not row.met
    assert Row("r", [10, 40, 30], "s", 30, compared=[10, 20, 10], ratio_target=2).met
    assert Row("r", [10, 40, 30], "s", 35, higher_is_better=False, compared=[1, 20, 10], ratio_target=3).met
    assert not Row("r", [10, 40, 30], "s", 29, higher_is_better=False).met
    order: list[str] = []

    def work(name: str) -> float:
        order.append(name)
        return len(order)

    assert alternate(2, lambda: work("a"), lambda: work("b")) == [[3, 5], [4, 6]]
    assert "".join(order) == "ababab"


def test_a_ratio_more_than_twice_as_bad_is_a_regression() -> None:
    from performance.__main__ import regressions
    from performance.rows import Row

    kept = {
        "rows": [
            {"name": "fast, 10 samples, warm", "compared_with": "raw", "ratio": 0.8},
            {"name": "fast, 10 samples, cold", "compared_with": "raw", "ratio": 0.1},
            {"name": "fast, 10 samples, warm", "compared_with": "something else", "ratio": 100.0},
            {"name": "slow, 1,000 samples", "compared_with": "raw", "ratio": 2.0},
            {"name": "slow, 1,000,000 samples", "compared_with": "raw", "ratio": 1.0},
            {"name": "without", "compared_with": "", "ratio": None},
        ]
    }

    def found(fast: float, slow: float) -> int:
        rows = [
            Row("fast, 5 samples, warm", [fast], "", compared_with="raw", compared=[1.0]),
            Row("slow, 5,000 samples", [slow], "", higher_is_better=False, compared_with="raw", compared=[1.0]),
            Row("new", [1], "", compared_with="raw", compared=[1.0]),
            Row("without", [1], ""),
        ]
        return len(regressions(rows, kept))

    assert found(0.41, 3.9) == 0
    assert found(0.39, 3.9) == 1
    assert found(0.39, 4.1) == 2
    with pytest.raises(ValueError, match="no row is like"):
        regressions([Row("new", [1], "", compared_with="raw", compared=[1.0])], kept)
