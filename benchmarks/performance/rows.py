"""The rows of the suite: what was measured beside what, and what it was to reach."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One figure, and that of the same job done otherwise in the same run.

    Attributes:
        name: what was measured.
        values: one a repetition.
        unit: of the values, such as "M samples/s".
        target: what the median is to reach; None: nothing was promised.
        higher_is_better: whether the target is a least or a most.
        compared_with: how the job was done otherwise; empty: it was not.
        compared: the values of that, repetition by repetition.
        ratio_target: what the median of values / compared is to reach.
        ratio_most: what it may not exceed either, where higher is better: a prediction may be wrong both ways.
        note: what else there is to say, in a few words.
    """

    name: str
    values: Sequence[float]
    unit: str
    target: float | None = None
    higher_is_better: bool = True
    compared_with: str = ""
    compared: Sequence[float] = ()
    ratio_target: float | None = None
    ratio_most: float | None = None
    note: str = ""

    @property
    def value(self) -> float:
        return statistics.median(self.values)

    @property
    def compared_value(self) -> float | None:
        return statistics.median(self.compared) if self.compared else None

    @property
    def ratio(self) -> float | None:
        """Of values taken side by side: what slows both down falls out."""
        if not self.compared:
            return None
        return statistics.median(value / other for value, other in zip(self.values, self.compared, strict=True))

    @property
    def met(self) -> bool:
        if self.ratio_most is not None and self.ratio is not None and self.ratio > self.ratio_most:
            return False
        return all(
            target is None or found is None or (found >= target if self.higher_is_better else found <= target)
            for found, target in ((self.value, self.target), (self.ratio, self.ratio_target))
        )

    def as_dict(self) -> dict[str, Any]:
        """As it stands in results.json."""
        return {
            "name": self.name,
            "value": self.value,
            "low": min(self.values),
            "high": max(self.values),
            "unit": self.unit,
            "target": self.target,
            "higher_is_better": self.higher_is_better,
            "compared_with": self.compared_with,
            "compared_value": self.compared_value,
            "ratio": self.ratio,
            "ratio_target": self.ratio_target,
            "ratio_most": self.ratio_most,
            "met": self.met,
            "note": self.note,
        }


def alternate(num_repeats: int, *works: Callable[[], float]) -> list[list[float]]:
    """The values of several works, done in turn; a first round warms up and does not count."""
    for work in works:
        work()
    rounds = [[work() for work in works] for _ in range(num_repeats)]
    return [list(values) for values in zip(*rounds, strict=True)]
