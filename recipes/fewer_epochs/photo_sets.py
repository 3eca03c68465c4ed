"""The photos of track 3 and their cached targets, once for the start blocks of each method."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from patchlife.backbones import signature
from patchlife.data import list_photos
from patchlife.runtime.pipeline import Pipeline
from patchlife.training.target_cache import Photo, TargetCache, collect
from patchlife.training.targets import compute_targets

EVALUATED = ("in20/val", "in1k-samples")


class PhotoSets(NamedTuple):
    """Cached targets: ``train`` has no labels, ``evaluated`` has, by name of the set."""

    train: TargetCache
    evaluated: dict[str, TargetCache]


def photo_sets(pipeline: Pipeline, data: Path, photos: int, folder: Path, starts: tuple[int, ...]) -> PhotoSets:
    """The targets with the tokens that enter the blocks ``starts``; computed unless they are in ``folder``."""
    paths = list_photos([data / "in20/train", data / "caltech101/train"])
    cache = f"cache-{'-'.join(map(str, starts))}"
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).tolist()
    train = _cached(pipeline, [Photo(paths[i]) for i in order[:photos]], folder / cache, starts)
    evaluated = {}
    for name in EVALUATED:
        paths = list_photos([data / name])
        labelled = [Photo(p, label) for p, label in zip(paths, pipeline.labels.classes_of(paths), strict=True)]
        evaluated[name] = _cached(pipeline, labelled, folder / f"{cache}-{name.replace('/', '-')}", starts)
    return PhotoSets(train, evaluated)


def dense_top1(photos: TargetCache) -> float:
    """Top-1 of the dense model, in %."""
    targets, labels = photos.targets(range(len(photos))), photos.labels(range(len(photos)))
    return round(100 * (targets.output.argmax(dim=1) == labels).double().mean().item(), 2)


def _cached(pipeline: Pipeline, photos: list[Photo], folder: Path, starts: tuple[int, ...]) -> TargetCache:
    backbone = pipeline.model.backbone
    return collect(
        photos,
        lambda images: compute_targets(backbone, images.to(backbone.device), starts),
        pipeline.preprocess,
        folder,
        depends_on={
            "backbone": signature(backbone),
            "preprocess": pipeline.preprocess.to_dict(),
            "starts": starts,
        },
    )
