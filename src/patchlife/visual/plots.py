"""Plots. No other module imports matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from ..extras import require

__all__ = ["Point", "new_figure", "plot_tradeoff", "rendered"]


class Point(NamedTuple):
    """A point of a trade-off curve.

    Attributes:
        flops: fraction of the dense FLOPs.
        value: top-1 in %, or what else the curve shows.
        half_interval: half the width of the bar, such as that of a 95 % interval, in the unit of ``value``.
    """

    flops: float
    value: float
    half_interval: float


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


def plot_tradeoff(
    curves: Mapping[str, Sequence[Point]], dense: float, title: str, axis: str = "top-1, %"
) -> Image.Image:
    """Plot top-1 against FLOPs, with one line per curve and an error bar per point.

    Args:
        curves: the points of each curve, by its label in the legend.
        dense: top-1 of the dense model in %, drawn as a horizontal line.
        title: of the plot.
        axis: what the curves show, if it is not top-1.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = new_figure(5.6, 4.2, dpi=130)
    axes = figure.add_subplot()
    for label, points in curves.items():
        flops, values, half_interval = zip(*sorted(points), strict=True)
        axes.errorbar(flops, values, half_interval, marker="o", capsize=3, label=label)
    axes.axhline(dense, color="black", linestyle="--", linewidth=1, label="dense")
    axes.set(xlabel="FLOPs, as a fraction of dense", ylabel=axis, title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return rendered(figure)
