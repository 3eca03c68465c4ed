"""Where photos come from: files, shards, and the data sets that timm opens."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, ImageError, PatchLifeError
from .listing import list_photos
from .reading import Sample
from .shards import is_shard, list_shards, members

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["list_samples"]

_TIMM = "timm:"


def list_samples(data: Iterable[str], left_out: set[Path] | None = None) -> list[Path | Sample]:
    """List the photos that DATA stands for: files first, then those in shards, then those of data sets.

    Args:
        data: photos, folders and globs as `list_photos` takes them; shards (``*.tar``, or a glob that ends so), whose
            members are ``key.jpg`` (or another suffix of photos) and, for labels, ``key.cls`` or ``key.json``; data
            sets of timm as ``timm:NAME[:SPLIT[:ROOT]]``.
        left_out: a set to add the files to that folders and globs hold beside photos.

    Raises:
        ImageError: nothing where something is named, or no photo in it; a shard that cannot be read to its end.
        ConfigError: a data set that timm cannot open, or that has no order to draw from.
    """
    data = [str(given) for given in data]
    sets = [given for given in data if given.startswith(_TIMM)]
    shards = [given for given in data if is_shard(given) and given not in sets]
    files = [given for given in data if given not in shards and given not in sets]
    found: list[Path | Sample] = list(list_photos(files, left_out)) if files or not data else []
    for shard in dict.fromkeys(shard for given in shards for shard in list_shards(given)):
        found += members(shard)
    for given in dict.fromkeys(sets):
        found += _timm_samples(given)
    return found


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
    def label(self) -> int | str | None:
        """The name of the class where classes are folders, else the data set's own index of it."""
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
            raise ImageError(f"{self}: expected at most {max_bytes:,} bytes, found more; save it as a smaller file")
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
        of_folders = self._reader or (self._data if self.name == "torch/folder" else None)
        self._names = {index: name for name, index in (getattr(of_folders, "class_to_idx", None) or {}).items()}
        self._lock = threading.Lock()  # readers may share one file handle among all threads

    def __len__(self) -> int:
        return len(self._data)

    def content(self, index: int, most: int) -> bytes | Image.Image:
        """The file's first ``most`` bytes, or the decoded picture."""
        if self._reader is None:
            return self._data[index][0]
        with self._lock, closing(self._reader[index][0]) as stream:
            return stream.read(most)

    def label(self, index: int) -> int | str | None:
        """The class, by its name where classes are folders, without decoding the photo where the set allows that."""
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
