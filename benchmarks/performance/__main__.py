"""Measure evosample beside what one would use instead: `make bench`.

Writes benchmarks/results.json and docs/performance.md. Every ratio is of figures that were taken in the same run, side
by side and in turn; medians, with the least and the most beside them.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from performance import page
from performance.loading import epoch_ends, loading
from performance.memory import memory
from performance.peers import reverb
from performance.rows import Row
from performance.sharing import sharing
from performance.starting import saving, starting
from performance.steps import steps
from performance.streaming import reporting, streaming
from performance.turns import streams_beside_a_turn, turns

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results.json"
_WORST_REGRESSION = 2.0


def suite() -> Iterator[Row]:
    """What `make bench` measures, under ten minutes on two cores."""
    yield from streaming(10_000_000, 7)
    yield from reporting(4_000_000, 7)
    yield from steps(2_000, 7)
    yield from loading(1_000, 7)
    yield from epoch_ends([5_000, 100_000], 40)
    yield from turns([100_000, 1_280_000, 10_000_000], 5)
    yield from streams_beside_a_turn(10_000_000, 3)
    yield from memory(10_000_000, 0.0)
    yield from memory(10_000_000, 0.2)
    yield from sharing(32_000_000, 5)
    yield from starting(7)
    yield from saving()


def short() -> Iterator[Row]:
    """Half a minute of it: the ratios that a change is likely to spoil."""
    yield from streaming(4_000_000, 3)
    yield from steps(1_000, 3)
    yield from loading(300, 3)
    yield from turns([100_000, 1_280_000], 3)


def large() -> Iterator[Row]:
    """100 million samples: some ten minutes, 15 GB of memory and 30 GB of disk."""
    yield from turns([100_000_000], 1)
    yield from memory(100_000_000, 0.2)


def peers() -> Iterator[Row]:
    """Reverb, some two minutes."""
    yield from reverb(4_000_000, 3)


_FORMS = {"suite": suite, "short": short, "large": large, "peers": peers}


def machine() -> dict[str, Any]:
    """What this was measured on."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory_bytes / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def regressions(rows: list[Row], before: dict[str, Any]) -> list[str]:
    """The ratios that are more than a factor of two worse than in the results that are kept.

    A row is held against the one of the same name and the nearest number of samples.

    Raises:
        ValueError: there is none for any of them.
    """
    found, num_compared = [], 0
    for row in rows:
        kind, size = _kind(row.name)
        same = [kept for kept in before["rows"] if _kind(kept["name"])[0] == kind and kept["ratio"] is not None]
        same = [kept for kept in same if _kind(kept["compared_with"])[0] == _kind(row.compared_with)[0]]
        if row.ratio is None or not same:
            continue
        was = min(same, key=lambda kept: abs(math.log(_kind(kept["name"])[1] / size)))["ratio"]
        num_compared += 1
        worse_by = was / row.ratio if row.higher_is_better else row.ratio / was
        if worse_by > _WORST_REGRESSION:
            found.append(f"{row.name}, against {row.compared_with}: {row.ratio:.3g}, was {was:.3g}")
    if not num_compared:
        raise ValueError("no row is like one of those that are kept: make them again with `make bench`")
    return found


def _kind(name: str) -> tuple[str, int]:
    """A name without its number of samples, and that number."""
    size = re.search(r",? ?([\d,]+) samples", name)
    return (name, 1) if size is None else (name.replace(size[0], ""), int(size[1].replace(",", "")))


def _measured(form: str) -> list[Row]:
    """The rows of a form, which are printed as they come: a spinner would take time from what is measured."""
    rows = []
    for row in _FORMS[form]():
        rows.append(row)
        print(page.line_of(row), flush=True)
    return rows


def main(
    form: Annotated[str, typer.Option(help=f"One of {', '.join(_FORMS)}.")] = "suite",
) -> None:
    """Measure, show, and keep the results; of the short form nothing is kept, but a regression is an error."""
    rows = _measured(form)
    if form == "short":
        before = json.loads(RESULTS.read_text())
        if regressions(rows, before):
            print("a ratio is more than twice as bad as it was: once more, since it may have been the machine")
            found = regressions(_measured(form), before)
            if found:
                raise SystemExit("\n".join(["a ratio is more than twice as bad as it was, twice:", *found]))
        return
    page.keep(rows, form, machine(), datetime.datetime.now(datetime.UTC).date(), RESULTS, ROOT / "docs/performance.md")


if __name__ == "__main__":
    typer.run(main)
