"""Read photos in batches: a few threads decode ahead, and the order of the photos is kept."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from ..errors import ConfigError, ImageError
from .preprocess import Preprocess
from .reading import AnyPhoto, read_photo

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float
    from PIL.Image import Image
    from torch import Tensor

__all__ = ["Batch", "load_batches", "load_mixed_batches", "load_pixels"]

Images = TypeVar("Images")
Shown = TypeVar("Shown")  # what a thread makes of a decoded photo


class Batch(NamedTuple, Generic[Images]):
    """A batch of consecutive photos.

    Attributes:
        indices: positions in the list of paths of the photos in ``images``, ascending.
        images: one for each index, (good, channels, height, width), or a list of images; empty if no photo of the
            batch could be read.
        failures: (index, error) of each photo that could not be read, ascending.
    """

    indices: list[int]
    images: Images
    failures: list[tuple[int, ImageError]]


def load_batches(
    paths: Iterable[AnyPhoto],
    preprocess: Preprocess,
    batch_size: int,
    workers: int | None = None,
) -> Generator[Batch[Tensor], None, None]:
    """Read and preprocess photos in order, ``batch_size`` paths at a time (the last batch may be smaller).

    Threads decode at most two batches ahead, so memory is bounded. Every path appears exactly once, among the images
    or among the failures of its batch.

    Args:
        paths: the photos. May be a lazy iterable: at most two batches are taken ahead.
        preprocess: turns a photo into the model's input; for images of one size (without ``keep_aspect``).
        batch_size: paths per batch.
        workers: decoding threads; by default one per core, at most 8.

    Raises:
        ConfigError: ``batch_size`` or ``workers`` is below 1.
    """
    return _checked(iter(paths), preprocess.shown, batch_size, workers, preprocess.normalise)


def load_mixed_batches(
    paths: Iterable[AnyPhoto],
    preprocess: Preprocess,
    batch_size: int,
    workers: int | None = None,
) -> Generator[Batch[list[Float[Tensor, "channels height width"]]], None, None]:
    """`load_batches` for images that may have different sizes: the images of a batch are a list."""

    def separate(shown: Sequence[Image]) -> list[Tensor]:
        return [preprocess.normalise([picture])[0] for picture in shown]

    return _checked(iter(paths), preprocess.shown, batch_size, workers, separate)


def load_pixels(
    paths: Iterable[AnyPhoto], preprocess: Preprocess, batch_size: int, workers: int | None = None
) -> Generator[Batch[Sequence[np.ndarray]], None, None]:
    """`load_batches` for pixels before normalisation.

    The images of a batch are two arrays: the pixels, uint8 (good, channels, height, width), and the aspect ratio of
    each photo, its width divided by its height, float32 (good,).
    """
    import numpy as np

    def shown(photo: Image) -> tuple[Image, float]:
        return preprocess.shown(photo), photo.width / photo.height

    def arrays(pictures: Sequence[tuple[Image, float]]) -> Sequence[np.ndarray]:
        if not pictures:
            return [np.empty((0, preprocess.channels, *preprocess.size), np.uint8), np.empty(0, np.float32)]
        pixels = np.stack([np.asarray(picture) for picture, _ in pictures])[..., : preprocess.channels]
        return [pixels.transpose(0, 3, 1, 2), np.array([aspect for _, aspect in pictures], np.float32)]

    return _checked(iter(paths), shown, batch_size, workers, arrays)


def _checked(
    paths: Iterator[AnyPhoto],
    shown: Callable[[Image], Shown],
    batch_size: int,
    workers: int | None,
    gathered: Callable[[Sequence[Shown]], Images],
) -> Generator[Batch[Images], None, None]:
    workers = min(os.cpu_count() or 1, 8) if workers is None else workers
    if batch_size < 1 or workers < 1:
        raise ConfigError(f"batch_size and workers must be at least 1, got {batch_size} and {workers}")
    return _batches(paths, shown, batch_size, workers, gathered)


def _batches(
    paths: Iterator[AnyPhoto],
    shown: Callable[[Image], Shown],
    batch_size: int,
    workers: int,
    gathered: Callable[[Sequence[Shown]], Images],
) -> Generator[Batch[Images], None, None]:
    def read(path: AnyPhoto) -> Shown:
        # Threads return 8-bit pictures; the caller's thread normalises a whole batch at once. Torch operations in
        # these threads would start one OpenMP thread pool per thread.
        return shown(read_photo(path))

    ahead: deque[Future[Shown]] = deque()
    start = 0
    pool = ThreadPoolExecutor(workers, thread_name_prefix="patchlife-photos")
    try:
        while True:
            ahead.extend(pool.submit(read, path) for path in islice(paths, 2 * batch_size - len(ahead)))
            if not ahead:
                return
            count = min(batch_size, len(ahead))
            yield _gather(start, [ahead.popleft() for _ in range(count)], gathered)
            start += count
    finally:  # also when the caller stops early: cancel photos that are no longer needed
        pool.shutdown(cancel_futures=True)


def _gather(start: int, photos: list[Future[Shown]], gathered: Callable[[Sequence[Shown]], Images]) -> Batch[Images]:
    """Wait for the photos of a batch; collect images and failures."""
    indices, shown, failures = [], [], []
    for index, photo in enumerate(photos, start):
        try:
            shown.append(photo.result())
            indices.append(index)
        except ImageError as error:
            # A new error: the traceback of the raised one would keep the whole file in memory.
            failures.append((index, ImageError(str(error))))
    return Batch(indices, gathered(shown), failures)
