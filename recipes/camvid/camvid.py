"""CamVid as tensors: street scenes of 480 x 360 pixels with a class index for every pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from patchlife.errors import ConfigError

CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
THIN = ("pole", "pedestrian", "bicyclist")  # a few pixels wide: the first classes that a reduction could lose
IGNORE = 11  # pixels without a label
PHOTO = (360, 480)  # height, width of a photo and of its labels
INPUT = (352, 480)  # what the model reads and what is evaluated: 4 rows less at the top and the bottom, 22 x 30 patches


class Scenes:
    """The photos (scenes, 3, 360, 480) and labels (scenes, 360, 480) of one split, in the order of their names."""

    def __init__(
        self,
        paths: list[Path],
        photos: UInt8[Tensor, "scenes 3 height width"],
        labels: UInt8[Tensor, "scenes height width"],
    ) -> None:
        self.paths, self.photos, self.labels = paths, photos, labels

    def __len__(self) -> int:
        return len(self.photos)

    def evaluated(self) -> Scenes:
        """The same scenes with the rows that the model reads, 4 to 355: the cut of the library's own preprocessing."""
        top = (PHOTO[0] - INPUT[0]) // 2
        rows = slice(top, top + INPUT[0])
        return Scenes(self.paths, self.photos[:, :, rows], self.labels[:, rows])


def load(folder: Path, split: str, limit: int | None = None) -> Scenes:
    """Read `folder/split/{images,labels}`; `limit` keeps that many scenes, spread over the whole split.

    Raises ConfigError where there are no photos.
    """
    paths = sorted((folder / split / "images").iterdir()) if (folder / split / "images").is_dir() else []
    if not paths:
        raise ConfigError(f"expected photos in {split}/images of the CamVid folder; got none: pass --data FOLDER")
    if limit is not None:
        paths = [paths[i * len(paths) // limit] for i in range(min(limit, len(paths)))]
    photos = [_read(path, "RGB").permute(2, 0, 1) for path in paths]
    labels = [_read(folder / split / "labels" / f"{path.stem}.png", "L") for path in paths]
    return Scenes(paths, torch.stack(photos), torch.stack(labels))


def _read(path: Path, mode: str) -> UInt8[Tensor, "..."]:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image if image.mode == mode or mode == "L" else image.convert(mode)))


def as_input(
    photos: UInt8[Tensor, "batch 3 height width"], size: tuple[int, int] = INPUT
) -> Float[Tensor, "batch 3 rows columns"]:
    """Photos resized to `size` (antialiased) and normalised with mean = std = 0.5, as the shared ViT-Tiny wants."""
    pixels = photos.float() / 127.5 - 1
    if pixels.shape[-2:] != size:
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
    return pixels


def as_pixels(
    logits: Float[Tensor, "batch classes rows columns"], size: tuple[int, int] = INPUT
) -> Float[Tensor, "batch classes height width"]:
    """The head's logits enlarged to the labels' pixels."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def class_weights(labels: UInt8[Tensor, "scenes height width"]) -> Float[Tensor, " classes"]:
    """Square root of median frequency over frequency: rare classes count more, without ruling the loss."""
    counts: Int[Tensor, " values"] = torch.bincount(labels.flatten().long(), minlength=IGNORE + 1)
    frequency = counts[:IGNORE].float().clamp(min=1)
    return (frequency.median() / frequency).sqrt()
