"""What was measured, for people and for programs."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from performance.rows import Row

_PAGE = """# Performance

What evosample does beside what one would use instead, in the same run: both in turn, medians of several repetitions,
the least and the most in brackets. A ratio is the median of ratios of figures taken side by side, so that what slows
both down falls out; go by it rather than by the figures, which are of {cores} cores of a shared machine ({processor},
{memory_gib} GiB, {system}, Python {python}).

`make bench` measures all of this in less than ten minutes and makes this page (last on {date}); `make bench-large`
adds 100 million samples, `make bench-peers` Reverb. `make bench-check` runs a short form, and fails if a ratio is more
than twice as bad as here.

| what | measured | promised | compared with | that | ratio | promised | met |
|---|--:|--:|---|--:|--:|--:|---|
{rows}

## What limits it

- **Many at once.** 64 raw gRPC streams lose as well on two cores that they share with their readers: they are in the
  table beside ours. A stream of ours costs a server 1 ms of its interpreter before the first row, of which gRPC's own
  share is 0.3 ms and a look at the store 0.2 ms; each of these streams has a sixtieth of the rows to make up for it.
  Longer streams lift it, and so do more servers on the same store: they hold no state. [How far it goes](scaling.md)
  has 4,096 ranks.
- **Waiting beside a turn.** Whoever wants a third of two cores waits: a process that only computes, and has nothing to
  do with evosample, lengthens these waits several times (it is in the table), and in a turn the store works besides,
  and takes in blocks of 1 MiB, which others' looks wait for. Numpy's work holds no lock meanwhile, and beyond 8,192
  samples nothing of it is done by the thread that answers: this one waits for a core, up to 4 ms each time, and an
  answer takes ten changes of threads and processes. Threads of the turn that are less urgent (`nice`) do not lift it; a
  third core does.
- **`torch.multinomial`** draws, and that is all. A turn reads the scores, folds losses into them, draws, shuffles, and
  writes 200 MB, which take the store a third of that time by themselves; the draw is an eighth of it.
- **A step of 20 ms.** After other work for 20 ms code and data are no longer in the processor's cache: each call of
  numpy takes five to ten times as long as one after another, so that ES in plain numpy takes more than half as much.
  Half of our share are 25 calls of numpy, half the interpreter's way to them. Where a GPU does the work, the cache is
  left alone.
- **The loader.** Half of its share of a step goes into the losses: they are checked, kept and counted. With a dataset
  that costs next to nothing a step takes 1.5 times a DataLoader's.
- **An epoch's end.** For 5,000 samples it is 25 round trips and changes of threads, one after the other: the last
  losses, the end of the epoch, the turn, the next stream. For 100,000 samples folding, planning and summing up take
  half of it.
- **A turn of 100,000 samples** takes 0.02 s: 9 ms of planning, 4 of folding, 4 of reading, 2 of writing the table, and
  the calls and round trips around them, which plain numpy has none of. At 1.28 million they are a tenth.
"""


def line_of(row: Row) -> str:
    """A row for the terminal."""
    said = f"{row.name}: {_number(row.value)} {row.unit} [{_number(min(row.values))}, {_number(max(row.values))}]"
    if row.target is not None:
        said += f" (promised: {_number(row.target)})"
    if row.ratio is not None:
        said += f"; {row.ratio:.3g} times {row.compared_with}"
        if row.ratio_target is not None:
            said += f" (promised: {_ratio_bound(row.as_dict())})"
    return said if row.met else f"{said}  -- NOT MET"


def keep(rows: list[Row], form: str, machine: dict[str, Any], date: datetime.date, results: Path, page: Path) -> None:
    """Put the rows in the place of those of the same form, and make the page anew."""
    kept = json.loads(results.read_text())["rows"] if results.exists() else []
    all_rows = [row for row in kept if row["form"] != form] + [row.as_dict() | {"form": form} for row in rows]
    found = {"date": date.isoformat(), "machine": machine, "rows": all_rows}
    results.write_text(json.dumps(found, indent=2) + "\n")
    lines = "\n".join(map(_table_row, all_rows))
    page.write_text(_PAGE.format(**machine, date=date.isoformat(), rows=lines))


def _table_row(row: dict[str, Any]) -> str:
    bound = _bound(row["higher_is_better"])
    spread = "" if row["low"] == row["high"] else f" [{_number(row['low'])}, {_number(row['high'])}]"
    name = f"{row['name']} ({row['note']})" if row["note"] else row["name"]
    cells = [name, f"{_number(row['value'])}{spread} {row['unit']}"]
    cells.append("" if row["target"] is None else f"{bound} {_number(row['target'])}")
    if row["ratio"] is None:
        cells += ["", "", "", ""]
    else:
        cells += [row["compared_with"], _number(row["compared_value"]), f"{row['ratio']:.3g}"]
        cells.append("" if row["ratio_target"] is None else _ratio_bound(row))
    return f"| {' | '.join([*cells, 'yes' if row['met'] else '**no**'])} |"


def _ratio_bound(row: dict[str, Any]) -> str:
    least = f"{_bound(row['higher_is_better'])} {row['ratio_target']:g}"
    return least if row.get("ratio_most") is None else f"{least}, ≤ {row['ratio_most']:g}"


def _bound(higher_is_better: bool) -> str:
    return "≥" if higher_is_better else "≤"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
