"""The README's picture: photo, life map, who is alive where. Needs the shared weights and photos (a data folder).

uv run python docs/images/make.py WEIGHTS CALTECH101_TEST ADAPTER
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
    """One photo's strip, then its life map with the legend."""
    photo = read_photo(path)
    with torch.inference_mode():
        lives = pipeline.model.lives(pipeline.preprocess(photo)[None])
    parts = [
        strip(photo, lives, blocks=(0, 3, 6), preprocess=pipeline.preprocess, width=HEIGHT),
        draw(photo, lives, preprocess=pipeline.preprocess, width=HEIGHT),
    ]
    canvas = Image.new("RGB", (sum(p.width for p in parts) + GAP, max(p.height for p in parts)), "white")
    canvas.paste(parts[0], (0, 0))
    canvas.paste(parts[1], (parts[0].width + GAP, 0))
    return canvas


def main(weights: str, photos: str, adapter: str) -> None:
    """Write lives.png beside this file."""
    pipeline = open_pipeline(ModelConfig(adapter, checkpoint=Path(weights), life={"budget": BUDGET}))
    rows = [row(pipeline, Path(photos) / name) for name in PHOTOS]
    page = Image.new("RGB", (rows[0].width, sum(r.height for r in rows)), "white")
    for index, picture in enumerate(rows):
        page.paste(picture, (0, index * picture.height))
    page.quantize(192).save(Path(__file__).with_name("lives.png"), optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
