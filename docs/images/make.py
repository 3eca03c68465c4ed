"""Draws the README's picture, lives.png: for two photos the patches kept at three blocks and the life map; beside them
top-1 against FLOPs, from the committed result of ``patchlife bench``.

    python docs/images/make.py WEIGHTS CALTECH101_TEST ADAPTER

WEIGHTS is the ViT-Tiny checkpoint, CALTECH101_TEST a folder with the test photos of Caltech-101, ADAPTER an adapter
for this ViT-Tiny.
"""

import sys
from pathlib import Path

import torch
from PIL import Image

from patchlife.benchmarks.result import Result
from patchlife.config import ModelConfig
from patchlife.data import read_photo
from patchlife.runtime.opening import open_pipeline
from patchlife.visual import draw, strip
from patchlife.visual.plots import new_figure, rendered

PHOTOS = ("kangaroo/image_0034.jpg", "dalmatian/image_0043.jpg")
BUDGET, HEIGHT, GAP = 0.5, 200, 10
RESULT = Path(__file__).parents[2] / "results" / "bench-adapter-eager-20261127-190147.json"
CURVES = {  # method: label, line
    "ours-learned-fixed": ("PatchLife, low-rank adapter", "o-"),
    "ours-fixed": ("PatchLife, nothing trained", "o--"),
    "tome": ("ToMe, nothing trained", "s:"),
}


def row(pipeline, path: Path) -> Image.Image:
    """The strip of one photo, and its life map with the legend beside it."""
    photo = read_photo(path)
    with torch.inference_mode():
        lives = pipeline.model.lives(pipeline.preprocess(photo)[None])
    left = strip(photo, lives, blocks=(0, 3, 6), preprocess=pipeline.preprocess, width=HEIGHT)
    right = draw(photo, lives, preprocess=pipeline.preprocess, width=HEIGHT)
    canvas = Image.new("RGB", (left.width + GAP + right.width, max(left.height, right.height)), "white")
    canvas.paste(left, (0, 0))
    canvas.paste(right, (left.width + GAP, 0))
    return canvas


def trade_off(height: int) -> Image.Image:
    """Top-1 against FLOPs of the slimmed ViT-Tiny, a line for each method."""
    accuracy = Result.load(RESULT).accuracy
    (dense,) = [row for row in accuracy if row.method == "dense"]
    figure = new_figure(4.0, height / 100, dpi=100)
    axes = figure.add_subplot()
    for method, (label, line) in CURVES.items():
        points = [(100 * row.flops, row.top1) for row in accuracy if row.method == method]
        if "learned" not in method:  # without training, all of the FLOPs are the dense model
            points.append((100, dense.top1))
        axes.plot(*zip(*sorted(points), strict=True), line, label=label)
    axes.axhline(dense.top1, color="0.6", linewidth=1, label="dense model")
    axes.set(xlabel="FLOPs, % of the dense model", ylabel="top-1, %", title="ViT-Tiny, 1000 ImageNet photos")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    axes.grid(alpha=0.25)
    return rendered(figure)


def main(weights: str, photos: str, adapter: str) -> None:
    """Write lives.png into the folder of this file."""
    pipeline = open_pipeline(ModelConfig(adapter, checkpoint=Path(weights), life={"budget": BUDGET}))
    rows = [row(pipeline, Path(photos) / name) for name in PHOTOS]
    height = sum(picture.height for picture in rows)
    plot = trade_off(height)
    page = Image.new("RGB", (rows[0].width + 2 * GAP + plot.width, height), "white")
    for index, picture in enumerate(rows):
        page.paste(picture, (0, index * picture.height))
    page.paste(plot, (page.width - plot.width, 0))
    page.quantize(192).save(Path(__file__).with_name("lives.png"), optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
