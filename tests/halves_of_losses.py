"""A policy as another package brings it along, with everything that a policy may have; `install` makes that package."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from evosample.sampling import Columns, InvalidValue, Kept, Policy


@dataclass(frozen=True, kw_only=True)
class Halves(Policy):
    """Keeps the samples of the highest or the lowest losses, and hides those of the others that are sure."""

    columns: ClassVar[Mapping[str, float]] = {"confidence": 0.0, "times": 1.0}
    reported_columns: ClassVar[tuple[str, ...]] = ("confidence",)
    batch_level = "scored"
    keeps_unvisited: ClassVar[bool] = True
    is_adaptive: ClassVar[bool] = True
    keeps_at_random: ClassVar[bool] = False

    share: float = 0.5
    lowest: bool = False
    least: int = 100
    note: str = ""

    def __post_init__(self) -> None:
        if self.note == "wrong":
            raise KeyError(self.note)
        if not 0 < self.share <= 1:
            raise InvalidValue("share", self.share, "a number with 0 < share <= 1")

    def fold(self, before: Columns, losses: NDArray[np.float32], reported: Columns) -> Columns:
        return {**super().fold(before, losses, reported), **reported, "times": before["times"] + 1}

    def keep(self, columns: Columns, num_places: int, progress: float, bits: NDArray[np.uint64]) -> Kept:
        if self.note == f"fails at {progress}":
            raise ZeroDivisionError(self.note)
        order = np.argsort(columns["scores"], kind="stable")
        num_kept = max(int(self.share * len(order)), min(self.least, len(order)))
        kept = order[:num_kept] if self.lowest else order[len(order) - num_kept :]
        rest = np.setdiff1d(order, kept)
        hidden = rest[columns["confidence"][rest] > 0.6]
        return Kept(np.sort(kept), np.ones(num_kept), hidden=np.sort(hidden))


@dataclass(frozen=True, kw_only=True)
class Hoarder(Policy):
    """Keeps a lot of each sample."""

    columns: ClassVar[Mapping[str, float]] = {f"column{number}": float(number) for number in range(20)}
    is_adaptive: ClassVar[bool] = True


def install(folder: Path) -> Path:
    """Put the package into a folder, for Python's path; returns that."""
    information = folder / "halves_of_losses-1.0.dist-info"
    information.mkdir(parents=True)
    shutil.copy(__file__, folder)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: halves-of-losses\nVersion: 1.0\n")
    names = "halves = halves_of_losses:Halves\nhoarder = halves_of_losses:Hoarder\n"
    (information / "entry_points.txt").write_text(f"[evosample.policies]\n{names}")
    return folder
