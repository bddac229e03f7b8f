"""ECharts options of the plots: pure functions of figures.

The colours are read on a light and on a dark page alike, so that a plot need not know which it is on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evosample.figures import STALENESS_LABELS, covered_share, staleness_shares
from evosample.sampling import SCORE_BIN_EDGES, EpochSummary, ExperimentSpec

Options = dict[str, Any]
Curve = Sequence[tuple[float, float | None]]

# Okabe and Ito's colours, told apart by colour-blind people too; then, for what ages, from fresh to old and never.
_COLORS = ("#0f8fd0", "#e69f00", "#009e73", "#d55e00")
_AGEING_COLORS = ("#00796b", "#26a69a", "#9ccc65", "#ffd54f", "#ffa726", "#e64a19", "#8d8d8d")
_TEXT_COLOR = "#7a828e"
_LINE_COLOR = "rgba(128, 128, 128, 0.25)"
_HEAT_COLORS = ("#440154", "#3b528b", "#21918c", "#5ec962", "#fde725")  # viridis
_MAX_HEAT_COLUMNS = 200
_MAX_MARKED_POINTS = 30

_DENSITY = "% of samples per doubling"
_LINES = ("solid", "dashed", "dotted")

_BIN_LABELS = ["0", *(f"{edge:.2g}" for edge in SCORE_BIN_EDGES)]
# The first bin goes on downwards and the last upwards; in a plot they are as wide as their like.
_BIN_DOUBLINGS = np.resize(np.log2([1.5, 4 / 3]), len(_BIN_LABELS))
_LEAST_SHOWN_SHARE = 0.001


def curves(
    named: Mapping[str, Curve],
    *,
    x: str = "epoch",
    y: str = "",
    is_share: bool = False,
    is_time: bool = False,
    empty: str = "after the first epoch",
) -> Options:
    """Curves over each other.

    Args:
        named: the points (x, y) of each; a y of None is a gap. Times are in milliseconds since 1970.
        x, y: the axes' titles, with units.
        is_share: y are shares, shown in percent.
        is_time: x are times.
        empty: what to say while there is no point.
    """
    series = [
        {
            "type": "line",
            "name": name,
            "data": [[at, _percent(value) if is_share else _rounded(value)] for at, value in points],
            "showSymbol": len(points) <= _MAX_MARKED_POINTS,
            **_POINTS,
            "lineStyle": {"width": 2, "type": line},
        }
        for (name, points), line in zip(named.items(), cycle(_LINES), strict=False)
    ]
    return {
        **_base(is_empty=not any(named.values()), empty=empty, has_legend=len(named) > 1),
        "xAxis": _x_axis(x, **(_TIMES if is_time else _NUMBERS)),
        "yAxis": _axis(y, type="value", **({"min": 0, "max": 100} if is_share else {"scale": True})),
        "series": series,
    }


def losses(epochs: Sequence[EpochSummary]) -> Options:
    """Mean loss of what each epoch visited, and the mean score of all samples at its end."""
    return curves({"mean loss": loss_curve(epochs), "mean score": [(e.epoch, e.mean_score) for e in epochs]}, y="loss")


def loss_curve(epochs: Sequence[EpochSummary]) -> Curve:
    """Mean loss by epoch."""
    return [(e.epoch, e.mean_loss if np.isfinite(e.mean_loss) else None) for e in epochs]


def shares(spec: ExperimentSpec, epochs: Sequence[EpochSummary]) -> Options:
    """Shares of the dataset that each epoch kept and chose."""
    return curves(
        {
            "kept": [(e.epoch, e.num_rows / spec.num_samples) for e in epochs],
            "chosen": chosen_curve(spec, epochs),
        },
        y="%",
        is_share=True,
    )


def chosen_curve(spec: ExperimentSpec, epochs: Sequence[EpochSummary]) -> Curve:
    """Share of the dataset that was back-propagated, by epoch."""
    return [(e.epoch, e.num_trained / spec.num_samples) for e in epochs]


def covered_curve(spec: ExperimentSpec, epochs: Sequence[EpochSummary]) -> Curve:
    """Share of the samples that have had a loss, by epoch."""
    return [(e.epoch, covered_share(spec, e)) for e in epochs]


def loss_by_work(epochs: Sequence[EpochSummary]) -> Curve:
    """Mean loss of each epoch over the samples that were back-propagated up to its end."""
    return [(e.total_trained, loss) for e, (_, loss) in zip(epochs, loss_curve(epochs), strict=True)]


def staleness(spec: ExperimentSpec, epochs: Sequence[EpochSummary]) -> Options:
    """Shares of the samples by how long ago their latest loss was, stacked, by epoch."""
    shares_of = [staleness_shares(spec, e) for e in epochs]
    options = curves(
        {
            label: [(e.epoch, float(found[i])) for e, found in zip(epochs, shares_of, strict=True)]
            for i, label in enumerate(STALENESS_LABELS)
        },
        y="% of samples",
        is_share=True,
    )
    for series in options["series"]:
        series |= {"stack": "samples", "areaStyle": {"opacity": 0.85}, "lineStyle": {"width": 0}, "showSymbol": False}
        if len(epochs) == 1:  # an area of one epoch has no width
            series |= {"type": "bar", "barWidth": 40}
    options["legend"]["icon"] = "roundRect"
    return options | {"color": list(_AGEING_COLORS)}


def histograms(named: Mapping[str, EpochSummary]) -> Options:
    """Distributions of the scores of all samples at an epoch's end: bars of one, curves of several."""
    densities = score_densities(list(named.values()))
    bins = _shown_bins(densities)
    shape: Options = {"type": "bar", "barCategoryGap": "10%"} if len(named) == 1 else {"type": "line", **_POINTS}
    return {
        **_base(is_empty=not named, has_legend=len(named) > 1),
        "xAxis": _x_axis("score", type="category", data=_BIN_LABELS[bins]),
        "yAxis": _axis(_DENSITY, type="value"),
        "series": [
            {"name": name, "data": density[bins].round(2).tolist(), "lineStyle": {"type": line}, **shape}
            for (name, density), line in zip(zip(named, densities, strict=True), cycle(_LINES), strict=False)
        ],
    }


def heat_map(epochs: Sequence[EpochSummary]) -> Options:
    """How the scores' distribution moves, by epoch and score. Of a long history, epochs that follow are averaged."""
    densities = score_densities(epochs)
    bins = _shown_bins(densities)
    columns = np.array_split(np.arange(len(epochs)), min(len(epochs), _MAX_HEAT_COLUMNS)) if epochs else []
    cells = [
        [column, row, round(float(density), 2)]
        for column, group in enumerate(columns)
        for row, density in enumerate(densities[group][:, bins].mean(axis=0))
    ]
    highest = max((cell[2] for cell in cells), default=1.0)
    scores = _BIN_LABELS[bins]
    return {
        **_base(is_empty=not epochs, has_legend=False),
        "tooltip": _TOOLTIP | {"trigger": "item"},
        "grid": _GRID | {"bottom": 84},
        "xAxis": _x_axis("epoch", type="category", data=[str(epochs[group[0]].epoch) for group in columns]),
        "yAxis": _axis("score", type="category", data=scores, axisLabel=_LABEL | {"interval": len(scores) // 9}),
        "visualMap": {
            "show": bool(epochs),
            "min": 0,
            "max": highest,
            "orient": "horizontal",
            "left": "center",
            "bottom": 4,
            "itemHeight": 120,
            "itemWidth": 12,
            "text": [f"{highest:.2g} {_DENSITY}", "0"],
            "textStyle": {"color": _TEXT_COLOR},
            "inRange": {"color": list(_HEAT_COLORS)},
        },
        "series": [
            {
                "type": "heatmap",
                "dimensions": ["epoch", "score", _DENSITY],
                "encode": {"x": 0, "y": 1, "value": 2, "tooltip": [0, 1, 2]},
                "data": cells,
            }
        ],
    }


def score_densities(epochs: Sequence[EpochSummary]) -> NDArray[np.float64]:
    """Percent of the samples per doubling of the score, in each bin: float64 [len(epochs), bins].

    Bins are not equally wide, two to a doubling: counts as such would go up and down.
    """
    counts = np.array([e.score_histogram for e in epochs], np.float64).reshape(len(epochs), len(_BIN_DOUBLINGS))
    densities: NDArray[np.float64] = 100 * counts / counts.sum(axis=1, keepdims=True) / _BIN_DOUBLINGS
    return densities


def _shown_bins(densities: NDArray[np.float64]) -> slice:
    """The bins without those at either end that never have a thousandth of the samples."""
    used = np.flatnonzero((densities * _BIN_DOUBLINGS >= 100 * _LEAST_SHOWN_SHARE).any(axis=0))
    return slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)


_GRID: Options = {"left": 8, "right": 16, "top": 34, "containLabel": True}
_LABEL: Options = {"color": _TEXT_COLOR, "hideOverlap": True}
_POINTS: Options = {"symbol": "circle", "symbolSize": 5}
_NUMBERS: Options = {"type": "value", "min": "dataMin", "max": "dataMax", "minInterval": 1}
_TIMES: Options = {"type": "time", "minInterval": 1000, "splitNumber": 4}
_TOOLTIP: Options = {
    "trigger": "axis",
    "confine": True,
    "backgroundColor": "rgba(40, 44, 52, 0.95)",
    "borderWidth": 0,
    "textStyle": {"color": "#ffffff", "fontSize": 12},
}


def _base(*, is_empty: bool, has_legend: bool, empty: str = "after the first epoch") -> Options:
    return {
        "animation": False,
        "color": list(_COLORS),
        "textStyle": {"color": _TEXT_COLOR},
        "title": {
            "show": is_empty,
            "text": empty,
            "left": "center",
            "top": "middle",
            "textStyle": {"color": _TEXT_COLOR, "fontSize": 14, "fontWeight": "normal"},
        },
        "grid": _GRID | {"bottom": 52 if has_legend else 28},
        "legend": {
            "show": has_legend and not is_empty,
            "type": "scroll",
            "bottom": 0,
            "itemWidth": 22,
            "textStyle": {"color": _TEXT_COLOR},
            "pageIconColor": _TEXT_COLOR,
            "pageTextStyle": {"color": _TEXT_COLOR},
        },
        "tooltip": _TOOLTIP,
    }


def _axis(name: str, **options: Any) -> Options:
    return {
        "name": name,
        "nameTextStyle": {"color": _TEXT_COLOR, "align": "left"},
        "axisLabel": _LABEL,
        "axisLine": {"lineStyle": {"color": _LINE_COLOR}},
        "axisTick": {"lineStyle": {"color": _LINE_COLOR}},
        "splitLine": {"lineStyle": {"color": _LINE_COLOR}},
        **options,
    }


def _x_axis(name: str, **options: Any) -> Options:
    axis = _axis(name, **options)
    return axis | {
        "nameLocation": "middle",
        "nameGap": 26,
        "nameTextStyle": {"color": _TEXT_COLOR},
        "splitLine": {"show": False},
    }


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 2)


def _rounded(value: float | None) -> float | None:
    """Four digits: enough to see, little to send."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.4g}")
