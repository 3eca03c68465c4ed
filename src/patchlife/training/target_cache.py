"""A cache of training targets on disk: the dense model runs only once on each photo (`collection.py` has the files)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import Batch, Preprocess, Sample, load_batches
from ..errors import NumericalError, shortened
from .collection import Contents, Photo, Rows, checksum, content_of, gather
from .targets import Targets

__all__ = ["Photo", "TargetCache", "checksum", "collect", "content_of"]

_FLOAT16_MAX = float(np.finfo(np.float16).max)


class TargetCache(Rows):
    """The targets of many photos, one row for each, in half precision.

    Attributes:
        photos: the photo of each row.
        skipped: path, error and index (among the requested photos) of each photo that could not be read.
        content: a short checksum of the photos' content (not their paths) and of the model's settings and weights.
        image_size: size (height, width) of the images that the targets are of; None for the model's own size.
    """

    def __init__(
        self,
        photos: Sequence[Photo],
        skipped: list[dict[str, Any]],
        arrays: Sequence[np.ndarray],
        at: Sequence[int] | None = None,
        content: str = "",
        image_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(photos, skipped, arrays, at, content)
        self.image_size = image_size

    def split(self, last: int) -> tuple[TargetCache, TargetCache]:
        """(all photos but the last ones, the ``last`` photos): to train on, and held out."""
        first = len(self) - last
        rest = self.content, self.image_size
        return (
            TargetCache(self.photos[:first], self.skipped, self._arrays, self._at[:first].tolist(), *rest),
            TargetCache(self.photos[first:], [], self._arrays, self._at[first:].tolist(), *rest),
        )

    def targets(self, rows: Sequence[int]) -> Targets:
        """The targets of these rows, as float32 tensors."""
        return Targets(*(torch.from_numpy(self._values(a, rows).astype(np.float32)) for a in self._arrays))

    def step_targets(self, rows: Sequence[int], part: slice, generator: torch.Generator) -> Targets:
        """The targets of a ``part`` of the ``rows`` of a step; nothing is drawn from ``generator``."""
        return self.targets(rows[part])


def collect(
    photos: Sequence[Photo],
    targets_of: Callable[[Tensor], Targets],
    preprocess: Preprocess,
    folder: Path,
    *,
    depends_on: dict[str, Any],
    batch_size: int = 32,
    limit_bytes: float = float("inf"),
    max_unreadable: float = 0.01,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> TargetCache:
    """The targets of ``photos``; they are computed, and written to ``folder``, unless they are there already.

    Args:
        photos: see `gather`.
        targets_of: computes the targets of a batch of images.
        preprocess: from a photo to an image.
        folder: see `gather`.
        depends_on: all else that the targets depend on (weights, start block), as JSON values.
        batch_size: photos in a call of ``targets_of``.
        limit_bytes: see `gather`. max_unreadable: see `gather`. report: see `gather`.

    Raises:
        ImageError: too many photos cannot be read.
        NumericalError: the targets of a photo are not finite.
        ConfigError: not a single photo fits in ``limit_bytes``.
    """

    def example() -> list[np.ndarray]:
        return _halves(targets_of(torch.zeros(1, preprocess.channels, *preprocess.size)))

    def batches(paths: list[Path | Sample]) -> Iterator[Batch[Sequence[np.ndarray]]]:
        for batch in load_batches(paths, preprocess, batch_size):
            values: list[np.ndarray] = []
            if batch.indices:
                targets = targets_of(batch.images)
                _check_finite(targets, [paths[index] for index in batch.indices])
                values = _halves(targets)
            yield Batch(batch.indices, values, batch.failures)

    collected = gather(
        photos,
        Contents("features", Targets._fields, example, batches),
        folder,
        depends_on=depends_on,
        limit_bytes=limit_bytes,
        max_unreadable=max_unreadable,
        report=report,
    )
    return TargetCache(*collected, preprocess.size)


def _halves(targets: Targets) -> list[np.ndarray]:
    """The targets in half precision; larger values become the largest one."""
    return [values.float().clamp(-_FLOAT16_MAX, _FLOAT16_MAX).half().cpu().numpy() for values in targets]


def _check_finite(targets: Targets, paths: Sequence[Path | Sample]) -> None:
    finite = torch.stack([values.flatten(1).isfinite().all(dim=1) for values in targets]).all(dim=0)
    bad = [str(path) for path, good in zip(paths, finite.tolist(), strict=True) if not good]
    if bad:
        raise NumericalError(f"the dense model gives NaN or infinity for {shortened(bad)}; check its weights")
