"""Draw mIoU and KL against FLOPs from the result of summary.py.

python recipes/camvid/plot.py results/camvid_cpu_DATE.json docs/images/camvid.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from patchlife.visual.plots import new_figure, rendered

LOOK = {  # the first two with drop points 2 and 6, the others with the settings of methods.py
    "long-adapter": ("PatchLife, low-rank delta", "#0a7d3c", "-o"),
    "long-scorer": ("PatchLife, scorer only", "#7fbf3f", "-o"),
    "untrained": ("PatchLife, nothing trained", "#b6d7a8", "-o"),
    "tome": ("ToMe, un-merging by residual", "#c44e52", "--s"),
    "smaller-input": ("smaller input", "#4c72b0", "--s"),
    "random": ("random patches", "0.6", "--s"),
    "uniform-grid": ("uniform grid", "0.3", "--s"),
}


def plot(result: dict[str, Any]) -> Image.Image:
    """Left: points of mIoU below the dense model; right: KL divergence of the pixels; both against FLOPs."""
    figure = new_figure(11, 4.2)
    points, divergence = figure.subplots(1, 2)
    for method, (title, colour, style) in LOOK.items():
        settings = {"drops": [2, 6]} if method.startswith("long-") else {}
        scores = [score for score in result["scores"] if (score["method"], score["settings"]) == (method, settings)]
        scores = sorted(scores, key=lambda score: score["fraction"])
        flops = [score["fraction"] for score in scores]
        look = {"color": colour, "markersize": 4, "label": title}
        points.plot(flops, [-100 * score["drop"] for score in scores], style, **look)
        divergence.plot(flops, [score["kl"] for score in scores], style, **look)
    points.axhline(0, color="0.5", linewidth=1, linestyle=":")
    points.set(xlabel="FLOPs of the dense model, head included", ylabel="mIoU, points from the dense model")
    divergence.set(
        xlabel="FLOPs of the dense model, head included", ylabel="KL divergence of a pixel, nats", yscale="log"
    )
    points.legend(frameon=False, fontsize=8)
    for axes in (points, divergence):
        axes.grid(alpha=0.3)
    figure.suptitle(f"CamVid, {result['scenes']} scenes of val; ViT-Tiny at {' x '.join(map(str, result['input']))}")
    return rendered(figure)


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text())).save(sys.argv[2])
