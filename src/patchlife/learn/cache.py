"""What the teacher said about every photo, on disk, so that it has to be asked only once.

Arrays are memory-mapped: however many photos there are, memory holds one batch. An interrupted collection goes
on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, ImageError, NumericalError
from ..files import write_atomic
from ..images import Preprocess, load_batches
from .targets import Lesson

__all__ = ["LessonCache", "Photo", "collect"]

_LIMIT = float(np.finfo(np.float16).max)


class Photo(NamedTuple):
    """A photo to learn from; ``label`` is its class index, -1 where unknown."""

    path: Path
    label: int = -1


class LessonCache:
    """Lessons of many photos, one row each, in half precision.

    Attributes:
        photos: the photo of each row.
        skipped: path and error of each photo that could not be read.
    """

    def __init__(self, photos: Sequence[Photo], skipped: list[dict[str, str]], arrays: Sequence[np.ndarray]) -> None:
        self.photos = list(photos)
        self.skipped = skipped
        self._arrays = arrays

    def __len__(self) -> int:
        return len(self.photos)

    def split(self, last: int) -> tuple[LessonCache, LessonCache]:
        """(all but the last photos, the ``last`` ones): to learn from, and to look at afterwards."""
        first = len(self) - last
        whole = [array[: len(self)] for array in self._arrays]
        return (
            LessonCache(self.photos[:first], self.skipped, [array[:first] for array in whole]),
            LessonCache(self.photos[first:], [], [array[first:] for array in whole]),
        )

    def lessons(self, rows: Sequence[int]) -> Lesson:
        """The lessons of some photos, as float32 tensors."""
        order = np.argsort(rows)  # disks like to be read forwards
        index, inverse = np.asarray(rows)[order], torch.from_numpy(np.argsort(order))
        return Lesson(*(torch.from_numpy(a[index].astype(np.float32))[inverse] for a in self._arrays))

    def labels(self, rows: Sequence[int]) -> Tensor:
        """Class indices of some photos, -1 where unknown."""
        return torch.tensor([self.photos[row].label for row in rows])

    def names(self, rows: Sequence[int]) -> list[str]:
        """Paths of some photos, for messages."""
        return [str(self.photos[row].path) for row in rows]


def collect(
    photos: Sequence[Photo],
    ask: Callable[[Tensor], Lesson],
    preprocess: Preprocess,
    folder: Path,
    *,
    about: dict[str, Any],
    batch_size: int = 32,
    limit_bytes: float = float("inf"),
    max_unreadable: float = 0.01,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> LessonCache:
    """Ask the teacher about ``photos`` and keep what it said in ``folder``.

    Args:
        photos: in the order in which they are stored; those that would not fit in ``limit_bytes`` are left out.
        ask: from images to their lesson.
        preprocess: how a photo becomes an image.
        folder: where the arrays go. What an earlier run with the same photos and ``about`` left there is used.
        about: what else the lessons depend on (weights, start block), as JSON values.
        batch_size: photos per question.
        limit_bytes: disk that the arrays may take.
        max_unreadable: the fraction of unreadable photos above which this stops.
        report: called with (photos done, photos in all) after every batch.

    Raises:
        ImageError: too many photos cannot be read.
        NumericalError: a photo made the teacher answer NaN.
        ConfigError: not a single photo fits into ``limit_bytes``.
    """
    key = _key(photos, about, limit_bytes)
    state = _interrupted(folder, key) or _afresh(folder, key, len(photos))
    arrays = _open(folder) if state["rows"] else []
    todo = photos[state["asked"] :]
    for batch in load_batches([photo.path for photo in todo], preprocess, batch_size):
        if state["asked"] >= state["total"]:
            break
        fits = len(arrays[0]) - state["rows"] if arrays else len(batch.indices)
        if batch.indices:
            lesson = ask(batch.images)
            _check_finite(lesson, [todo[index] for index in batch.indices])
            if not arrays:
                state["total"] = _capacity(lesson, limit_bytes, len(photos))
                arrays, fits = _create(folder, lesson, state["total"]), state["total"]
            state["rows"] += _store(arrays, state["rows"], lesson, fits)
        state["skipped"] += [{"path": str(todo[i].path), "error": str(error)} for i, error in batch.failures]
        state["asked"] = min(state["asked"] + batch_size, state["total"])
        _check_readable(state["skipped"], state["total"], max_unreadable)
        for array in arrays:
            array.flush()
        write_atomic(folder / "cache.json", json.dumps(state))
        report(state["asked"], state["total"])
    failed = {entry["path"] for entry in state["skipped"]}
    readable = [photo for photo in photos[: state["asked"]] if str(photo.path) not in failed]
    return LessonCache(readable[: state["rows"]], state["skipped"], arrays)


def _store(arrays: list[np.memmap], row: int, lesson: Lesson, fits: int) -> int:
    """Write as many photos of a lesson as fit, from ``row`` on; returns how many."""
    for array, values in zip(arrays, lesson, strict=True):
        half = values[:fits].float().clamp(-_LIMIT, _LIMIT).half().cpu().numpy()
        array[row : row + len(half)] = half
    return min(fits, len(lesson.tokens))


def _files(folder: Path) -> list[Path]:
    return [folder / f"{name}.npy" for name in Lesson._fields]


def _open(folder: Path) -> list[np.memmap]:
    return [np.load(path, mmap_mode="r+") for path in _files(folder)]


def _create(folder: Path, lesson: Lesson, rows: int) -> list[np.memmap]:
    return [
        np.lib.format.open_memmap(path, "w+", np.float16, (rows, *values.shape[1:]))
        for path, values in zip(_files(folder), lesson, strict=True)
    ]


def _capacity(lesson: Lesson, limit_bytes: float, wanted: int) -> int:
    """How many of the wanted photos fit into the disk that was granted."""
    each = sum(2 * values[0].numel() for values in lesson)
    if limit_bytes < each:
        raise ConfigError(
            f"one photo's features take {each / 1e9:.4f} GB, the cache may take {limit_bytes / 1e9:.4f}; raise cache_gb"
        )
    return int(min(wanted, limit_bytes / each))


def _key(photos: Sequence[Photo], about: dict[str, Any], limit_bytes: float) -> str:
    names = [str(photo.path.resolve()) for photo in photos]
    said = json.dumps([names, about, str(limit_bytes)], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _interrupted(folder: Path, key: str) -> dict[str, Any] | None:
    """What an earlier run of the same collection left, None if there is nothing to go on with."""
    path = folder / "cache.json"
    state = json.loads(path.read_text()) if path.is_file() else {}
    return state if state.get("key") == key else None


def _afresh(folder: Path, key: str, total: int) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return {"key": key, "asked": 0, "rows": 0, "total": total, "skipped": []}


def _check_finite(lesson: Lesson, photos: list[Photo]) -> None:
    good = torch.stack([values.flatten(1).isfinite().all(dim=1) for values in lesson]).all(dim=0)
    bad = [str(photo.path) for photo, fine in zip(photos, good.tolist(), strict=True) if not fine]
    if bad:
        raise NumericalError(f"the dense model answers NaN or infinity for {', '.join(bad[:5])}; check its weights")


def _check_readable(skipped: list[dict[str, str]], total: int, cap: float) -> None:
    if len(skipped) > max(cap * total, 0):
        named = "; ".join(entry["error"] for entry in skipped[:5])
        raise ImageError(
            f"{len(skipped)} of {total} photos cannot be read, more than max_unreadable={cap:g} allows: {named}"
        )
