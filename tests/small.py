"""A small timm checkpoint and small photos, as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timm
from families import liven
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

NAME = "test_vit"  # a test model of timm: 160 pixels, 100 patches, 6 blocks
CLASSES = 10


def weights(seed: int = 0, **arguments: object) -> dict[str, Tensor]:
    """Random weights of the model `NAME` with ten classes."""
    model = liven(timm.create_model(NAME, **{"num_classes": CLASSES, **arguments}), seed)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def checkpoint(path: Path, seed: int = 0, **arguments: object) -> Path:
    """Write `weights` to the file ``path``."""
    save_file(weights(seed, **arguments), path)
    return path


def photo(seed: int, width: int = 90, height: int = 70) -> Image.Image:
    """A picture of smooth random shapes without symmetry, different for each seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def write_photos(folder: Path, count: int, first: int = 0) -> list[Path]:
    """Write photos 00.png, 01.png, ... to ``folder``. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:02}.png" for index in range(first, first + count)]
    for index, path in enumerate(paths, first):
        photo(index).save(path)
    return paths
