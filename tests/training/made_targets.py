"""A small model, random photos on disk, and settings with which a fit takes a second."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
from families import built
from PIL import Image

from patchlife import LifeConfig, SlimModel, wrap
from patchlife.config import TrainingConfig
from patchlife.data import Preprocess, list_samples
from patchlife.training.target_cache import Photo

PREPROCESS = Preprocess(size=(48, 48), crop_fraction=1.0)
QUICK = TrainingConfig(epochs=2, batch_size=4, finetune_epochs=2, rank=2, save_every=0.0, lowest_budget=0.6)


def small_model() -> SlimModel:
    """An untrained five-block ViT that drops patches before blocks 2 and 3."""
    return wrap(built("vit"), LifeConfig(budget=0.7, start=2, drops=(2, 3)))


def some_photos(folder: Path, count: int = 12) -> list[Photo]:
    """Photos of random smooth colours with labels 0, 1, 2, 0, ..., written to ``folder``."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    photos = []
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        path = folder / f"{index:02}.png"
        coarse.resize((48, 48), Image.Resampling.BILINEAR).save(path)
        photos.append(Photo(path, index % 3))
    return photos


def in_shards(folder: Path, photos: list[Photo], shards: int = 3) -> list[Photo]:
    """The same photos, in the same order, as samples of tar files in ``folder``."""
    paths = [folder / f"{index}.tar" for index in range(shards)]
    for index, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for photo in photos[index::shards]:
                tar.add(str(photo.path), photo.path.name)
    samples = {sample.name: sample for sample in list_samples([str(path) for path in paths])}
    return [Photo(samples[photo.path.name], photo.label) for photo in photos]
