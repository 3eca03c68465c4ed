"""Plots. No other module imports matplotlib."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from ..extras import require

__all__ = ["Panel", "Point", "new_figure", "plot_panels", "rendered"]

_MARKERS = "osD^vP*X<>ph"
_TICKS = (0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


class Point(NamedTuple):
    """A point of a curve.

    Attributes:
        budget: fraction of the dense FLOPs.
        value: top-1 in %, or what else the curve shows.
        half_interval: half the width of the bar, such as that of a 95 % interval, in the unit of ``value``; 0: no bar.
    """

    budget: float
    value: float
    half_interval: float = 0.0


class Panel(NamedTuple):
    """A measure against the budget.

    Attributes:
        axis: the measure and its unit.
        curves: the points of each curve, by its label in the legend.
        dense: the dense model's value, drawn as a horizontal line.
        others: labels of the curves of other methods, drawn thinner and dashed.
        from_zero: use a logarithmic scale that also shows 0, as for a KL divergence.
    """

    axis: str
    curves: Mapping[str, Sequence[Point]]
    dense: float | None = None
    others: Collection[str] = ()
    from_zero: bool = False


def new_figure(width: float, height: float, dpi: int = 110) -> Any:
    """A matplotlib figure without pyplot, so without global state or a display; sizes are in inches.

    Raises MissingExtraError if matplotlib is not installed.
    """
    require("matplotlib", "bench", "a plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def rendered(figure: Any) -> Image.Image:
    """The figure as an RGB picture."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return Image.open(stream).convert("RGB")


def plot_panels(panels: Sequence[Panel], title: str) -> Image.Image:
    """Plot measures against the budget: a panel beside the other for each measure, with one legend.

    Raises MissingExtraError if matplotlib is not installed.
    """
    figure = new_figure(0.8 + 4.6 * len(panels), 4.6, dpi=130)
    figure.suptitle(title)
    handles: dict[str, Any] = {}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axes, panel)
        handles |= {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return rendered(figure)


def _draw(axes: Any, panel: Panel) -> None:
    for number, (label, points) in enumerate(panel.curves.items()):
        if not points:
            continue
        budgets, values, half_interval = zip(*sorted(points), strict=True)
        other = label in panel.others
        axes.errorbar(
            budgets,
            values,
            half_interval if any(half_interval) else None,
            color=f"C{number % 10}",
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=4 if other else 6,
            linestyle="--" if other else "-",
            linewidth=1 if other else 2,
            capsize=2,
            zorder=2 if other else 3,
            label=label,
        )
    if panel.dense is not None:
        axes.axhline(panel.dense, color="black", linestyle=":", linewidth=1, label="dense")
    axes.set(xlabel="budget: FLOPs as a fraction of dense", ylabel=panel.axis)
    axes.grid(alpha=0.3)
    if panel.from_zero:
        _scale_from_zero(axes, max((point.value for points in panel.curves.values() for point in points), default=0))


def _scale_from_zero(axes: Any, highest: float) -> None:
    """A logarithmic scale that is linear below the first tick, so that 0 has a place."""
    axes.set_yscale("symlog", linthresh=_TICKS[1], linscale=0.5)
    axes.set_yticks(_TICKS, labels=[f"{tick:g}" for tick in _TICKS])
    axes.minorticks_off()
    axes.set_ylim(-_TICKS[1] / 4, max(1.4 * highest, _TICKS[2]))
