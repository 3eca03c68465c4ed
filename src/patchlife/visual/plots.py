"""Plots: the only module of the package that uses matplotlib."""

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
        flops: fraction of the dense FLOPs. top1: in %. reach: half of its 95 % interval, in points.
    """

    flops: float
    top1: float
    reach: float


def new_figure(width: float, height: float, dpi: int = 110) -> Any:
    """A matplotlib figure of this size in inches, without pyplot: no global state, no display.

    Raises MissingExtraError without matplotlib.
    """
    require("matplotlib", "bench", "a plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def rendered(figure: Any) -> Image.Image:
    """The figure as a picture."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return Image.open(stream).convert("RGB")


def plot_tradeoff(curves: Mapping[str, Sequence[Point]], dense_top1: float, title: str) -> Image.Image:
    """Top-1 against FLOPs, a line for each of ``curves``, with a bar for each point's interval.

    Raises MissingExtraError without matplotlib.
    """
    figure = new_figure(5.6, 4.2, dpi=130)
    axes = figure.add_subplot()
    for label, points in curves.items():
        flops, top1, reach = zip(*sorted(points), strict=True)
        axes.errorbar(flops, top1, reach, marker="o", capsize=3, label=label)
    axes.axhline(dense_top1, color="black", linestyle="--", linewidth=1, label="dense")
    axes.set(xlabel="FLOPs, as a fraction of dense", ylabel="top-1, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return rendered(figure)
