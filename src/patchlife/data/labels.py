"""Names of classes: ImageNet's, a model's own, or those in a file; and the class that a photo's folder means."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..config import ClassOrder
from ..errors import ConfigError

__all__ = ["Labels", "imagenet_labels", "numbered_labels", "read_labels"]


@dataclass(frozen=True)
class Labels:
    """What the classifier's answers are called.

    Names are compared in Unicode's composed form (NFC): an accent may be a character of its own or not, as file
    systems and editors write it.

    Attributes:
        names: for people, in the order of the classifier.
        ids: WordNet ids in the same order, if the classes are ImageNet's.
    """

    names: tuple[str, ...]
    ids: tuple[str, ...] = ()

    @property
    def numbered(self) -> bool:
        """The classes have no names, only numbers."""
        return self.names == tuple(map(str, range(len(self.names))))

    def classes_of(self, photos: Iterable[Path], order: ClassOrder | None = None) -> list[int]:
        """The class of each photo, by the folder that it lies in.

        Args:
            photos: all of them at once: imagefolder counts their folders.
            order: None takes a folder's name for a class's name, its WordNet id, or its number where classes have no
                names; number takes it for a number, also where they have names; imagefolder gives the classes to the
                folders in the order of their names as text, as torchvision's ``ImageFolder`` does.

        Raises:
            ConfigError: a folder that is not a class of the model.
        """
        folders = [_folder(photo) for photo in photos]
        meant = self._classes_of_folders(set(folders), order)
        return [meant[folder] for folder in folders]

    def reading(self, photos: Iterable[Path], order: ClassOrder | None = None) -> str:
        """How `classes_of` reads the folders, for people; with the other reading where it is as likely."""
        folders = {_folder(photo) for photo in photos}
        if order == "imagefolder":
            first = ", ".join(f"{name} is class {i}" for i, name in enumerate(sorted(folders)[:3]))
            return f"folders are read as ImageFolder reads them, in the order of their names as text: {first}, ..."
        if not self.numbered and order is None:
            return "folders are read as class names" + (" or WordNet ids" if self.ids else "")
        text = "folders are read as class numbers"
        if order is None and (other := self._read_otherwise(folders)):
            name, index = other
            text += (
                f": {name} is class {int(name)}. torchvision's ImageFolder takes folders in the order of their names "
                f"as text, where {name} is class {index}: if the model was trained that way, give --class-order "
                "imagefolder"
            )
        return text

    def class_said(self, label: str | int | None, whose: object) -> int:
        """The class that a label means: a name, a WordNet id, or a number (also as text); -1 for None.

        Raises ConfigError, naming ``whose`` label it is, when it is not a class of the model.
        """
        if label is None:
            return -1
        index = self._named(label) if isinstance(label, str) else label
        if index is None:
            index = _number(str(label))
        if index is None or not 0 <= index < len(self.names):
            raise ConfigError(
                f"{whose} is labelled {label!r}, which is not a class of this model; {self._classes_shown()}: correct "
                "the label, or name the classes with --labels FILE"
            )
        return index

    def _classes_of_folders(self, folders: set[str], order: ClassOrder | None) -> Mapping[str, int]:
        if order == "imagefolder":
            self._check_folder_for_each_class(folders)
            return {folder: index for index, folder in enumerate(sorted(folders))}
        by_number = order == "number" or self.numbered
        found = {folder: _number(folder) if by_number else self._named(folder) for folder in folders}
        meant = {folder: index for folder, index in found.items() if index is not None and index < len(self.names)}
        if unknown := sorted(folders - meant.keys()):
            raise ConfigError(self._unknown(unknown, by_number))
        return meant

    def _check_folder_for_each_class(self, folders: set[str]) -> None:
        if len(folders) != len(self.names):
            raise ConfigError(
                f"--class-order imagefolder gives class after class to the folders in the order of their names, so it "
                f"takes {len(self.names)} folders of photos, got {len(folders)} ({_listed(sorted(folders))}); give all "
                "of them, or name the classes with --labels FILE"
            )

    def _unknown(self, folders: list[str], by_number: bool) -> str:
        """What is wrong with folders that are not classes."""
        others = f" (also not: {_listed(folders[1:])})" if folders[1:] else ""
        text = f"folder {folders[0]} is not a class of this model{others}"
        if by_number:
            return (
                f"{text}, whose classes are numbers, 0 to {len(self.names) - 1}; name the classes with --labels FILE, "
                "or give --class-order imagefolder if the model was trained on these folders in the order of their "
                "names"
            )
        numbers = all(_number(folder) is not None for folder in folders)
        other = ", or give --class-order number if the folders are called after class numbers" if numbers else ""
        return f"{text}; {self._classes_shown()}: rename the folders, or name the classes with --labels FILE{other}"

    def _classes_shown(self) -> str:
        shown = ", ".join((self.ids or self.names)[:3])
        return f"its classes are 0 to {len(self.names) - 1}" + ("" if self.numbered else f", also as {shown}, ...")

    def _read_otherwise(self, folders: set[str]) -> tuple[str, int] | None:
        """A folder that ImageFolder takes for another class than its number, and that class; None if there is none."""
        by_text = sorted(folders if len(folders) == len(self.names) else self.names)
        return next(((name, i) for i, name in enumerate(by_text) if name in folders and _number(name) != i), None)

    def _named(self, name: str) -> int | None:
        """The class of this name or id, None if there is none. Raises ConfigError if several classes share it."""
        found = self._known.get(_composed(name), [])
        if len(found) > 1:
            raise ConfigError(
                f"{name} is the name of classes {', '.join(map(str, found))} of this model; give the classes names of "
                "their own with --labels FILE, or name folders after class numbers and give --class-order number"
            )
        return found[0] if found else None

    @cached_property
    def _known(self) -> dict[str, list[int]]:
        known: dict[str, list[int]] = {}
        for names in (self.names, self.ids):
            for index, name in enumerate(names):
                known.setdefault(_composed(name), []).append(index)
        return known


def imagenet_labels() -> Labels:
    """ImageNet-1k's classes. A name that two of them share gets its WordNet id: "crane (n02012849)"."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    ids = tuple(info.label_names())
    names = [description.partition(",")[0] for description in info.label_descriptions()]
    unique = [f"{name} ({i})" if names.count(name) > 1 else name for name, i in zip(names, ids, strict=True)]
    return Labels(tuple(unique), ids)


def numbered_labels(classes: int) -> Labels:
    """Classes that nobody named."""
    return Labels(tuple(str(index) for index in range(classes)))


def read_labels(path: Path, classes: int) -> Labels:
    """Names from a text file in UTF-8 (a byte order mark is passed over), one a line; empty lines do not count.

    Raises ConfigError when there is no such file, it lists a name twice, or does not name every class.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no text file of class names in UTF-8: {error}") from None
    places: dict[str, list[int]] = {}
    for number, line in enumerate(lines, 1):
        if name := line.strip():
            places.setdefault(_composed(name), []).append(number)
    for name, numbers in places.items():
        if len(numbers) > 1:
            raise ConfigError(
                f"{path} lists {name!r} in lines {' and '.join(map(str, numbers))}; give each class a name of its own"
            )
    if len(places) != classes:
        raise ConfigError(f"{path} names {len(places)} classes, the model has {classes}; give one name a line")
    return Labels(tuple(line.strip() for line in lines if line.strip()))


def _folder(photo: Path) -> str:
    return photo.absolute().parent.name


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _number(text: str) -> int | None:
    """The number that a text is, zeros in front of it allowed; None if it is none."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None


def _listed(names: list[str], most: int = 4) -> str:
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])
