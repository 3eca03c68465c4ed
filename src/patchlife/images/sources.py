"""Photos that are not files of their own: in WebDataset shards, and in timm's data sets.

Shards are read with the standard library rather than with the webdataset package. That one streams through a shuffle
buffer: no photo is drawn fairly from all shards, none can be opened again later, its decoders include pickles and its
addresses may be shell commands. A pass over the headers finds every photo once; from then on one is a seek and a
read, with the limits that files have. Nothing is unpacked, and memory holds the index (0.3 kB a photo).
"""

from __future__ import annotations

import glob
import json
import tarfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import ConfigError, ImageError, PatchLifeError
from .listing import PHOTO_SUFFIXES, list_photos
from .reading import Sample

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["list_samples"]

_TIMM = "timm:"
_BLOCK = 512  # tar's unit
_LABELS = (".cls", ".json")
_LARGEST_LABEL = 2**20  # bytes


def list_samples(data: Iterable[str]) -> list[Path | Sample]:
    """List the photos that DATA stands for: files first, then those in shards, then those of data sets.

    Args:
        data: photos, folders and globs as `list_photos` takes them; shards (``*.tar``, or a glob that ends so), whose
            members are ``key.jpg|jpeg|png|webp`` and, for labels, ``key.cls`` or ``key.json``; data sets of timm as
            ``timm:NAME[:SPLIT[:ROOT]]``.

    Raises:
        ImageError: nothing where something is named, or no photo in it; a shard that cannot be read to its end.
        ConfigError: a data set that timm cannot open, or that has no order to draw from.
    """
    data = [str(given) for given in data]
    shards = [given for given in data if _is_shard(given)]
    sets = [given for given in data if given.startswith(_TIMM)]
    files = [given for given in data if given not in shards and given not in sets]
    found: list[Path | Sample] = list(list_photos(files)) if files or not data else []
    for shard in dict.fromkeys(shard for given in shards for shard in _matches(given)):
        found += _members(shard)
    for given in dict.fromkeys(sets):
        found += _timm_samples(given)
    return found


# ---- shards


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
            text = self._bytes(begin, min(size, _LARGEST_LABEL)).decode().strip()
            said = json.loads(text).get("label") if suffix == ".json" else text
        except (ValueError, AttributeError):
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
                f"{self}: expected at most {max_bytes:,} bytes, found {self.size:,} bytes; shrink the photo"
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


def _is_shard(given: str) -> bool:
    return given.lower().endswith((".tar", ".tar.gz", ".tgz")) and not given.startswith(_TIMM)


def _matches(given: str) -> list[Path]:
    """The shards that one argument stands for, sorted; never empty."""
    paths = [Path(given)] if Path(given).exists() else [Path(path) for path in sorted(glob.glob(given, recursive=True))]
    if not paths:
        raise ImageError(f"{given}: expected a shard or a glob of shards, found no such file; check the path")
    return paths


def _members(shard: Path) -> list[_Member]:
    """The photos of a shard, in its order. Reads the headers, seeks over everything else."""
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
            f"{shard}: expected photos (members named KEY.jpg, .jpeg, .png or .webp, no dot in KEY), found none; "
            "check the shard"
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


# ---- timm's data sets


@dataclass(frozen=True, slots=True)
class _TimmSample(Sample):
    """One photo of a data set that timm opens."""

    of: _TimmSet
    index: int

    def __str__(self) -> str:
        return f"{self.of.given}[{self.index}]"

    @property
    def name(self) -> str:
        """The data set's, and which."""
        return f"{self.of.name}[{self.index}]"

    @property
    def place(self) -> str:
        """The data set, then which."""
        return f"{self.of.given}@{self.index:015d}"

    @property
    def label(self) -> int | None:
        """The data set's own index of the class."""
        return self.of.label(self.index)

    def content(self, max_bytes: int) -> bytes | Image.Image:
        """What the data set stores: a file, or pixels that only it can decode."""
        try:
            data = self.of.content(self.index, max_bytes + 1)
        except PatchLifeError:
            raise
        except Exception as error:  # whatever the data set's library raises
            raise ImageError(
                f"{self}: expected a photo, found {error or type(error).__name__}; check the set"
            ) from error
        if isinstance(data, bytes) and len(data) > max_bytes:
            raise ImageError(f"{self}: expected at most {max_bytes:,} bytes, found more; shrink the photo")
        return data


class _TimmSet:
    """A data set that timm opens.

    timm's own readers are asked for the undecoded file, so that it meets the limits of all photos, and so that a bad
    one is named: the data set around them would put the next one in its place.
    """

    def __init__(self, given: str) -> None:
        self.given = given
        self.name, split, root = [*given.removeprefix(_TIMM).split(":", 2), "", ""][:3]
        self._data = _created(given, self.name, split or "train", root or None)
        self._reader = getattr(self._data, "reader", None)
        self._lock = threading.Lock()  # readers may share one file handle among all threads

    def __len__(self) -> int:
        return len(self._data)

    def content(self, index: int, most: int) -> bytes | Image.Image:
        """The file's first ``most`` bytes, or the decoded picture."""
        if self._reader is None:
            return self._data[index][0]
        with self._lock, closing(self._reader[index][0]) as stream:
            return stream.read(most)

    def label(self, index: int) -> int | None:
        """The class, without decoding the photo where the data set allows that."""
        targets = getattr(self._data, "targets", None)
        if isinstance(targets, Sequence) and len(targets) == len(self):
            target = targets[index]
        elif self._reader is None:
            target = self._data[index][1]
        else:
            with self._lock:
                stream, target = self._reader[index][:2]
                stream.close()
        return None if target is None or int(target) < 0 else int(target)


def _timm_samples(given: str) -> list[_TimmSample]:
    data = _TimmSet(given)
    if not len(data):
        raise ImageError(f"{given}: expected photos, found an empty data set; check its split and root")
    return [_TimmSample(data, index) for index in range(len(data))]


def _created(given: str, name: str, split: str, root: str | None) -> Any:
    """The data set; never downloaded by timm, no code of its own run."""
    if name.partition("/")[0].lower() in ("wds", "hfids", "tfds"):
        raise ConfigError(
            f"{given}: expected a data set with an order to draw from, got a stream; for wds/ give the shards "
            "themselves (*.tar), for hfids/ take hfds/, others can be written to shards"
        )
    from timm.data import create_dataset

    try:
        return create_dataset(name, root=root, split=split, download=False)
    except Exception as error:  # its library's own; a missing one says how to install itself
        raise ConfigError(
            f"{given}: expected timm:NAME[:SPLIT[:ROOT]], a data set that timm opens, got "
            f"{type(error).__name__}: {error}; check name, split and root"
        ) from error
