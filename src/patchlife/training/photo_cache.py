"""A cache of the pixels of photos on disk: each photo is decoded only once (`collection.py` has the files)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..data import Batch, Preprocess, Sample, load_pixels
from .collection import Contents, Photo, Rows, gather

__all__ = ["PhotoCache", "collect_photos", "stored_size"]

_ARRAYS = ("pixels", "aspect")


class PhotoCache(Rows):
    """The pixels of many photos, one row for each.

    A photo is stored whole, squashed to one size, with its aspect ratio.

    Attributes: see `Rows`.
    """

    def pixels(self, rows: Sequence[int]) -> UInt8[Tensor, "rows channels height width"]:
        """The pixels of these rows, in [0, 255]."""
        return torch.from_numpy(self._values(self._arrays[0], rows))

    def aspects(self, rows: Sequence[int]) -> Float[Tensor, "rows"]:
        """Width divided by height of the photos of these rows."""
        return torch.from_numpy(self._values(self._arrays[1], rows))

    def without(self, photos: Sequence[Photo]) -> PhotoCache:
        """The same rows but those of ``photos``."""
        left_out = {photo.path for photo in photos}
        kept = [row for row, photo in enumerate(self.photos) if photo.path not in left_out]
        return PhotoCache(
            [self.photos[row] for row in kept], self.skipped, self._arrays, self._at[kept].tolist(), self.content
        )


def collect_photos(
    photos: Sequence[Photo],
    preprocess: Preprocess,
    folder: Path,
    *,
    batch_size: int = 32,
    limit_bytes: float = float("inf"),
    max_unreadable: float = 0.01,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> PhotoCache:
    """The pixels of ``photos``; they are decoded, and written to ``folder``, unless they are there already.

    Args:
        photos: see `gather`.
        preprocess: gives the size of the model's input, of which `stored_size` follows, its channels and the filter.
        folder: see `gather`.
        batch_size: photos between two updates of the files.
        limit_bytes: see `gather`. max_unreadable: see `gather`. report: see `gather`.

    Raises:
        ImageError: too many photos cannot be read.
        ConfigError: not a single photo fits in ``limit_bytes``.
    """
    size = stored_size(preprocess.size)
    whole = replace(preprocess, size=size, crop_fraction=1.0, crop_mode="squash", keep_aspect=None)

    def example() -> list[np.ndarray]:
        return [np.zeros((1, preprocess.channels, *size), np.uint8), np.zeros(1, np.float32)]

    def batches(paths: list[Path | Sample]) -> Iterator[Batch[Sequence[np.ndarray]]]:
        return load_pixels(paths, whole, batch_size)

    depends_on: dict[str, Any] = {
        "pixels": list(size),
        "channels": preprocess.channels,
        "interpolation": preprocess.interpolation,
    }
    return PhotoCache(
        *gather(
            photos,
            Contents("pixels", _ARRAYS, example, batches),
            folder,
            depends_on=depends_on,
            limit_bytes=limit_bytes,
            max_unreadable=max_unreadable,
            report=report,
        )
    )


def stored_size(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a stored photo, in pixels: 9/7 of those of the model's input, in multiples of 8."""
    height, width = (8 * -(-9 * side // 56) for side in size)
    return height, width
