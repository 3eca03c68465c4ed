"""Draw accuracy against epochs and against seconds from a result of compare.py.

python recipes/fewer_epochs/plot.py RESULT.json PICTURE.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from patchlife.visual.plots import new_figure, rendered

LOOK = {
    "ours": ("PatchLife, any budget", "#0a7d3c"),
    "ours-one": ("PatchLife, this budget only", "#7fbf3f"),
    "evit": ("EViT", "#c44e52"),
    "dynamicvit": ("DynamicViT", "#4c72b0"),
}


def plot(result: dict[str, Any]) -> Image.Image:
    """A column for each set of photos; above against epochs, below against seconds."""
    sets = [name for name in result["curves"][0]["curve"][0] if name not in ("epoch", "seconds")]
    figure = new_figure(10, 7)
    axes = figure.subplots(2, len(sets), squeeze=False)
    longest = max(curve["epochs"] for curve in result["curves"])
    for column, name in enumerate(sets):
        for row, unit in enumerate(("epoch", "seconds")):
            ax = axes[row][column]
            for curve in result["curves"]:
                if unit == "seconds" and curve.get("threads") != result["curves"][0].get("threads"):
                    continue  # its seconds are others
                title, colour = LOOK[curve["method"]]
                points = curve["curve"]
                ax.plot(
                    [p[unit] for p in points],
                    [p[name]["top1"] for p in points],
                    "-o" if curve["epochs"] == longest or curve["method"].startswith("ours") else "--s",
                    color=colour,
                    markersize=4,
                    label=f"{title}, {curve['epochs']} epochs",
                )
            ax.set(xlabel="epochs of training" if unit == "epoch" else "seconds of training", ylabel="top-1, %")
            ax.axhline(result["dense"][name], color="0.5", linewidth=1, linestyle=":", label="dense")
            ax.set_title(name)
            ax.grid(alpha=0.3)
    axes[0][0].legend(frameon=False)
    flops, size = result["curves"][0]["flops"], result["image_size"]
    figure.suptitle(f"ViT-Tiny, {size} px, {flops:.2f} of the dense FLOPs, {result['photos']} photos to learn from")
    return rendered(figure)


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text())).save(sys.argv[2])
