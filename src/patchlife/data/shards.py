"""Photos in WebDataset shards, read where they lie.

With the standard library rather than the webdataset package. That one streams through a shuffle buffer: no photo is
drawn fairly from all shards, none can be opened again later, its decoders include pickles and its addresses may be
shell commands. A pass over the headers finds every photo once; from then on one is a seek and a read, with the limits
that files have. Nothing is unpacked, and memory holds the index (0.3 kB a photo).
"""

from __future__ import annotations

import glob
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..errors import ImageError
from .listing import PHOTO_SUFFIXES
from .reading import Sample

__all__ = ["is_shard", "list_shards", "members"]

_BLOCK = 512  # tar's unit
_LABELS = (".cls", ".json")
_LARGEST_LABEL = 2**20  # bytes


@dataclass(frozen=True, slots=True)
class _Member(Sample):
    """A photo in a tar file.

    Attributes:
        shard: the file as it was given. home: the same, resolved.
        path: the member's name.
        begin: of its bytes in the shard. size: of them.
        label_at: (name's suffix, begin, size) of the member with its label.
    """

    shard: Path
    home: str
    path: str
    begin: int
    size: int
    label_at: tuple[str, int, int] | None = None

    def __str__(self) -> str:
        return f"{self.shard}/{self.path}"

    @property
    def name(self) -> str:
        """Its last part."""
        return PurePosixPath(self.path).name

    @property
    def place(self) -> str:
        """The shard, then where in it."""
        return f"{self.home}@{self.begin:015d}+{self.size}/{self.path}"

    @property
    def label(self) -> str | int | None:
        """What ``key.cls`` holds, or the "label" of ``key.json``."""
        if self.label_at is None:
            return None
        suffix, begin, size = self.label_at
        try:
            text = self._bytes(begin, min(size, _LARGEST_LABEL)).decode("utf-8-sig").strip()
            said = json.loads(text).get("label") if suffix == ".json" else text
        except (ValueError, AttributeError, RecursionError):
            said = ...
        if said is not None and (isinstance(said, bool) or not isinstance(said, str | int)):
            raise ImageError(
                f"{self}: expected its {suffix} to hold a class's name or index, found neither; correct it, or learn "
                "without labels"
            )
        return said

    def content(self, max_bytes: int) -> bytes:
        """Its bytes, all of them."""
        if self.size > max_bytes:
            raise ImageError(
                f"{self}: expected at most {max_bytes:,} bytes, found {self.size:,} bytes; save it as a smaller file"
            )
        return self._bytes(self.begin, self.size)

    def _bytes(self, begin: int, size: int) -> bytes:
        try:
            with open(self.shard, "rb") as file:
                file.seek(begin)
                data = file.read(size)
        except OSError as error:
            raise ImageError(f"{self}: expected a shard that can be read, found {error.strerror}; check it") from error
        if len(data) < size:
            raise ImageError(f"{self}: expected {size:,} bytes, found {len(data):,}; copy the shard anew")
        return data


def is_shard(given: str) -> bool:
    """Whether an argument means shards, by its name alone; compressed ones too, to say what is wrong with them."""
    return given.lower().endswith((".tar", ".tar.gz", ".tgz"))


def list_shards(given: str) -> list[Path]:
    """The shards that a path or glob stands for, sorted. Raises ImageError where there are none."""
    paths = [Path(given)] if Path(given).exists() else [Path(path) for path in sorted(glob.glob(given, recursive=True))]
    if not paths:
        raise ImageError(f"{given}: expected a shard or a glob of shards, found no such file; check the path")
    return paths


def members(shard: Path) -> list[Sample]:
    """The photos of a shard, in its order. Reads the headers, seeks over everything else.

    Raises ImageError where there is no photo, or the shard cannot be read to its end.
    """
    photos: dict[str, tuple[str, int, int]] = {}  # by name: as in tar, the last of a name counts
    labels: dict[str, tuple[str, int, int]] = {}
    try:
        with open(shard, "rb") as file:
            for path, begin, size in _headers(shard, file):
                key, suffix = _key(path)
                if suffix in PHOTO_SUFFIXES:
                    photos[path] = key, begin, size
                elif suffix in _LABELS:
                    labels[key] = suffix, begin, size
    except OSError as error:
        raise ImageError(f"{shard}: expected a shard, found one that cannot be read ({error.strerror})") from error
    if not photos:
        raise ImageError(
            f"{shard}: expected photos (members named KEY.jpg, or {', '.join(PHOTO_SUFFIXES[1:])}, no dot in KEY), "
            "found none; check the shard"
        )
    home = str(shard.resolve())
    return [_Member(shard, home, path, begin, size, labels.get(key)) for path, (key, begin, size) in photos.items()]


def _headers(shard: Path, file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """(name, begin, size) of each regular member. Links and sparse files are passed over: nothing to be read there."""
    end, last = 0, "its beginning"
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps 1 kB for each
                end, last = member.offset_data, member.name
                if member.size < 0:  # tarfile would go back, for ever
                    raise _damaged(shard, f"a negative size at {last}")
                if member.isreg():
                    end += -(-member.size // _BLOCK) * _BLOCK
                    if not member.issparse():
                        yield member.name, member.offset_data, member.size
    except tarfile.TarError as error:
        raise _damaged(shard, f"{error} after {last}") from error
    file.seek(end)
    if file.read(_BLOCK).strip(b"\0"):  # tarfile takes a damaged header for the end; the end is a block of zeros
        raise _damaged(shard, f"a damaged header after {last}")


def _damaged(shard: Path, found: str) -> ImageError:
    return ImageError(
        f"{shard}: expected a plain, whole .tar file, found {found}; copy it anew, gunzip a compressed one, or "
        "leave it out"
    )


def _key(path: str) -> tuple[str, str]:
    """A member's key and suffix, split at its name's first dot: as WebDataset does, so that masks are no photos."""
    folder, slash, name = path.rpartition("/")
    stem, dot, suffix = name.partition(".")
    return folder + slash + stem, (dot + suffix.lower()) if stem else ""
