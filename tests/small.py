"""A small timm model in a file, as a user would have one, and photos to show it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timm
from families import liven
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

NAME = "test_vit"  # timm's own for tests: 160 px, 100 patches, 6 blocks
CLASSES = 10


def weights(seed: int = 0, **changes: object) -> dict[str, Tensor]:
    """Random weights of a `NAME` with ten classes."""
    model = liven(timm.create_model(NAME, **{"num_classes": CLASSES, **changes}), seed)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def checkpoint(path: Path, seed: int = 0, **changes: object) -> Path:
    """A file of them."""
    save_file(weights(seed, **changes), path)
    return path


def photo(seed: int, width: int = 90, height: int = 70) -> Image.Image:
    """Soft shapes, different for each seed, not symmetric in any way."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def write_photos(folder: Path, count: int, first: int = 0) -> list[Path]:
    """Photos 0.png, 1.png, ... in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:02}.png" for index in range(first, first + count)]
    for index, path in enumerate(paths, first):
        photo(index).save(path)
    return paths
