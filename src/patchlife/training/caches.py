"""What a fit computes with the dense model before training, in caches on disk, and at each step of stage 2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from ..backbones import signature
from ..config import TrainingConfig
from ..data import Preprocess
from ..slimming import SlimModel
from ..slimming.scorers import QUERIES
from .collection import Photo
from .dense import DenseTarget
from .dense_targets import compute_dense_targets
from .photo_cache import collect_photos
from .run_settings import distils_features
from .target_cache import TargetCache, collect
from .targets import Targets, compute_targets, target_starts
from .view_targets import ViewTargets

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["CALIBRATION_PHOTOS", "collect_targets", "collect_views"]

CALIBRATION_PHOTOS = 256
"""The first photos, whose scores give the thresholds of adaptive mode."""

_HELD_OUT = 64  # photos for the report; a twentieth of the photos if that is less


def collect_targets(
    model: SlimModel,
    photos: list[Photo],
    preprocess: Preprocess,
    folder: Path,
    config: TrainingConfig,
    accelerator: Accelerator,
    dense: DenseTarget | None,
) -> tuple[TargetCache, TargetCache]:
    """(targets to train and calibrate on, those of photos that are held out for the report).

    They are of all photos, or if no stage trains on cached targets, of as few as calibration and report need; then they
    have a folder of their own, because another fit may use those of all photos. The first process of each machine
    computes them, the others read its files.
    """
    distils = config.finetune != "none" and not config.fresh_views  # otherwise stage 2 computes its own targets
    trains = config.epochs or distils
    some = photos if trains else photos[: CALIBRATION_PHOTOS + _HELD_OUT]
    whole = config.cache or folder / "cache"
    backbone = model.backbone.to(accelerator.device).eval()
    starts = target_starts(model)
    start = starts[0] if len(starts) == 1 else list(starts)
    depends_on = {"backbone": signature(backbone), "start": start, "preprocess": preprocess.to_dict()}
    if not backbone.reads_class:  # its targets have been estimated from some of the queries since format 4
        depends_on["queries"] = QUERIES
    patches, image_tokens = distils and _distils_patches(model, config), distils and config.token_weight > 0
    depends_on |= dense.settings() if dense else {"patches": True} if patches else {}
    depends_on |= {"image_tokens": True} if image_tokens else {}
    targets_of = _dense_model(model, accelerator, dense, patches, image_tokens)
    with _gathering("collect", len(some), accelerator) as report:
        cache = collect(
            some,
            targets_of,
            preprocess,
            whole if trains else whole.with_name(f"{whole.name}-some"),
            depends_on=depends_on,
            limit_bytes=config.cache_gb * 1e9,
            max_unreadable=config.max_unreadable,
            report=report,
        )
    return cache.split(min(_HELD_OUT, len(cache if trains else photos) // 20, len(cache) // 2))


def collect_views(
    model: SlimModel,
    photos: list[Photo],
    held_out: TargetCache,
    preprocess: Preprocess,
    folder: Path,
    config: TrainingConfig,
    accelerator: Accelerator,
    dense: DenseTarget | None,
) -> ViewTargets:
    """The photos of stage 2 with fresh views: all but the held-out ones.

    Mixtures of two photos have no label, so there are none if labels are in the loss.
    The first process of each machine decodes the photos, the others read its files.
    """
    cache = config.cache or folder / "cache"
    with _gathering("decode", len(photos), accelerator) as report:
        pixels = collect_photos(
            photos,
            preprocess,
            cache.with_name(f"{cache.name}-photos"),
            limit_bytes=config.cache_gb * 1e9,
            max_unreadable=config.max_unreadable,
            report=report,
        )
    targets_of = _dense_model(model, accelerator, dense, _distils_patches(model, config), config.token_weight > 0)
    mixed = config.label_weight == 0
    return ViewTargets(pixels.without(held_out.photos), targets_of, preprocess, accelerator.device, mixed)


def _distils_patches(model: SlimModel, config: TrainingConfig) -> bool:
    return distils_features(model, config) and config.patch_weight > 0 and model.backbone.pools


def _dense_model(
    model: SlimModel, accelerator: Accelerator, dense: DenseTarget | None, patches: bool, image_tokens: bool
) -> Callable[[torch.Tensor], Targets]:
    """From images to their targets, on the device of the accelerator."""
    backbone = model.backbone.to(accelerator.device).eval()
    if dense and dense.head is not None:
        dense.head.to(accelerator.device)

    def targets_of(images: torch.Tensor) -> Targets:
        images = images.to(accelerator.device)
        if dense is not None:
            return compute_dense_targets(backbone, images, dense)
        return compute_targets(backbone, images, target_starts(model), patches, image_tokens)

    return targets_of


@contextmanager
def _gathering(name: str, photos: int, accelerator: Accelerator) -> Iterator[Callable[[int, int], None]]:
    """The first process of each machine goes first, and shows its progress: a function of (done, total)."""
    with accelerator.local_main_process_first():
        quiet = not accelerator.is_local_main_process
        with tqdm(total=photos, desc=name, unit="photo", disable=quiet) as bar:

            def report(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield report
