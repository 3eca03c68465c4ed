"""Draws dense.png, the picture of docs/how_to/dense.md: photos, a segmentation of the dense model's features, the same
of the slimmed model's, and the life map.

    python docs/images/make_dense.py WEIGHTS CALTECH101_TEST

WEIGHTS is the ViT-Tiny checkpoint, CALTECH101_TEST a folder with the test photos of Caltech-101. The head needs no
training: the patch features of the dense model are put into groups (k-means) for each photo, and a patch's class is the
group whose mean is nearest. The slimmed model's features are compared with the same means.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from patchlife.config import ModelConfig
from patchlife.data import read_photo
from patchlife.runtime.opening import open_pipeline
from patchlife.visual.answers import class_colours, draw_answers
from patchlife.visual.layout import stacked

PHOTOS = ("kangaroo/image_0034.jpg", "ketch/image_0002.jpg", "sunflower/image_0003.jpg")
PIXELS, BUDGET, GROUPS = 448, 0.5, 5


def features(model, images: Tensor) -> Tensor:
    """(patches, channels): the normed features behind two blocks, of the first image."""
    maps = model.forward_intermediates(images, indices=[8, 11], norm=True, intermediates_only=True)
    return torch.cat(maps, dim=1)[0].flatten(1).T


def means(points: Tensor) -> Tensor:
    """The means of GROUPS groups of ``points``: k-means, each first mean the point farthest from those before it."""
    found = points[:1]
    while len(found) < GROUPS:
        found = torch.cat((found, points[torch.cdist(points, found).amin(dim=1).argmax()][None]))
    for _ in range(30):
        nearest = torch.cdist(points, found).argmin(dim=1)
        found = torch.stack([points[nearest == group].mean(dim=0) for group in range(GROUPS)])
    return found


@torch.inference_mode()
def main(weights: str, photos: str) -> None:
    """Write dense.png into the folder of this file, and print how many patches get the dense model's class."""
    pipeline = open_pipeline(
        ModelConfig("vit_tiny_patch16_224", checkpoint=Path(weights), image_size=PIXELS, life={"budget": BUDGET})
    )
    model, preprocess = pipeline.model, pipeline.preprocess
    vit = model.unwrap()
    rows = []
    for name in PHOTOS:
        images = preprocess(read_photo(Path(photos) / name))[None]
        dense = features(vit, images)
        centres = means(dense)
        dense, slimmed = (
            torch.cdist(points, centres).argmin(dim=1).unflatten(0, vit.patch_embed.grid_size)
            for points in (dense, features(model, images))
        )
        print(f"{name}: {(dense == slimmed).float().mean():.1%} of the patches get the dense model's class")
        answers = [("dense", dense.numpy()), ("slimmed", slimmed.numpy())]
        colours = class_colours(GROUPS)
        rows.append(draw_answers(Path(photos) / name, answers, model.lives(images), colours, preprocess, width=230))
    stacked(rows, gap=8).quantize(192).save(Path(__file__).with_name("dense.png"), optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
