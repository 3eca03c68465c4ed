"""Accuracy against FLOPs as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

from ..extras import require
from .accuracy import Score

__all__ = ["plot_tradeoff"]


def plot_tradeoff(scores: Sequence[Score], title: str) -> Image.Image:
    """Top-1 against FLOPs spent, a line for each mode, bars for the 95 % interval of the drop from dense.

    Raises MissingExtraError without matplotlib.
    """
    require("matplotlib", "learn", "the trade-off plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    figure = Figure(figsize=(5.6, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for mode in dict.fromkeys(score.mode for score in scores):
        rows = sorted((score for score in scores if score.mode == mode), key=lambda score: score.fraction)
        reach = [100 * (row.drop_interval[1] - row.drop_interval[0]) / 2 for row in rows]
        axes.errorbar(
            [row.fraction for row in rows], [100 * row.top1 for row in rows], reach, marker="o", capsize=3, label=mode
        )
    dense = 100 * (scores[0].top1 + scores[0].drop)
    axes.axhline(dense, color="black", linestyle="--", linewidth=1, label="dense")
    axes.set(xlabel="FLOPs, as a fraction of dense", ylabel="top-1, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return Image.open(stream).convert("RGB")
