"""Values of many photos on disk, one row for each: what the caches of targets and of pixels have in common.

Arrays are memory-mapped, so memory use does not grow with the number of photos. An interrupted collection is resumed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data import Batch, Sample
from ..errors import ConfigError, ImageError
from ..io.files import write_atomic
from ..io.locks import locked

__all__ = ["Collected", "Contents", "Photo", "Rows", "checksum", "content_of", "gather"]

_FORMAT = 5  # of the files
_PIECE = 4096  # bytes


class Photo(NamedTuple):
    """A photo, a file or a sample of a shard or data set; ``label`` is its class index, -1 where unknown."""

    path: Path | Sample
    label: int = -1


class Rows:
    """The values of many photos, one row for each.

    Attributes:
        photos: the photo of each row.
        skipped: path, error and index (among the requested photos) of each photo that could not be read.
        content: a short checksum of the photos' content (not their paths) and of all else that the values depend on.
    """

    def __init__(
        self,
        photos: Sequence[Photo],
        skipped: list[dict[str, Any]],
        arrays: Sequence[np.ndarray],
        at: Sequence[int] | None = None,
        content: str = "",
    ) -> None:
        self.photos = list(photos)
        self.skipped = skipped
        self.content = content
        self._arrays = arrays
        self._at = np.arange(len(photos)) if at is None else np.asarray(at, dtype=int)  # each row's place on disk

    def __len__(self) -> int:
        return len(self.photos)

    @property
    def labelled_content(self) -> str:
        """A short checksum of content and labels: accuracy on the photos is comparable if it is the same."""
        return checksum([self.content, [photo.label for photo in self.photos]])

    def labels(self, rows: Sequence[int]) -> Tensor:
        """Class indices of these rows, -1 where unknown."""
        return torch.tensor([self.photos[row].label for row in rows])

    def names(self, rows: Sequence[int]) -> list[str]:
        """Paths of the photos of these rows, for messages."""
        return [str(self.photos[row].path) for row in rows]

    def _values(self, array: np.ndarray, rows: Sequence[int]) -> np.ndarray:
        """The values of these rows in one of the arrays."""
        places, plain = self._at[np.asarray(rows, dtype=int)], np.asarray(array)
        values = np.empty((len(places), *plain.shape[1:]), plain.dtype)
        for row in np.argsort(places):  # disks read fastest in ascending order
            values[row] = plain[places[row]]
        return values


class Contents(NamedTuple):
    """What is collected.

    Attributes:
        what: its name in messages.
        arrays: the names of its arrays, which are those of the files.
        example: gives the values of one photo, an array of one row for each name, for shapes and types.
        batches: from the photos to read to their values, an array for each name, in batches.
    """

    what: str
    arrays: tuple[str, ...]
    example: Callable[[], Sequence[np.ndarray]]
    batches: Callable[[list[Path | Sample]], Iterator[Batch[Sequence[np.ndarray]]]]


class Collected(NamedTuple):
    """The result of `gather`: the first arguments of `Rows`."""

    photos: list[Photo]
    skipped: list[dict[str, Any]]
    arrays: list[np.memmap]
    at: list[int]
    content: str


def gather(
    photos: Sequence[Photo],
    contents: Contents,
    folder: Path,
    *,
    depends_on: dict[str, Any],
    limit_bytes: float,
    max_unreadable: float,
    report: Callable[[int, int], None],
) -> Collected:
    """The values of ``photos``; they are computed, and written to ``folder``, unless they are there already.

    Args:
        photos: the rows are in this order. Photos that do not fit in ``limit_bytes`` are left out, from the end of the
            list.
        contents: what is collected.
        folder: for the arrays. Values of an earlier run with the same photos and ``depends_on`` are used.
        depends_on: all else that the values depend on, as JSON values.
        limit_bytes: disk space that the arrays may take.
        max_unreadable: raise if more than this fraction of the photos cannot be read.
        report: called with (photos done, photos in total) after every batch.

    Raises:
        ImageError: too many photos cannot be read.
        ConfigError: not a single photo fits in ``limit_bytes``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "cache.lock"):  # runs that share the folder take turns
        return _gather(photos, contents, folder, depends_on, limit_bytes, max_unreadable, report)


def _gather(
    photos: Sequence[Photo],
    contents: Contents,
    folder: Path,
    depends_on: dict[str, Any],
    limit_bytes: float,
    max_unreadable: float,
    report: Callable[[int, int], None],
) -> Collected:
    key = _key(photos, depends_on, limit_bytes)
    files = [folder / f"{name}.npy" for name in contents.arrays]
    state = _earlier_collection(folder, files, key, photos) or _new_collection(folder, files, key)
    if not state["done"]:
        example = contents.example()
        state["total"] = _capacity(contents.what, example, limit_bytes, len(photos))
        state["content"] = content_of(photos[: state["total"]])
        _create(files, example, state["total"])
    arrays, included = [np.load(path, mmap_mode="r+") for path in files], photos[: state["total"]]
    order = _reading_order(included)
    rest = order[state["done"] :]
    todo = [included[index].path for index in rest]
    for batch in contents.batches(todo):
        if batch.indices:
            for array, values in zip(arrays, batch.images, strict=True):
                array[state["rows"] : state["rows"] + len(values)] = values
        state["rows"] += len(batch.indices)
        state["skipped"] += [
            {"path": str(todo[i]), "error": str(error), "index": rest[i]} for i, error in batch.failures
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
    return Collected([included[read[row]] for row in rows], state["skipped"], arrays, rows, content)


def _reading_order(photos: Sequence[Photo]) -> list[int]:
    """Indices of the photos: files in their order, then samples by place, so that shards are read sequentially."""
    places = [photo.path.place if isinstance(photo.path, Sample) else "" for photo in photos]
    return sorted(range(len(photos)), key=places.__getitem__)


def _create(files: Sequence[Path], example: Sequence[np.ndarray], rows: int) -> None:
    for path, values in zip(files, example, strict=True):
        np.lib.format.open_memmap(path, "w+", values.dtype, (rows, *values.shape[1:]))


def _capacity(what: str, example: Sequence[np.ndarray], limit_bytes: float, photos: int) -> int:
    """How many of the photos fit in ``limit_bytes``."""
    photo_bytes = sum(values.nbytes for values in example)
    if limit_bytes < photo_bytes:
        raise ConfigError(
            f"the {what} of one photo take {photo_bytes / 1e9:.4f} GB, the limit is {limit_bytes / 1e9:.4f} GB; "
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


def _earlier_collection(
    folder: Path, files: Sequence[Path], key: str, photos: Sequence[Photo]
) -> dict[str, Any] | None:
    """The state of an earlier run with the same key and photos, complete or interrupted; None without one."""
    path = folder / "cache.json"
    state = json.loads(path.read_text()) if path.is_file() else {}
    if state.get("key") != key or not all(file.is_file() for file in files):
        return None
    return state if state["content"] == content_of(photos[: state["total"]]) else None


def _new_collection(folder: Path, files: Sequence[Path], key: str) -> dict[str, Any]:
    for file in (folder / "cache.json", *files):  # the folder may hold files of the user
        file.unlink(missing_ok=True)
    return {"key": key, "done": 0, "rows": 0, "skipped": []}


def _check_readable(skipped: list[dict[str, Any]], total: int, max_unreadable: float) -> None:
    if len(skipped) > max_unreadable * total:
        errors = "; ".join(entry["error"] for entry in skipped[:5])
        raise ImageError(
            f"{len(skipped)} of {total} photos cannot be read, more than max_unreadable={max_unreadable:g} allows: "
            f"{errors}"
        )
