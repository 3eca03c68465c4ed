"""Photos in batches: decoded by a few threads ahead of use, in order, none lost."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from ..errors import ConfigError, ImageError
from .preprocess import Preprocess
from .reading import AnyPhoto, read_photo

if TYPE_CHECKING:
    from jaxtyping import Float
    from PIL.Image import Image
    from torch import Tensor

__all__ = ["Batch", "load_batches"]


class Batch(NamedTuple):
    """Consecutive photos: those that could be read, and those that could not.

    Attributes:
        indices: which of the paths ``images`` holds, ascending.
        images: one for each index; an empty tensor if every photo of the batch failed.
        failures: (index, error) for each of the others, ascending.
    """

    indices: list[int]
    images: Float[Tensor, "good channels height width"]
    failures: list[tuple[int, ImageError]]


def load_batches(
    paths: Iterable[AnyPhoto],
    preprocess: Preprocess,
    batch_size: int,
    workers: int | None = None,
) -> Generator[Batch, None, None]:
    """Read photos in order, ``batch_size`` paths at a time (the last batch may be smaller).

    Threads decode ahead, but never more than two batches: memory is bounded however many paths there are.
    A photo that cannot be read appears among its batch's failures; every path appears exactly once.

    Args:
        paths: the photos. May be lazy: it is not read further ahead than the threads are.
        preprocess: what to do with each photo.
        batch_size: paths in a batch.
        workers: decoding threads; by default one per core, at most 8.
    """
    workers = min(os.cpu_count() or 1, 8) if workers is None else workers
    if batch_size < 1 or workers < 1:
        raise ConfigError(f"batch_size and workers must be at least 1, got {batch_size} and {workers}")
    return _batches(iter(paths), preprocess, batch_size, workers)


def _batches(
    paths: Iterator[AnyPhoto], preprocess: Preprocess, batch_size: int, workers: int
) -> Generator[Batch, None, None]:
    def read(path: AnyPhoto) -> Image:
        # Threads hand over 8-bit pictures; a whole batch is normalised at once by the caller's thread. Torch
        # work in here would start an OpenMP team per thread.
        return preprocess.shown(read_photo(path))

    ahead: deque[Future[Image]] = deque()
    start = 0
    pool = ThreadPoolExecutor(workers, thread_name_prefix="patchlife-photos")
    try:
        while True:
            ahead.extend(pool.submit(read, path) for path in islice(paths, 2 * batch_size - len(ahead)))
            if not ahead:
                return
            count = min(batch_size, len(ahead))
            yield _gather(start, [ahead.popleft() for _ in range(count)], preprocess)
            start += count
    finally:  # also when the caller stops early: do not decode what nobody will see
        pool.shutdown(cancel_futures=True)


def _gather(start: int, photos: list[Future[Image]], preprocess: Preprocess) -> Batch:
    """Wait for a batch's photos and sort them into good ones and failures."""
    indices, shown, failures = [], [], []
    for index, photo in enumerate(photos, start):
        try:
            shown.append(photo.result())
            indices.append(index)
        except ImageError as error:
            # A fresh error: the raised one's traceback would keep the whole file in memory.
            failures.append((index, ImageError(str(error))))
    return Batch(indices, preprocess.normalise(shown), failures)
