"""What the teacher said about every photo, on disk, so that it has to be asked only once.

Arrays are memory-mapped: however many photos there are, memory holds one batch. An interrupted collection goes
on where it stopped.
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
from ..errors import ConfigError, ImageError, NumericalError
from ..io.files import locked, write_atomic
from .targets import Targets

__all__ = ["Photo", "TargetCache", "checksum", "collect", "content_of"]

_FORMAT = 2  # of what a targets is
_PIECE = 4096  # bytes
_LIMIT = float(np.finfo(np.float16).max)


class Photo(NamedTuple):
    """A photo to learn from, a file or a sample; ``label`` is its class index, -1 where unknown."""

    path: Path | Sample
    label: int = -1


class TargetCache:
    """Lessons of many photos, one row each, in half precision.

    Attributes:
        photos: the photo of each row.
        skipped: path, error and index (among those asked for) of each photo that could not be read.
        content: what the targets follow from, as a short checksum: photos (not where they lie) and model.
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

    def split(self, last: int) -> tuple[TargetCache, TargetCache]:
        """(all but the last photos, the ``last`` ones): to learn from, and to look at afterwards."""
        first = len(self) - last
        return (
            TargetCache(self.photos[:first], self.skipped, self._arrays, self._at[:first].tolist(), self.content),
            TargetCache(self.photos[first:], [], self._arrays, self._at[first:].tolist(), self.content),
        )

    @property
    def seen(self) -> str:
        """A short checksum of photos, model and labels: what a measurement on them follows from."""
        return checksum([self.content, [photo.label for photo in self.photos]])

    def targets(self, rows: Sequence[int]) -> Targets:
        """The targets of some photos, as float32 tensors."""
        places = self._at[np.asarray(rows, dtype=int)]
        order = np.argsort(places)  # disks like to be read forwards
        index, inverse = places[order], torch.from_numpy(np.argsort(order))
        return Targets(*(torch.from_numpy(a[index].astype(np.float32))[inverse] for a in self._arrays))

    def labels(self, rows: Sequence[int]) -> Tensor:
        """Class indices of some photos, -1 where unknown."""
        return torch.tensor([self.photos[row].label for row in rows])

    def names(self, rows: Sequence[int]) -> list[str]:
        """Paths of some photos, for messages."""
        return [str(self.photos[row].path) for row in rows]


def collect(
    photos: Sequence[Photo],
    ask: Callable[[Tensor], Targets],
    preprocess: Preprocess,
    folder: Path,
    *,
    depends_on: dict[str, Any],
    batch_size: int = 32,
    limit_bytes: float = float("inf"),
    max_unreadable: float = 0.01,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> TargetCache:
    """Ask the teacher about ``photos`` and keep what it said in ``folder``.

    Args:
        photos: the cache's rows will be in this order, whatever order they are read in; those that would not fit in
            ``limit_bytes`` are left out from the end.
        ask: from images to their targets.
        preprocess: how a photo becomes an image.
        folder: where the arrays go. What an earlier run with the same photos and ``about`` left there is used.
        depends_on: what else the targets depend on (weights, start block), as JSON values.
        batch_size: photos per question.
        limit_bytes: disk that the arrays may take.
        max_unreadable: the fraction of unreadable photos above which this stops.
        report: called with (photos done, photos in all) after every batch.

    Raises:
        ImageError: too many photos cannot be read.
        NumericalError: a photo made the teacher answer NaN.
        ConfigError: not a single photo fits into ``limit_bytes``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "cache.lock"):  # two runs may share the folder, but not at the same time
        return _collected(photos, ask, preprocess, folder, depends_on, batch_size, limit_bytes, max_unreadable, report)


def _collected(
    photos: Sequence[Photo],
    ask: Callable[[Tensor], Targets],
    preprocess: Preprocess,
    folder: Path,
    depends_on: dict[str, Any],
    batch_size: int,
    limit_bytes: float,
    max_unreadable: float,
    report: Callable[[int, int], None],
) -> TargetCache:
    """See `collect`."""
    key = _key(photos, depends_on, limit_bytes)
    state = _interrupted(folder, key, photos) or _afresh(folder, key)
    if not state["asked"]:
        nothing = ask(torch.zeros(1, preprocess.channels, *preprocess.size))  # for its shapes
        state["total"] = _capacity(nothing, limit_bytes, len(photos))
        state["content"] = content_of(photos[: state["total"]])
        _create(folder, nothing, state["total"])
    arrays, wanted = _open(folder), photos[: state["total"]]
    order = _reading_order(wanted)
    rest = order[state["asked"] :]
    todo = [wanted[index] for index in rest]
    for batch in load_batches([photo.path for photo in todo], preprocess, batch_size):
        if batch.indices:
            targets = ask(batch.images)
            _check_finite(targets, [todo[index] for index in batch.indices])
            _store(arrays, state["rows"], targets)
            state["rows"] += len(batch.indices)
        state["skipped"] += [
            {"path": str(todo[i].path), "error": str(error), "index": rest[i]} for i, error in batch.failures
        ]
        state["asked"] += len(batch.indices) + len(batch.failures)
        _check_readable(state["skipped"], state["total"], max_unreadable)
        for array in arrays:
            array.flush()
        write_atomic(folder / "cache.json", json.dumps(state))
        report(state["asked"], state["total"])
    failed = {entry["index"] for entry in state["skipped"]}
    read = [index for index in order if index not in failed]
    rows = sorted(range(len(read)), key=read.__getitem__)
    content = checksum([state["content"], depends_on])
    return TargetCache([wanted[read[row]] for row in rows], state["skipped"], arrays, rows, content)


def _reading_order(photos: Sequence[Photo]) -> list[int]:
    """Files as they come, then samples as they lie: drawn at random, but a shard is read from beginning to end."""
    places = [photo.path.place if isinstance(photo.path, Sample) else "" for photo in photos]
    return sorted(range(len(photos)), key=places.__getitem__)


def _store(arrays: list[np.memmap], row: int, targets: Targets) -> None:
    """Write the photos of a targets from ``row`` on."""
    for array, values in zip(arrays, targets, strict=True):
        array[row : row + len(values)] = values.float().clamp(-_LIMIT, _LIMIT).half().cpu().numpy()


def _files(folder: Path) -> list[Path]:
    return [folder / f"{name}.npy" for name in Targets._fields]


def _open(folder: Path) -> list[np.memmap]:
    return [np.load(path, mmap_mode="r+") for path in _files(folder)]


def _create(folder: Path, targets: Targets, rows: int) -> None:
    for path, values in zip(_files(folder), targets, strict=True):
        np.lib.format.open_memmap(path, "w+", np.float16, (rows, *values.shape[1:]))


def _capacity(targets: Targets, limit_bytes: float, wanted: int) -> int:
    """How many of the wanted photos fit into the disk that was granted."""
    each = sum(2 * values[0].numel() for values in targets)
    if limit_bytes < each:
        raise ConfigError(
            f"one photo's features take {each / 1e9:.4f} GB, the cache may take {limit_bytes / 1e9:.4f}; raise cache_gb"
        )
    return int(min(wanted, limit_bytes / each))


def _key(photos: Sequence[Photo], depends_on: dict[str, Any], limit_bytes: float) -> str:
    paths = (photo.path for photo in photos)
    names = [path.place if isinstance(path, Sample) else str(path.resolve()) for path in paths]
    said = json.dumps([_FORMAT, names, depends_on, str(limit_bytes)], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def checksum(values: Any) -> str:
    """A few digits that tell JSON values from others."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def content_of(photos: Sequence[Photo]) -> str:
    """A checksum of what the photos are, in their order, wherever their files lie; of a sample its place says it.

    Of a large file only its size and three pieces are read.
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
    except OSError as error:  # reading the photo will say so
        return str(error.errno).encode()
    return b"".join(parts)


def _interrupted(folder: Path, key: str, photos: Sequence[Photo]) -> dict[str, Any] | None:
    """What an earlier run of the same collection left, None if there is nothing to go on with."""
    path = folder / "cache.json"
    state = json.loads(path.read_text()) if path.is_file() else {}
    if state.get("key") != key or not all(file.is_file() for file in _files(folder)):
        return None
    return state if state["content"] == content_of(photos[: state["total"]]) else None


def _afresh(folder: Path, key: str) -> dict[str, Any]:
    for ours in (folder / "cache.json", *_files(folder)):  # nothing else: the folder may hold what is not ours
        ours.unlink(missing_ok=True)
    return {"key": key, "asked": 0, "rows": 0, "skipped": []}


def _check_finite(targets: Targets, photos: list[Photo]) -> None:
    good = torch.stack([values.flatten(1).isfinite().all(dim=1) for values in targets]).all(dim=0)
    bad = [str(photo.path) for photo, fine in zip(photos, good.tolist(), strict=True) if not fine]
    if bad:
        raise NumericalError(f"the dense model answers NaN or infinity for {', '.join(bad[:5])}; check its weights")


def _check_readable(skipped: list[dict[str, Any]], total: int, cap: float) -> None:
    if len(skipped) > max(cap * total, 0):
        named = "; ".join(entry["error"] for entry in skipped[:5])
        raise ImageError(
            f"{len(skipped)} of {total} photos cannot be read, more than max_unreadable={cap:g} allows: {named}"
        )
