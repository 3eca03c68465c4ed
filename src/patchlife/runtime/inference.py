"""A pipeline model on many photos: an answer or an error for each, in order, whatever happens to the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ..data import evenly_spaced, load_batches
from ..errors import NumericalError
from ..slimming import Lives
from .pipeline import Pipeline

__all__ = ["CALIBRATION_PHOTOS", "Answer", "answers", "calibrate"]

CALIBRATION_PHOTOS = 256
_CALIBRATION_BATCH = 16  # of its own: thresholds must not depend on the batch size of the run that follows


@dataclass(frozen=True)
class Answer:
    """What a model says about one photo.

    Attributes:
        path: the photo.
        probabilities: of the classes.
        lives: of the patches, a batch of one.
        flops: spent on this photo.
    """

    path: Path
    probabilities: Float[Tensor, "classes"]
    lives: Lives
    flops: int


@dataclass(frozen=True)
class Failure:
    """Why there is no answer for one photo.

    Attributes:
        path: the photo.
        error: what is wrong with it, for people.
    """

    path: Path
    error: str


def answers(
    pipeline: Pipeline, photos: Sequence[Path], batch_size: int = 16, workers: int | None = None
) -> Iterator[Answer | Failure]:
    """Run ``pipeline`` on photos; yields one result for each, in their order, as its batch is done.

    A photo fails alone: when it cannot be read, or when its logits are not finite. Where a whole batch fails
    (out of memory, say), its halves are tried, and theirs: at worst photo by photo.
    """
    for batch in load_batches(photos, pipeline.preprocess, batch_size, workers):
        good = _answered(pipeline, [photos[index] for index in batch.indices], batch.images)
        results = dict(zip(batch.indices, good, strict=True))
        results |= {index: Failure(photos[index], str(error)) for index, error in batch.failures}
        yield from (results[index] for index in sorted(results))


def calibrate(pipeline: Pipeline, photos: Sequence[Path], workers: int | None = None) -> int:
    """Set adaptive mode's thresholds by up to 256 of the photos, spread over all; returns how many were used.

    Photos that cannot be read are passed over; if there are no others, nothing is set.
    """
    batches = _calibration_batches(pipeline, photos, workers)
    first = next(batches, None)
    if first is None:
        return 0
    pipeline.model.calibrate(chain([first], batches))
    assert pipeline.model.calibration is not None
    return pipeline.model.calibration.images


def _calibration_batches(
    pipeline: Pipeline, photos: Sequence[Path], workers: int | None
) -> Iterator[Float[Tensor, "batch channels height width"]]:
    # all others stand in for those that cannot be read
    others = dict.fromkeys([*evenly_spaced(photos, CALIBRATION_PHOTOS), *photos])
    wanted = CALIBRATION_PHOTOS
    for batch in load_batches(others, pipeline.preprocess, _CALIBRATION_BATCH, workers):
        images = batch.images[:wanted]
        wanted -= len(images)
        if len(images):
            yield images.to(pipeline.device)
        if not wanted:
            return


def _answered(pipeline: Pipeline, paths: Sequence[Path], images: Tensor) -> list[Answer | Failure]:
    """One result for each image; a batch that fails is halved until only those fail that must."""
    if not len(images):
        return []
    try:
        return _run(pipeline, paths, images)
    except (RuntimeError, MemoryError, NumericalError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
    if len(images) == 1:
        return [Failure(paths[0], f"{paths[0]}: the model fails on it: {reason}")]
    half = len(images) // 2  # out here, where the failed run's tensors are gone
    return _answered(pipeline, paths[:half], images[:half]) + _answered(pipeline, paths[half:], images[half:])


@torch.inference_mode()
def _run(pipeline: Pipeline, paths: Sequence[Path], images: Tensor) -> list[Answer | Failure]:
    logits, on_device = pipeline.model.predict(images.to(pipeline.device))
    lives = Lives(on_device.life.cpu(), on_device.kept.cpu(), on_device.score.cpu(), on_device.grid)
    probabilities = logits.float().softmax(dim=-1).cpu()
    size = (images.shape[-2], images.shape[-1])
    spent = pipeline.model.flops_of(lives, size)
    return [
        Answer(path, probabilities[i], lives[i], spent[i])
        if probabilities[i].isfinite().all()
        else Failure(path, f"{path}: the model's answer is NaN or infinite; check the weights and the photo")
        for i, path in enumerate(paths)
    ]
