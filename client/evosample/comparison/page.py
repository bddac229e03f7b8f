"""The page of a comparison: verdicts, a table and plots, in one file that needs no other."""

from __future__ import annotations

import importlib.resources
import io
import itertools
from collections.abc import Callable
from pathlib import Path

import jinja2
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evosample.comparison.figures import Comparison, Difference, MethodFigures

_BASELINE_COLOR = "0.3"
_METHOD_COLORS = [f"C{number}" for number in (0, 1, 2, 3, 4, 5, 6, 8, 9)]  # matplotlib's, but for the grey one
_COLORS = {"better": "C2", "worse": "C3", "not better": "C0", "unknown": "C0"}


def write_page(comparison: Comparison, title: str, file: Path) -> None:
    """Write a comparison as HTML."""
    template = (importlib.resources.files(__package__) / "page.html").read_text()
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    plots = [Markup(svg(figure)) for figure in (plot_time(comparison), plot_differences(comparison))]  # noqa: S704  # our own
    page = environment.from_string(template).render(comparison=comparison, title=title, plots=plots)
    file.write_text(page, encoding="utf-8")


def svg(figure: Figure) -> str:
    """A figure as an SVG element."""
    data = io.StringIO()
    figure.savefig(data, format="svg", metadata={"Date": None})
    text = data.getvalue()
    return text[text.index("<svg") :]


def plot_time(comparison: Comparison) -> Figure:
    """The metric against training time: methods as points, random subsets as the line that they have to be above."""
    figure, axes = _figure(0.0)
    metric = _plain(comparison.metric)
    line = comparison.baselines
    _bars(axes, line, _BASELINE_COLOR, f"{line[0].name}, for more and more epochs", "-o")
    for method, color in zip(comparison.methods, itertools.cycle(_METHOD_COLORS), strict=False):
        _bars(axes, (method,), color, _plain(method.name), "D")
    axes.set_xlabel(f"training time (seconds{', of processors' if comparison.clock == 'cpu' else ''})")
    axes.set_ylabel(metric)
    axes.set_xlim(left=0)
    axes.set_title(f"{metric} against training time, mean ± standard error")
    axes.legend(loc="best", fontsize="small")
    return figure


def _plain(text: str) -> str:
    """Text that is shown as it is: dollar signs would make it a formula."""
    return text.replace("$", r"\$")


def _bars(axes: Axes, figures: tuple[MethodFigures, ...], color: str, label: str, style: str) -> None:
    axes.errorbar(
        [each.seconds.mean for each in figures],
        [each.metric.mean for each in figures],
        xerr=[each.seconds.standard_error or 0 for each in figures],
        yerr=[each.metric.standard_error or 0 for each in figures],
        fmt=style,
        color=color,
        capsize=3,
        label=label,
    )


def plot_differences(comparison: Comparison) -> Figure:
    """Differences from random subsets, with their intervals: for as much training time, and for as many epochs."""
    figure, axes = _figure(0.4 * len(comparison.methods))
    _forest(axes, comparison, lambda method: method.equal_time, -0.12, "o", "for as much training time: the verdict")
    _forest(axes, comparison, lambda method: method.equal_epochs, 0.12, "x", "for as many epochs")
    axes.axvline(0, color=_BASELINE_COLOR)
    axes.set_yticks(range(len(comparison.methods)), [_plain(method.name) for method in comparison.methods])
    axes.invert_yaxis()
    axes.set_xlabel(f"{_plain(comparison.metric)}: method - {comparison.baselines[0].name}, 95 % interval")
    axes.set_title(
        f"Against {comparison.baselines[0].name}: "
        f"{'right' if comparison.higher_is_better else 'left'} of the line is better"
    )
    axes.legend(loc="best", fontsize="small")
    return figure


def _forest(
    axes: Axes,
    comparison: Comparison,
    difference_of: Callable[[MethodFigures], Difference | None],
    offset: float,
    marker: str,
    label: str,
) -> None:
    for position, method in enumerate(comparison.methods):
        difference = difference_of(method)
        if difference is not None:
            half = 0.0 if difference.interval is None else difference.interval[1] - difference.mean
            axes.errorbar(
                difference.mean,
                position + offset,
                xerr=half,
                fmt=marker,
                color=_COLORS[method.verdict or "unknown"] if marker == "o" else _BASELINE_COLOR,
                capsize=3,
                label=label if not position else None,
            )


def _figure(extra_height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, 4.5 + extra_height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes
