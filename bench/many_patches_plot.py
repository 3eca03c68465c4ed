"""Draws time and peak memory against the number of patches from a result of `many_patches.py`.

python bench/many_patches_plot.py results/many_patches_cpu.json docs/images/many_patches.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from patchlife.visual.plots import new_figure, rendered

BOUND = "no-decision bound"
LOOK = {  # run: label, line, colour
    "dense": ("dense", "o-", "black"),
    "ToMe": ("ToMe, equal FLOPs", "s:", "C1"),
    "merging": ("PatchLife, attention rule", "o-", "C0"),
    "merging, learned scorer": ("PatchLife, learned scorer", "D--", "C2"),
    BOUND: (BOUND, "^:", "0.55"),
}


def plot(records: list[dict[str, Any]]) -> Image.Image:
    """Three panels: seconds of one image, speed over the bound, and megabytes of the first call."""
    figure = new_figure(13.6, 4.4, dpi=120)
    left, middle, right = panels = figure.subplots(1, 3)
    budget, threads = (records[0]["conditions"][name] for name in ("budget", "threads"))
    left.set(ylabel="seconds per image", title=f"time, batch 1, {_counted(threads, 'thread')}")
    middle.set(title="speed over the no-decision bound", ylim=(0.88, 1.02))
    right.set(ylabel="MB", title="peak memory of the first call, weights left out")
    for run, (label, line, colour) in LOOK.items():
        style = {"label": label, "color": colour, "markersize": 5, "linewidth": 1.5}
        for axes, found in zip(panels, (_times, _ratios, _memory), strict=True):
            if points := found(records, run):
                axes.plot(*zip(*sorted(points), strict=True), line, **style)
    ticks = sorted({record["patches"] for record in records})
    for axes in panels:
        axes.set_xscale("log")
        if axes is not middle:
            axes.set_yscale("log")
            axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8)
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_xlabel("patches")
        axes.grid(alpha=0.25)
    handles, labels = (left if left.lines else right).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    figure.suptitle(f"ViT-S at {budget:.0%} of the dense FLOPs")
    return rendered(figure)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _times(records: list[dict[str, Any]], run: str) -> list[tuple[int, float]]:
    """(patches, seconds) of a run; the bound is timed beside the dense model."""
    beside = "dense" if run == BOUND else run
    found = [r for r in records if (r["measure"], r["run"]) == ("time", beside)]
    return [(r["patches"], r["seconds"][run]["median"]) for r in found]


def _ratios(records: list[dict[str, Any]], run: str) -> list[tuple[int, float]]:
    """(patches, speed over the bound) of a slimmed run; 1 for the bound."""
    if run == BOUND:
        return [(patches, 1.0) for patches, _ in _times(records, run)]
    found = [r for r in records if (r["measure"], r["run"]) == ("time", run) and run != "dense"]
    return [(r["patches"], r["ratios"][run]["median"]) for r in found]


def _memory(records: list[dict[str, Any]], run: str) -> list[tuple[int, float]]:
    """(patches, MB) of a run."""
    return [(r["patches"], r["bytes"] / 1e6) for r in records if (r["measure"], r["run"]) == ("memory", run)]


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text())["records"]).save(sys.argv[2])
