"""Read photos from WebDataset shards (tar files) by random access, without unpacking them.

This module uses the standard library instead of the webdataset package, which streams through a shuffle buffer: its
samples are not drawn uniformly from all shards and cannot be opened again later, its decoders include pickle, and its
URLs may be shell commands. Here, one pass over the headers lists every photo; after that, each photo is one seek and
one read, with the same limits as for files. The index takes 0.3 kB of memory per photo.
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
from .addresses import is_address, list_at, opened, read_range
from .listing import PHOTO_SUFFIXES
from .reading import Sample

__all__ = ["is_shard", "list_shards", "members"]

_BLOCK = 512  # bytes; tar pads members to this size
_LABEL_SUFFIXES = (".cls", ".json")
_MAX_LABEL = 2**20  # bytes


@dataclass(frozen=True, slots=True)
class _Member(Sample):
    """A photo in a tar file.

    Attributes:
        shard: the path of the tar file as the user gave it, or its address.
        resolved: the same path, absolute and without links; or the address.
        path: the name of the member.
        begin: offset of the content in the shard, in bytes.
        size: size of the content, in bytes.
        label_at: (suffix, begin, size) of the member that holds the label, None without a label.
    """

    shard: Path | str
    resolved: str
    path: str
    begin: int
    size: int
    label_at: tuple[str, int, int] | None = None

    def __str__(self) -> str:
        return f"{self.shard}/{self.path}"

    @property
    def name(self) -> str:
        """The last part of the member's name."""
        return PurePosixPath(self.path).name

    @property
    def place(self) -> str:
        """The shard, then the offset in it."""
        return f"{self.resolved}@{self.begin:015d}+{self.size}/{self.path}"

    @property
    def label(self) -> str | int | None:
        """The text of ``key.cls``, or the "label" entry of ``key.json``. Raises ImageError for other content."""
        if self.label_at is None:
            return None
        suffix, begin, size = self.label_at
        try:
            text = self._bytes(begin, min(size, _MAX_LABEL)).decode("utf-8-sig").strip()
            label = json.loads(text).get("label") if suffix == ".json" else text
        except (ValueError, AttributeError, RecursionError):
            label = ...
        if label is not None and (isinstance(label, bool) or not isinstance(label, str | int)):
            raise ImageError(
                f"{self}: expected a class name or index in its {suffix} file, found neither; correct the label, or "
                "train without labels"
            )
        return label

    def content(self, max_bytes: int) -> bytes:
        """The bytes of the photo."""
        if self.size > max_bytes:
            raise ImageError(
                f"{self}: expected at most {max_bytes:,} bytes, found {self.size:,} bytes; save it as a smaller file"
            )
        return self._bytes(self.begin, self.size)

    def _bytes(self, begin: int, size: int) -> bytes:
        try:
            if isinstance(self.shard, str):
                data = read_range(self.shard, begin, begin + size, self)
            else:
                with open(self.shard, "rb") as file:
                    file.seek(begin)
                    data = file.read(size)
        except OSError as error:
            raise ImageError(
                f"{self}: expected a shard that can be read, found {error.strerror}; check the file"
            ) from error
        if len(data) < size:
            raise ImageError(f"{self}: expected {size:,} bytes, found {len(data):,}; copy the shard again")
        return data


def is_shard(argument: str) -> bool:
    """Whether an argument has the suffix of shards; also true for compressed shards, which get an error later."""
    return argument.lower().endswith((".tar", ".tar.gz", ".tgz"))


def list_shards(argument: str) -> list[Path | str]:
    """The shards of a path, address or glob, sorted. Raises ImageError if there are none."""
    if is_address(argument):
        return [*list_at(argument)]
    exists = Path(argument).exists()
    paths = [Path(argument)] if exists else [Path(path) for path in sorted(glob.glob(argument, recursive=True))]
    if not paths:
        raise ImageError(f"{argument}: expected a shard or a glob of shards, found no such file; check the path")
    return [*paths]


def members(shard: Path | str) -> list[Sample]:
    """The photos of a shard, in its order. Only the headers are read.

    Raises ImageError if the shard has no photo or cannot be read to its end.
    """
    photos: dict[str, tuple[str, int, int]] = {}  # by name: the last member of a name counts, as in tar
    labels: dict[str, tuple[str, int, int]] = {}
    try:
        with opened(shard) as file:
            for path, begin, size in _headers(shard, file):
                key, suffix = _key(path)
                if suffix in PHOTO_SUFFIXES:
                    photos[path] = key, begin, size
                elif suffix in _LABEL_SUFFIXES:
                    labels[key] = suffix, begin, size
    except OSError as error:
        raise ImageError(
            f"{shard}: expected a shard, found a file that cannot be read ({error.strerror}); check the file"
        ) from error
    if not photos:
        raise ImageError(
            f"{shard}: expected photos (members named KEY.jpg, or {', '.join(PHOTO_SUFFIXES[1:])}, no dot in KEY), "
            "found none; check the names in the shard"
        )
    resolved = str(shard.resolve()) if isinstance(shard, Path) else shard
    return [_Member(shard, resolved, path, begin, size, labels.get(key)) for path, (key, begin, size) in photos.items()]


def _headers(shard: Path | str, file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """(name, begin, size) of each regular member. Links and sparse files are skipped; they hold no content to read."""
    end, last = 0, "the beginning"
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep 1 kB per member
                end, last = member.offset_data, member.name
                if member.size < 0:  # tarfile would seek back and never end
                    raise _damaged(shard, f"a negative size at {last}")
                if member.isreg():
                    end += -(-member.size // _BLOCK) * _BLOCK
                    if not member.issparse():
                        yield member.name, member.offset_data, member.size
    except tarfile.TarError as error:
        raise _damaged(shard, f"{error} after {last}") from error
    file.seek(end)
    if file.read(_BLOCK).strip(b"\0"):  # tarfile ends at a damaged header; the true end is a block of zeros
        raise _damaged(shard, f"a damaged header after {last}")


def _damaged(shard: Path | str, found: str) -> ImageError:
    return ImageError(
        f"{shard}: expected a complete, uncompressed .tar file, found {found}; copy it again, decompress it, or "
        "leave it out"
    )


def _key(path: str) -> tuple[str, str]:
    """(key, suffix) of a member, split at the first dot as WebDataset does, so that ``key.seg.png`` is not a photo."""
    folder, slash, name = path.rpartition("/")
    stem, dot, suffix = name.partition(".")
    return folder + slash + stem, (dot + suffix.lower()) if stem else ""
