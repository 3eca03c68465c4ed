"""Draws the README's picture, lives.png: for two photos, the patches kept at three blocks, then the life map.

    python docs/images/make.py WEIGHTS CALTECH101_TEST ADAPTER

WEIGHTS is the ViT-Tiny checkpoint, CALTECH101_TEST a folder with the test photos of Caltech-101, ADAPTER an adapter
for this ViT-Tiny.
"""

import sys
from pathlib import Path

import torch
from PIL import Image

from patchlife.config import ModelConfig
from patchlife.data import read_photo
from patchlife.runtime.opening import open_pipeline
from patchlife.visual import draw, strip

PHOTOS = ("kangaroo/image_0034.jpg", "dalmatian/image_0043.jpg")
BUDGET, HEIGHT, GAP = 0.5, 200, 10


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


def main(weights: str, photos: str, adapter: str) -> None:
    """Write lives.png into the folder of this file."""
    pipeline = open_pipeline(ModelConfig(adapter, checkpoint=Path(weights), life={"budget": BUDGET}))
    rows = [row(pipeline, Path(photos) / name) for name in PHOTOS]
    page = Image.new("RGB", (rows[0].width, sum(r.height for r in rows)), "white")
    for index, picture in enumerate(rows):
        page.paste(picture, (0, index * picture.height))
    page.quantize(192).save(Path(__file__).with_name("lives.png"), optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
