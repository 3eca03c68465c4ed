"""Running a pipeline on many photos: one result per photo, in order. Failed photos do not stop the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..data import Batch, evenly_spaced, load_batches, load_mixed_batches
from ..data.labels import Labels
from ..data.reading import AnyPhoto
from ..errors import ConfigError, NumericalError
from ..slimming import Lives, SlimModel
from .pipeline import Pipeline

__all__ = [
    "CALIBRATION_PHOTOS",
    "Embedding",
    "Failure",
    "Prediction",
    "calibrate",
    "embed_images",
    "embed_photos",
    "predict_images",
    "predict_photos",
]

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
        dense_flops: FLOPs that the dense model spends on a photo of this size.
    """

    path: Any
    probabilities: Float[Tensor, "classes"]
    lives: Lives
    flops: int
    dense_flops: float

    def top(self, labels: Labels, count: int) -> list[dict[str, Any]]:
        """The ``count`` most probable classes, the most probable first, as the records of photos have them."""
        best = self.probabilities.topk(min(count, len(labels.names)))
        ranked = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [{"class": c, "label": labels.names[c], "probability": round(p, 6)} for c, p in ranked]


@dataclass(frozen=True)
class Embedding:
    """The embedding of one photo.

    Attributes:
        path: the photo.
        vector: in float32.
        flops: FLOPs spent on this photo.
        dense_flops: FLOPs that the dense model spends on a photo of this size.
    """

    path: Any
    vector: Float[Tensor, "width"]
    flops: int
    dense_flops: float


@dataclass(frozen=True)
class Failure:
    """The error for a photo without a result.

    Attributes:
        path: the photo.
        error: a message that names the photo and the reason.
    """

    path: Any
    error: str


def predict_photos(
    pipeline: Pipeline, photos: Sequence[AnyPhoto], batch_size: int = 16, workers: int | None = None
) -> Iterator[Prediction | Failure]:
    """Run ``pipeline`` on photos. Yields one result per photo, in their order, after each batch.

    A photo that cannot be read, or whose logits are not finite, gives a `Failure` and does not affect the others. If a
    whole batch fails (for example out of memory), it is halved again and again, down to single photos.

    Photos that keep their own shape (``keep_aspect`` of the pipeline's preprocessing) run as images of different sizes.
    """
    return _run_on_photos(_predictions, pipeline, photos, batch_size, workers)


def embed_photos(
    pipeline: Pipeline, photos: Sequence[AnyPhoto], batch_size: int = 16, workers: int | None = None
) -> Iterator[Embedding | Failure]:
    """Compute the embeddings of photos; as `predict_photos` otherwise."""
    return _run_on_photos(_embeddings, pipeline, photos, batch_size, workers)


def predict_images(pipeline: Pipeline, images: Images, names: Sequence[Path]) -> list[Prediction | Failure]:
    """Run ``pipeline`` on one batch of preprocessed images; as `predict_photos` otherwise. ``names`` are for errors."""
    return _results(_predictions, pipeline, names, images)


def embed_images(pipeline: Pipeline, images: Images, names: Sequence[Path]) -> list[Embedding | Failure]:
    """The embeddings of one batch of preprocessed images; as `predict_images` otherwise."""
    return _results(_embeddings, pipeline, names, images)


def calibrate(pipeline: Pipeline, photos: Sequence[AnyPhoto], workers: int | None = None) -> int:
    """Calibrate adaptive mode on up to 256 of the photos, evenly spaced. Returns the number of photos used.

    Photos that cannot be read are skipped. If no photo can be read, the model is not changed.
    """
    batches = _calibration_batches(pipeline, photos, workers)
    first = next(batches, None)
    if first is None:
        return 0
    used = 0

    def counted() -> Iterator[Images]:
        nonlocal used
        for images in chain([first], batches):
            used += len(images)
            yield images

    pipeline.model.calibrate(counted())
    return used


def _calibration_batches(pipeline: Pipeline, photos: Sequence[AnyPhoto], workers: int | None) -> Iterator[Images]:
    # the evenly spaced photos first; the others replace those that cannot be read
    candidates = dict.fromkeys([*evenly_spaced(photos, CALIBRATION_PHOTOS), *photos])
    missing = CALIBRATION_PHOTOS
    for batch in _load(candidates, pipeline, _CALIBRATION_BATCH, workers):
        images = batch.images[:missing]
        missing -= len(images)
        if len(images):
            yield _moved(images, pipeline)
        if not missing:
            return


Images = Float[Tensor, "batch channels height width"] | list[Float[Tensor, "channels height width"]]
"""A batch of one size, or a list of images of different sizes."""

RunBatch = Callable[[Pipeline, Sequence[AnyPhoto], Images], list[R | Failure]]
"""From a batch of images and their paths to one result per image."""


def _load(
    photos: Iterable[AnyPhoto], pipeline: Pipeline, batch_size: int, workers: int | None
) -> Iterator[Batch[Tensor]] | Iterator[Batch[list[Tensor]]]:
    """Batches of images; lists of images if photos keep their own shape."""
    load = load_mixed_batches if pipeline.preprocess.keep_aspect else load_batches
    return load(photos, pipeline.preprocess, batch_size, workers)


def _moved(images: Images, pipeline: Pipeline) -> Images:
    """The images on the model's device, in its number format."""
    to = pipeline.device, pipeline.dtype
    return images.to(*to) if isinstance(images, Tensor) else [image.to(*to) for image in images]


def _run_on_photos(
    run: RunBatch[R], pipeline: Pipeline, photos: Sequence[AnyPhoto], batch_size: int, workers: int | None
) -> Iterator[R | Failure]:
    for batch in _load(photos, pipeline, batch_size, workers):
        images_results = _results(run, pipeline, [photos[index] for index in batch.indices], batch.images)
        results: dict[int, R | Failure] = dict(zip(batch.indices, images_results, strict=True))
        results |= {index: Failure(photos[index], str(error)) for index, error in batch.failures}
        yield from (results[index] for index in sorted(results))


def _results(run: RunBatch[R], pipeline: Pipeline, paths: Sequence[AnyPhoto], images: Images) -> list[R | Failure]:
    """One result per image. A batch that fails is halved until only single images fail."""
    if not len(images):
        return []
    errors: tuple[type[Exception], ...] = (RuntimeError, MemoryError, NumericalError)
    if isinstance(images, list):  # of different shapes, of which the model may not take one
        errors = (*errors, ConfigError)
    try:
        return run(pipeline, paths, images)
    except errors as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
    if len(images) == 1:
        return [Failure(paths[0], f"{paths[0]}: the model fails on it: {reason}")]
    half = len(images) // 2  # outside of the except block, where the tensors of the failed run are freed
    return _results(run, pipeline, paths[:half], images[:half]) + _results(run, pipeline, paths[half:], images[half:])


@torch.inference_mode()
def _predictions(pipeline: Pipeline, paths: Sequence[AnyPhoto], images: Images) -> list[Prediction | Failure]:
    logits, on_device = pipeline.model.predict(_moved(images, pipeline))
    logits, lives = logits.float(), _each_on_cpu(on_device)
    probabilities = pipeline.probabilities(logits).cpu()
    flops = _flops(pipeline, images, lives)
    return [
        Prediction(path, probabilities[i], lives[i], *flops[i])
        if probabilities[i].isfinite().all()
        else Failure(path, f"{path}: the model's probabilities are NaN or infinite; check the weights and the photo")
        for i, path in enumerate(paths)
    ]


@torch.inference_mode()
def _embeddings(pipeline: Pipeline, paths: Sequence[AnyPhoto], images: Images) -> list[Embedding | Failure]:
    vectors, lives = pipeline.model.embedding(_moved(images, pipeline))
    vectors = vectors.float().cpu()
    flops = _flops(pipeline, images, _each_on_cpu(lives))
    return [
        Embedding(path, vectors[i], *flops[i])
        if vectors[i].isfinite().all()
        else Failure(path, f"{path}: the model's embedding is NaN or infinite; check the weights and the photo")
        for i, path in enumerate(paths)
    ]


def _flops(pipeline: Pipeline, images: Images, lives: Sequence[Lives]) -> list[tuple[int, float]]:
    """(FLOPs spent, FLOPs of the dense model at this size) of each image."""
    model, found = pipeline.model, []
    for image, own in zip(images, lives, strict=True):
        size = (image.shape[-2], image.shape[-1])
        dense = model.cost(size).dense if isinstance(model, SlimModel) else model.dense_flops
        found.append((model.flops_of(own, size)[0], dense))
    return found


def _each_on_cpu(lives: Lives | list[Lives]) -> list[Lives]:
    """The lives of each image, as batches of one."""
    if isinstance(lives, Lives):
        moved = _on_cpu(lives)
        return [moved[image] for image in range(len(moved))]
    return [_on_cpu(own) for own in lives]


def _on_cpu(lives: Lives) -> Lives:
    return Lives(lives.life.cpu(), lives.kept.cpu(), lives.score.cpu(), lives.grid)
