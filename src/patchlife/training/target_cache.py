"""A cache of training targets on disk: the dense model runs only once on each photo.

Arrays are memory-mapped, so memory use does not grow with the number of photos. An interrupted collection is resumed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data import Preprocess, Sample, load_batches
from ..errors import ConfigError, ImageError, NumericalError, shortened
from ..io.files import locked, write_atomic
from .targets import Targets

__all__ = ["Photo", "TargetCache", "checksum", "collect", "content_of"]

_FORMAT = 4  # of the files
_PIECE = 4096  # bytes
_FLOAT16_MAX = float(np.finfo(np.float16).max)


class Photo(NamedTuple):
    """A photo, a file or a sample of a shard or data set; ``label`` is its class index, -1 where unknown."""

    path: Path | Sample
    label: int = -1


class TargetCache:
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
        self.photos = list(photos)
        self.skipped = skipped
        self.content = content
        self.image_size = image_size
        self._arrays = arrays
        self._at = np.arange(len(photos)) if at is None else np.asarray(at, dtype=int)  # each row's place on disk

    def __len__(self) -> int:
        return len(self.photos)

    def split(self, last: int) -> tuple[TargetCache, TargetCache]:
        """(all photos but the last ones, the ``last`` photos): to train on, and held out."""
        first = len(self) - last
        rest = self.content, self.image_size
        return (
            TargetCache(self.photos[:first], self.skipped, self._arrays, self._at[:first].tolist(), *rest),
            TargetCache(self.photos[first:], [], self._arrays, self._at[first:].tolist(), *rest),
        )

    @property
    def labelled_content(self) -> str:
        """A short checksum of photos, model and labels: accuracy on the cache is comparable if it is the same."""
        return checksum([self.content, [photo.label for photo in self.photos]])

    def targets(self, rows: Sequence[int]) -> Targets:
        """The targets of these rows, as float32 tensors."""
        places = self._at[np.asarray(rows, dtype=int)]
        order = np.argsort(places)  # disks read fastest in ascending order
        index, inverse = places[order], torch.from_numpy(np.argsort(order))
        return Targets(*(torch.from_numpy(a[index].astype(np.float32))[inverse] for a in self._arrays))

    def labels(self, rows: Sequence[int]) -> Tensor:
        """Class indices of these rows, -1 where unknown."""
        return torch.tensor([self.photos[row].label for row in rows])

    def names(self, rows: Sequence[int]) -> list[str]:
        """Paths of the photos of these rows, for messages."""
        return [str(self.photos[row].path) for row in rows]


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
        photos: the rows of the cache are in this order. Photos that do not fit in ``limit_bytes`` are left out, from
            the end of the list.
        targets_of: computes the targets of a batch of images.
        preprocess: from a photo to an image.
        folder: for the arrays. Targets of an earlier run with the same photos and ``depends_on`` are used.
        depends_on: all else that the targets depend on (weights, start block), as JSON values.
        batch_size: photos in a call of ``targets_of``.
        limit_bytes: disk space that the arrays may take.
        max_unreadable: raise if more than this fraction of the photos cannot be read.
        report: called with (photos done, photos in total) after every batch.

    Raises:
        ImageError: too many photos cannot be read.
        NumericalError: the targets of a photo are not finite.
        ConfigError: not a single photo fits in ``limit_bytes``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "cache.lock"):  # runs that share the folder take turns
        return _collect(
            photos, targets_of, preprocess, folder, depends_on, batch_size, limit_bytes, max_unreadable, report
        )


def _collect(
    photos: Sequence[Photo],
    targets_of: Callable[[Tensor], Targets],
    preprocess: Preprocess,
    folder: Path,
    depends_on: dict[str, Any],
    batch_size: int,
    limit_bytes: float,
    max_unreadable: float,
    report: Callable[[int, int], None],
) -> TargetCache:
    key = _key(photos, depends_on, limit_bytes)
    state = _earlier_collection(folder, key, photos) or _new_collection(folder, key)
    if not state["done"]:
        example = targets_of(torch.zeros(1, preprocess.channels, *preprocess.size))  # for the shapes
        state["total"] = _capacity(example, limit_bytes, len(photos))
        state["content"] = content_of(photos[: state["total"]])
        _create(folder, example, state["total"])
    arrays, included = _open(folder), photos[: state["total"]]
    order = _reading_order(included)
    rest = order[state["done"] :]
    todo = [included[index] for index in rest]
    for batch in load_batches([photo.path for photo in todo], preprocess, batch_size):
        if batch.indices:
            targets = targets_of(batch.images)
            _check_finite(targets, [todo[index] for index in batch.indices])
            _store(arrays, state["rows"], targets)
            state["rows"] += len(batch.indices)
        state["skipped"] += [
            {"path": str(todo[i].path), "error": str(error), "index": rest[i]} for i, error in batch.failures
        ]
        state["done"] += len(batch.indices) + len(batch.failures)
        _check_readable(state["skipped"], state["total"], max_unreadable)
        for array in arrays:
            array.flush()
        write_atomic(folder / "cache.json", json.dumps(state))
        report(state["done"], state["total"])
    failed = {entry["index"] for entry in state["skipped"]}
    read = [index for index in order if index not in failed]
    rows = sorted(range(len(read)), key=read.__getitem__)
    content = checksum([state["content"], depends_on])
    size = preprocess.size
    return TargetCache([included[read[row]] for row in rows], state["skipped"], arrays, rows, content, size)


def _reading_order(photos: Sequence[Photo]) -> list[int]:
    """Indices of the photos: files in their order, then samples by place, so that shards are read sequentially."""
    places = [photo.path.place if isinstance(photo.path, Sample) else "" for photo in photos]
    return sorted(range(len(photos)), key=places.__getitem__)


def _store(arrays: list[np.memmap], row: int, targets: Targets) -> None:
    """Write the targets of a batch, from ``row`` on."""
    for array, values in zip(arrays, targets, strict=True):
        array[row : row + len(values)] = values.float().clamp(-_FLOAT16_MAX, _FLOAT16_MAX).half().cpu().numpy()


def _files(folder: Path) -> list[Path]:
    return [folder / f"{name}.npy" for name in Targets._fields]


def _open(folder: Path) -> list[np.memmap]:
    return [np.load(path, mmap_mode="r+") for path in _files(folder)]


def _create(folder: Path, targets: Targets, rows: int) -> None:
    for path, values in zip(_files(folder), targets, strict=True):
        np.lib.format.open_memmap(path, "w+", np.float16, (rows, *values.shape[1:]))


def _capacity(targets: Targets, limit_bytes: float, photos: int) -> int:
    """How many of the photos fit in ``limit_bytes``."""
    photo_bytes = sum(2 * values[0].numel() for values in targets)
    if limit_bytes < photo_bytes:
        raise ConfigError(
            f"the features of one photo take {photo_bytes / 1e9:.4f} GB, the limit is {limit_bytes / 1e9:.4f} GB; "
            "raise cache_gb"
        )
    return int(min(photos, limit_bytes / photo_bytes))


def _key(photos: Sequence[Photo], depends_on: dict[str, Any], limit_bytes: float) -> str:
    paths = (photo.path for photo in photos)
    names = [path.place if isinstance(path, Sample) else str(path.resolve()) for path in paths]
    values = json.dumps([_FORMAT, names, depends_on, str(limit_bytes)], sort_keys=True)
    return hashlib.sha256(values.encode()).hexdigest()


def checksum(values: Any) -> str:
    """A checksum of JSON values, 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def content_of(photos: Sequence[Photo]) -> str:
    """A checksum of the content of the photos, in their order; of a sample, its place in the shard or data set.

    Paths do not count. Of a large file only its size and three pieces are read.
    """
    digest = hashlib.sha256()
    for photo in photos:
        digest.update(photo.path.place.encode() if isinstance(photo.path, Sample) else _pieces(photo.path))
    return digest.hexdigest()[:12]


def _pieces(path: Path) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            parts = [str(size).encode()]
            for begin in (0,) if size <= 4 * _PIECE else (0, size // 2, size - _PIECE):
                file.seek(begin)
                parts.append(file.read(4 * _PIECE if size <= 4 * _PIECE else _PIECE))
    except OSError as error:  # reported when the photo is read
        return str(error.errno).encode()
    return b"".join(parts)


def _earlier_collection(folder: Path, key: str, photos: Sequence[Photo]) -> dict[str, Any] | None:
    """The state of an earlier run with the same key and photos, complete or interrupted; None without one."""
    path = folder / "cache.json"
    state = json.loads(path.read_text()) if path.is_file() else {}
    if state.get("key") != key or not all(file.is_file() for file in _files(folder)):
        return None
    return state if state["content"] == content_of(photos[: state["total"]]) else None


def _new_collection(folder: Path, key: str) -> dict[str, Any]:
    for file in (folder / "cache.json", *_files(folder)):  # the folder may hold files of the user
        file.unlink(missing_ok=True)
    return {"key": key, "done": 0, "rows": 0, "skipped": []}


def _check_finite(targets: Targets, photos: list[Photo]) -> None:
    finite = torch.stack([values.flatten(1).isfinite().all(dim=1) for values in targets]).all(dim=0)
    bad = [str(photo.path) for photo, good in zip(photos, finite.tolist(), strict=True) if not good]
    if bad:
        raise NumericalError(f"the dense model gives NaN or infinity for {shortened(bad)}; check its weights")


def _check_readable(skipped: list[dict[str, Any]], total: int, max_unreadable: float) -> None:
    if len(skipped) > max_unreadable * total:
        errors = "; ".join(entry["error"] for entry in skipped[:5])
        raise ImageError(
            f"{len(skipped)} of {total} photos cannot be read, more than max_unreadable={max_unreadable:g} allows: "
            f"{errors}"
        )
