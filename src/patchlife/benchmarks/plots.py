"""Plots of results: top-1 against images per second and against FLOPs; without photos, speed-up against FLOPs."""

from __future__ import annotations

import statistics
from typing import Any

from PIL import Image

from ..visual.plots import new_figure, rendered
from .result import Result
from .tables import CONTROLS, accuracy_of, is_ours, title_of

__all__ = ["plot"]

_MARKERS = "osD^vP*X<>ph"


def plot(result: Result) -> Image.Image:
    """The plot of a result. Raises MissingExtraError without matplotlib."""
    panels = _accuracy_panels(result) if result.accuracy else _speed_panels(result)
    figure = new_figure(5.2 * len(panels), 4.4, dpi=130)
    for place, panel in enumerate(panels, 1):
        _draw(figure.add_subplot(1, len(panels), place), result, panel)
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        handles |= {label: line for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return rendered(figure)


def _draw(axes: Any, result: Result, panel: dict[str, Any]) -> None:
    names = list(panel["lines"])
    for name, points in panel["lines"].items():
        if not points:
            continue
        x, y = zip(*sorted(points), strict=True)
        ours, number = is_ours(result, name), names.index(name)
        axes.plot(
            x,
            y,
            label=title_of(result, name),
            marker=_MARKERS[number % len(_MARKERS)],
            color="black" if name in CONTROLS[:2] else f"C{number % 10}",
            linewidth=2.2 if ours else 1.0,
            linestyle="-" if ours else "--",
            markersize=7 if ours else 5,
            zorder=3 if ours else 2,
        )
    for guide in panel.get("guides", ()):
        axes.plot(*guide, color="0.7", linewidth=1, zorder=1)
    axes.set(xlabel=panel["x"], ylabel=panel["y"], title=panel["title"])
    axes.grid(alpha=0.25)


def _accuracy_panels(result: Result) -> list[dict[str, Any]]:
    """Top-1 against throughput at the smallest and largest batch size, and against FLOPs.

    A method's throughput is the dense model's median over all runs at the batch size, times the method's ratio to
    dense: the speed of a shared machine changes from run to run, and would show in the lines otherwise.
    """
    names = list(dict.fromkeys(row.method for row in result.accuracy if row.top1 is not None))
    against_flops: dict[str, list] = {name: [] for name in names}
    for row in result.accuracy:
        if row.top1 is not None:
            against_flops[row.method].append((row.flops, row.top1))
    panels = []
    for batch in sorted({result.batches[0], result.batches[-1]}) if result.batches else []:
        lines: dict[str, list] = {name: [] for name in names}
        timings = [row for row in result.speed if row.batch == batch and row.images_per_second]
        dense = [row.images_per_second or 0 for row in timings if row.method == "dense"]
        for timed in timings:
            evaluated = accuracy_of(result, timed.method, timed.target)
            if timed.ratio and evaluated and evaluated.top1 is not None:
                lines[timed.method].append((statistics.median(dense) * timed.ratio.median, evaluated.top1))
        title = f"batch {batch}"
        panels.append({"x": "images per second", "y": "top-1, %", "title": title, "lines": lines})
    flops = {"x": "fraction of the dense FLOPs", "y": "top-1, %", "title": "at equal FLOPs", "lines": against_flops}
    return [*panels, flops]


def _speed_panels(result: Result) -> list[dict[str, Any]]:
    """Speed-up against FLOPs, one panel for each of at most four batch sizes; the grey line is the ideal."""
    panels = []
    ideal = [x / 100 for x in range(int(100 * min(result.targets, default=0.4)), 101)]
    for batch in result.batches[:4]:
        lines: dict[str, list] = {name: [] for name in dict.fromkeys(r.method for r in result.speed)}
        for row in result.speed:
            if row.batch == batch and row.ratio and not row.noisy and row.method != "dense":
                lines[row.method].append((row.flops, row.ratio.median))
        title = f"batch {batch}"
        guides = [(ideal, [1 / x for x in ideal])]
        axes = {"x": "fraction of the dense FLOPs", "y": "times as fast as dense", "title": title}
        panels.append({**axes, "lines": lines, "guides": guides})
    return panels or [{"x": "", "y": "", "title": "nothing was measured", "lines": {}}]
