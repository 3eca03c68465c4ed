"""Photos, shards and tables at addresses of fsspec, such as ``s3://bucket/photos`` or ``gs://bucket/shard-*.tar``.

fsspec comes with torch. The package of a protocol (s3fs for ``s3://``, gcsfs for ``gs://``) is named in the error if it
is not installed. Credentials are found as that package finds them.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import ImageError, PatchLifeError
from .listing import PHOTO_SUFFIXES, by_suffix
from .reading import Sample

__all__ = ["file_system", "is_address", "list_at", "named", "opened", "photo_at", "photos_at", "read_range"]

_BLOCK = 2**20  # bytes that are read at a time while the headers of a shard are listed


def is_address(text: object) -> bool:
    """Whether an argument is an address of fsspec (``PROTOCOL://...``), not a path."""
    return isinstance(text, str) and "://" in text


@dataclass(frozen=True, slots=True)
class _PhotoAt(Sample):
    """A photo at an address."""

    address: str

    def __str__(self) -> str:
        return self.address

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.address.rpartition("/")[2]

    @property
    def place(self) -> str:
        """The address."""
        return self.address

    @property
    def label(self) -> None:
        """None: an address has no label."""
        return None

    def content(self, max_bytes: int) -> bytes:
        """The bytes of the photo."""
        data = read_range(self.address, 0, max_bytes + 1, self)
        if len(data) > max_bytes:
            raise ImageError(f"{self}: expected at most {max_bytes:,} bytes, found more; save it as a smaller file")
        return data


def photo_at(address: str) -> Sample:
    """The photo at an address, which is not checked before it is read."""
    return _PhotoAt(address)


def photos_at(address: str, left_out: set[Path] | None = None) -> list[Sample]:
    """The photos of a folder, glob or file at an address, sorted by address. Hidden files are skipped.

    Args:
        address: as fsspec reads it.
        left_out: if given, files in folders and globs that are not photos by their suffix are added to this set.

    Raises ImageError if there are none, or the address cannot be listed.
    """
    found = list_at(address)
    if found == [address]:  # a file that is given itself may have any suffix
        return [photo_at(address)]
    photos = [one for one in found if one.lower().endswith(PHOTO_SUFFIXES)]
    others = {Path(one) for one in found} - {Path(one) for one in photos}
    if not photos:
        but = f" but files with the suffixes {by_suffix(others)}" if others else ""
        raise ImageError(f"{address}: expected photos, found none{but}; check the address")
    if left_out is not None:
        left_out |= others
    return list(map(photo_at, photos))


def list_at(address: str) -> list[str]:
    """The addresses of all files of a folder or glob, sorted, without hidden ones; a file gives its own address.

    Raises ImageError if there is no such file or folder, or the address cannot be listed.
    """
    with named(address):
        system, path = file_system(address)
        if "::" in address and (glob.has_magic(path) or system.isdir(path)):
            raise ValueError("a folder inside another file (::); give the addresses of its photos in a table instead")
        if glob.has_magic(path):
            matches = system.glob(path)
            found = [file for match in matches for file in (system.find(match) if system.isdir(match) else [match])]
            base = path[: path.index(next(sign for sign in path if sign in "*?["))].rpartition("/")[0]
        elif system.isdir(path):
            found, base = system.find(path), path
        elif system.exists(path):
            return [address]
        else:
            raise FileNotFoundError("no such file or folder")
        return [system.unstrip_protocol(file) for file in sorted(set(found)) if not _hidden(file, base)]


def read_range(address: str, begin: int, end: int, name: object = "") -> bytes:
    """The bytes from ``begin`` up to ``end`` of a file, or fewer if it is shorter. Errors call it ``name``."""
    with named(name or address):
        system, path = file_system(address)
        return system.cat_file(path, start=begin, end=end)


@contextmanager
def opened(place: Path | str) -> Iterator[BinaryIO]:
    """A file to read, at a path or an address."""
    if isinstance(place, Path):
        with open(place, "rb") as file:
            yield file
        return
    with named(place):  # around what is read from it, too
        system, path = file_system(place)
        with system.open(path, "rb", block_size=_BLOCK) as stream:
            yield stream


def file_system(address: str) -> tuple[Any, str]:
    """(file system, path in it)."""
    from fsspec.core import url_to_fs

    return url_to_fs(address)


def _hidden(file: str, base: str) -> bool:
    inside = file.removeprefix("/").removeprefix(base.removeprefix("/"))
    return any(part.startswith(".") for part in inside.split("/"))


@contextmanager
def named(name: object, use: str = "read", kind: type[PatchLifeError] = ImageError) -> Iterator[None]:
    """Raise every error of a file system as one of ``kind`` that names the address; ``use``: what it is needed for."""
    try:
        yield
    except kind:
        raise
    except Exception as error:  # each file system has its own kinds of errors
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise kind(
            f"{name}: expected an address that can be {use}, found {reason}; check the address, the credentials and "
            "the package of its protocol"
        ) from error
