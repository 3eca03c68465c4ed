"""List photos from files, addresses, tables of paths, shards, and data sets that timm opens."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, ImageError, PatchLifeError
from .addresses import is_address, photos_at
from .listing import list_photos
from .path_tables import is_path_table, photos_in_tables
from .reading import Sample
from .shards import is_shard, list_shards, members

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["list_samples"]

_TIMM = "timm:"


def list_samples(data: Iterable[str], left_out: set[Path] | None = None) -> list[Path | Sample]:
    """List all photos of ``data``: files first, then addresses, tables, members of shards, samples of data sets.

    Args:
        data: photos, folders and globs as for `list_photos`, or at addresses of fsspec (``s3://bucket/photos``);
            Parquet tables with the paths or addresses of photos in the column ``path`` (``*.parquet``); shards
            (``*.tar``, or a glob that ends so), whose members are ``key.jpg`` (or another photo suffix) and, for
            labels, ``key.cls`` or ``key.json``; data sets of timm as ``timm:NAME[:SPLIT[:ROOT]]``.
        left_out: if given, files in folders and globs that are not photos by their suffix are added to this set.

    Raises:
        ImageError: a path does not exist or has no photos, or a shard or table cannot be read to its end.
        ConfigError: timm cannot open a data set, or the data set has no random access.
        MissingExtraError: a table is given, and pyarrow is not installed.
    """
    by_kind: dict[str, list[str]] = {"file": [], "address": [], "table": [], "shard": [], "timm": []}
    for argument in dict.fromkeys(map(str, data)):
        by_kind[_kind(argument)].append(argument)
    files = by_kind["file"]
    photos: list[Path | Sample] = list(list_photos(files, left_out)) if files or not any(by_kind.values()) else []
    more: list[Path | Sample] = [photo for argument in by_kind["address"] for photo in photos_at(argument, left_out)]
    more += [photo for argument in by_kind["table"] for photo in photos_in_tables(argument)]
    if more:
        photos = list(dict.fromkeys(photos + more))
    for shard in dict.fromkeys(shard for argument in by_kind["shard"] for shard in list_shards(argument)):
        photos += members(shard)
    for argument in by_kind["timm"]:
        photos += _timm_samples(argument)
    return photos


def _kind(argument: str) -> str:
    if argument.startswith(_TIMM):
        return "timm"
    if is_shard(argument):
        return "shard"
    if is_path_table(argument):
        return "table"
    return "address" if is_address(argument) else "file"


@dataclass(frozen=True, slots=True)
class _TimmSample(Sample):
    """A photo of a data set that timm opens."""

    data_set: _TimmDataSet
    index: int

    def __str__(self) -> str:
        return f"{self.data_set.argument}[{self.index}]"

    @property
    def name(self) -> str:
        """The name of the data set, then the index."""
        return f"{self.data_set.name}[{self.index}]"

    @property
    def place(self) -> str:
        """The data set, then the index."""
        return f"{self.data_set.argument}@{self.index:015d}"

    @property
    def label(self) -> int | str | None:
        """The class name if the classes are folders, else the class index of the data set."""
        return self.data_set.label(self.index)

    def content(self, max_bytes: int) -> bytes | Image.Image:
        """The bytes of the stored file, or a picture if only the data set can decode it."""
        try:
            data = self.data_set.content(self.index, max_bytes + 1)
        except PatchLifeError:
            raise
        except Exception as error:  # the library of the data set may raise any exception
            raise ImageError(
                f"{self}: expected a photo, found {error or type(error).__name__}; check the data set"
            ) from error
        if isinstance(data, bytes) and len(data) > max_bytes:
            raise ImageError(f"{self}: expected at most {max_bytes:,} bytes, found more; save it as a smaller file")
        return data


class _TimmDataSet:
    """A data set that timm opens.

    The undecoded file comes from timm's reader, not from timm's data set, for two reasons: the limits of `read_photo`
    apply, and a damaged photo gives an error, where the data set would return the next photo instead.
    """

    def __init__(self, argument: str) -> None:
        self.argument = argument
        self.name, split, root = [*argument.removeprefix(_TIMM).split(":", 2), "", ""][:3]
        self._data = _create(argument, self.name, split or "train", root or None)
        self._reader = getattr(self._data, "reader", None)
        folder_reader = self._reader or (self._data if self.name == "torch/folder" else None)
        self._names = {index: name for name, index in (getattr(folder_reader, "class_to_idx", None) or {}).items()}
        self._lock = threading.Lock()  # a reader may share one file handle among all threads

    def __reduce__(self) -> tuple[Any, ...]:
        """It is opened again in another process; once in each, although every photo names it."""
        return _timm_data_set, (self.argument,)

    def __len__(self) -> int:
        return len(self._data)

    def content(self, index: int, max_bytes: int) -> bytes | Image.Image:
        """The first ``max_bytes`` bytes of the file, or the decoded picture."""
        if self._reader is None:
            return self._data[index][0]
        with self._lock, closing(self._reader[index][0]) as stream:
            return stream.read(max_bytes)

    def label(self, index: int) -> int | str | None:
        """The class name if the classes are folders, else the class index; avoids decoding the photo if possible."""
        targets = getattr(self._data, "targets", None)
        if isinstance(targets, Sequence) and len(targets) == len(self):
            target = targets[index]
        elif self._reader is None:
            target = self._data[index][1]
        else:
            with self._lock:
                stream, target = self._reader[index][:2]
                stream.close()
        return None if target is None or int(target) < 0 else self._names.get(int(target), int(target))


@cache
def _timm_data_set(argument: str) -> _TimmDataSet:
    return _TimmDataSet(argument)


def _timm_samples(argument: str) -> list[_TimmSample]:
    data_set = _TimmDataSet(argument)
    if not len(data_set):
        raise ImageError(f"{argument}: expected photos, found an empty data set; check its split and root")
    return [_TimmSample(data_set, index) for index in range(len(data_set))]


def _create(argument: str, name: str, split: str, root: str | None) -> Any:
    """Create timm's data set, without a download."""
    if name.partition("/")[0].lower() in ("wds", "hfids", "tfds"):
        raise ConfigError(
            f"{argument}: expected a data set with random access, got a stream; instead of wds/ give the shards "
            "(*.tar), instead of hfids/ use hfds/, or convert the data set to shards"
        )
    from timm.data import create_dataset

    try:
        return create_dataset(name, root=root, split=split, download=False)
    except Exception as error:  # the library of the data set may raise any exception
        raise ConfigError(
            f"{argument}: expected timm:NAME[:SPLIT[:ROOT]], a data set that timm opens, got "
            f"{type(error).__name__}: {error}; check name, split and root"
        ) from error
