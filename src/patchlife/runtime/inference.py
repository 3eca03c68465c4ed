"""Running a pipeline on many photos: one result per photo, in order. Failed photos do not stop the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..data import evenly_spaced, load_batches
from ..errors import NumericalError
from ..slimming import Lives
from .pipeline import Pipeline

__all__ = ["CALIBRATION_PHOTOS", "Embedding", "Failure", "Prediction", "calibrate", "embed_photos", "predict_photos"]

R = TypeVar("R")

CALIBRATION_PHOTOS = 256
_CALIBRATION_BATCH = 16  # a constant, because thresholds must not depend on the batch size of the run


@dataclass(frozen=True)
class Prediction:
    """The result for one photo.

    Attributes:
        path: the photo.
        probabilities: of the classes; of a multi-label model each in [0, 1] by itself, else their sum is 1.
        lives: of the patches, as a batch of one.
        flops: FLOPs spent on this photo.
    """

    path: Path
    probabilities: Float[Tensor, "classes"]
    lives: Lives
    flops: int


@dataclass(frozen=True)
class Embedding:
    """The embedding of one photo.

    Attributes:
        path: the photo.
        vector: in float32.
        flops: FLOPs spent on this photo.
    """

    path: Path
    vector: Float[Tensor, "width"]
    flops: int


@dataclass(frozen=True)
class Failure:
    """The error for a photo without a result.

    Attributes:
        path: the photo.
        error: a message that names the photo and the reason.
    """

    path: Path
    error: str


def predict_photos(
    pipeline: Pipeline, photos: Sequence[Path], batch_size: int = 16, workers: int | None = None
) -> Iterator[Prediction | Failure]:
    """Run ``pipeline`` on photos. Yields one result per photo, in their order, after each batch.

    A photo that cannot be read, or whose logits are not finite, gives a `Failure` and does not affect the others. If a
    whole batch fails (for example out of memory), it is halved again and again, down to single photos.
    """
    return _run_on_photos(_predictions, pipeline, photos, batch_size, workers)


def embed_photos(
    pipeline: Pipeline, photos: Sequence[Path], batch_size: int = 16, workers: int | None = None
) -> Iterator[Embedding | Failure]:
    """Compute the embeddings of photos; as `predict_photos` otherwise."""
    return _run_on_photos(_embeddings, pipeline, photos, batch_size, workers)


def calibrate(pipeline: Pipeline, photos: Sequence[Path], workers: int | None = None) -> int:
    """Calibrate adaptive mode on up to 256 of the photos, evenly spaced. Returns the number of photos used.

    Photos that cannot be read are skipped. If no photo can be read, the model is not changed.
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
    # the evenly spaced photos first; the others replace those that cannot be read
    candidates = dict.fromkeys([*evenly_spaced(photos, CALIBRATION_PHOTOS), *photos])
    missing = CALIBRATION_PHOTOS
    for batch in load_batches(candidates, pipeline.preprocess, _CALIBRATION_BATCH, workers):
        images = batch.images[:missing]
        missing -= len(images)
        if len(images):
            yield images.to(pipeline.device, pipeline.dtype)
        if not missing:
            return


RunBatch = Callable[[Pipeline, Sequence[Path], Tensor], list[R | Failure]]
"""From a batch of images and their paths to one result per image."""


def _run_on_photos(
    run: RunBatch[R], pipeline: Pipeline, photos: Sequence[Path], batch_size: int, workers: int | None
) -> Iterator[R | Failure]:
    for batch in load_batches(photos, pipeline.preprocess, batch_size, workers):
        images_results = _results(run, pipeline, [photos[index] for index in batch.indices], batch.images)
        results: dict[int, R | Failure] = dict(zip(batch.indices, images_results, strict=True))
        results |= {index: Failure(photos[index], str(error)) for index, error in batch.failures}
        yield from (results[index] for index in sorted(results))


def _results(run: RunBatch[R], pipeline: Pipeline, paths: Sequence[Path], images: Tensor) -> list[R | Failure]:
    """One result per image. A batch that fails is halved until only single images fail."""
    if not len(images):
        return []
    try:
        return run(pipeline, paths, images)
    except (RuntimeError, MemoryError, NumericalError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
    if len(images) == 1:
        return [Failure(paths[0], f"{paths[0]}: the model fails on it: {reason}")]
    half = len(images) // 2  # outside of the except block, where the tensors of the failed run are freed
    return _results(run, pipeline, paths[:half], images[:half]) + _results(run, pipeline, paths[half:], images[half:])


@torch.inference_mode()
def _predictions(pipeline: Pipeline, paths: Sequence[Path], images: Tensor) -> list[Prediction | Failure]:
    logits, on_device = pipeline.model.predict(images.to(pipeline.device, pipeline.dtype))
    logits, lives = logits.float(), _on_cpu(on_device)
    probabilities = (logits.sigmoid() if pipeline.multi_label else logits.softmax(dim=-1)).cpu()
    flops = pipeline.model.flops_of(lives, (images.shape[-2], images.shape[-1]))
    return [
        Prediction(path, probabilities[i], lives[i], flops[i])
        if probabilities[i].isfinite().all()
        else Failure(path, f"{path}: the model's probabilities are NaN or infinite; check the weights and the photo")
        for i, path in enumerate(paths)
    ]


@torch.inference_mode()
def _embeddings(pipeline: Pipeline, paths: Sequence[Path], images: Tensor) -> list[Embedding | Failure]:
    vectors, lives = pipeline.model.embedding(images.to(pipeline.device, pipeline.dtype))
    vectors = vectors.float().cpu()
    flops = pipeline.model.flops_of(_on_cpu(lives), (images.shape[-2], images.shape[-1]))
    return [
        Embedding(path, vectors[i], flops[i])
        if vectors[i].isfinite().all()
        else Failure(path, f"{path}: the model's embedding is NaN or infinite; check the weights and the photo")
        for i, path in enumerate(paths)
    ]


def _on_cpu(lives: Lives) -> Lives:
    return Lives(lives.life.cpu(), lives.kept.cpu(), lives.score.cpu(), lives.grid)
