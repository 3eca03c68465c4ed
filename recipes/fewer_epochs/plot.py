"""Draw accuracy and KL against epochs and against seconds, means over seeds, from a result of compare.py.

python recipes/fewer_epochs/plot.py RESULT.json [RESULT.json ...] PICTURE.png
"""

from __future__ import annotations

import sys
from typing import Any

from PIL import Image
from seed_table import TITLES, Curves, by_run, mean_points, read, sets_of

from patchlife.visual.plots import new_figure, rendered

COLOURS = {
    "ours-delta": "#000000",
    "ours": "#0a7d3c",
    "ours-one": "#7fbf3f",
    "evit": "#c44e52",
    "dynamicvit": "#4c72b0",
    "tnt": "#dd8452",
    "tome": "#8172b3",
}
ROWS = (("epoch", "top1"), ("seconds", "top1"), ("epoch", "kl"), ("seconds", "kl"))
LABELS = {
    "epoch": "epochs of training",
    "seconds": "seconds of training",
    "top1": "top-1, %",
    "kl": "KL from the dense model, nats",
}


def plot(result: dict[str, Any]) -> Image.Image:
    """A column for each set of photos, a row for each pair of axes."""
    sets = sets_of(result)
    figure = new_figure(10, 14)
    axes = figure.subplots(len(ROWS), len(sets), squeeze=False)
    for column, name in enumerate(sets):
        for row, (unit, number) in enumerate(ROWS):
            ax = axes[row][column]
            _draw(ax, _comparable(result["curves"], unit), name, unit, number)
            if number == "top1":
                ax.axhline(result["dense"][name], color="0.5", linewidth=1, linestyle=":", label="dense")
            else:
                ax.set_yscale("log")
            ax.set(xlabel=LABELS[unit], ylabel=LABELS[number], title=name)
            ax.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    flops, size = result["curves"][0]["flops"], result["image_size"]
    figure.suptitle(f"ViT-Tiny, {size} px, {flops:.2f} of the dense FLOPs, {result['photos']} photos to learn from")
    return rendered(figure)


def _comparable(curves: Curves, unit: str) -> Curves:
    """All curves; against seconds those with as many threads as the first one, because the seconds of others differ."""
    return [c for c in curves if unit != "seconds" or c.get("threads") == curves[0].get("threads")]


def _draw(ax: Any, curves: Curves, name: str, unit: str, number: str) -> None:
    longest = max(curve["epochs"] for curve in curves)
    for (method, epochs), seeds in by_run(curves).items():
        points = mean_points(seeds)
        ax.plot(
            [p[unit] for p in points],
            [p[name][number] for p in points],
            "-o" if epochs == longest or method.startswith("ours") else "--s",
            color=COLOURS[method],
            markersize=4,
            label=f"{TITLES[method]}, {epochs} epochs",
        )


if __name__ == "__main__":
    *results, picture = sys.argv[1:]
    plot(read(results)).save(picture)
