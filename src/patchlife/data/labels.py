"""Class names (of ImageNet, of a model, or from a file), and the class index of a photo from its folder or label."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..config import ClassOrder
from ..errors import ConfigError

__all__ = ["Labels", "folder_labels", "imagenet_labels", "named_labels", "numbered_labels", "read_labels"]

_SAME_NAMES = 0.7  # of the names must be ImageNet's at their places; lists of its names differ in single names


@dataclass(frozen=True)
class Labels:
    """The names of a classifier's classes.

    Names are compared in Unicode's composed form (NFC), because file systems and editors may store an accent as a
    separate character.

    Attributes:
        names: one for each class, in the order of the logits.
        ids: WordNet ids in the same order, if the classes are those of ImageNet.
    """

    names: tuple[str, ...]
    ids: tuple[str, ...] = ()

    @property
    def numbered(self) -> bool:
        """Whether the names are only the class numbers."""
        return self.names == tuple(map(str, range(len(self.names))))

    def classes_of(self, photos: Iterable[Path], order: ClassOrder | None = None) -> list[int]:
        """The class index of each photo, from the name of its folder.

        Args:
            photos: all photos of the data set, because imagefolder needs the complete list of folders.
            order: how folder names are read. None: as a class name or WordNet id, or as a class number if the classes
                have no names. number: as a class number, even if the classes have names. imagefolder: folders are
                sorted by name as text and numbered in this order, as torchvision's ``ImageFolder`` does.

        Raises:
            ConfigError: a folder that is not a class of the model.
        """
        folders = [_folder(photo) for photo in photos]
        class_of_folder = self._classes_of_folders(set(folders), order)
        return [class_of_folder[folder] for folder in folders]

    def describe_folders(self, photos: Iterable[Path], order: ClassOrder | None = None) -> str:
        """One sentence on how `classes_of` reads folder names, and how ImageFolder reads them if that differs."""
        folders = {_folder(photo) for photo in photos}
        if order == "imagefolder":
            first = ", ".join(f"{name} is class {i}" for i, name in enumerate(sorted(folders)[:3]))
            return f"folders are numbered as in torchvision's ImageFolder, sorted by name as text: {first}, ..."
        if not self.numbered and order is None:
            return "folders are read as class names" + (" or WordNet ids" if self.ids else "")
        text = "folders are read as class numbers"
        if order is None and (difference := self._difference_to_imagefolder(folders)):
            name, index = difference
            text += (
                f": {name} is class {int(name)}. torchvision's ImageFolder sorts folders by name as text, where {name} "
                f"is class {index}; if the model was trained with that order, give --class-order imagefolder"
            )
        return text

    def class_of_label(self, label: str | int | None, photo: object) -> int:
        """The class index of a label: a class name, a WordNet id, or a number (also as text); -1 for None.

        Args:
            label: the label.
            photo: what the error message calls the photo.

        Raises:
            ConfigError: the label is not a class of the model.
        """
        if label is None:
            return -1
        index = self._class_named(label) if isinstance(label, str) else label
        if index is None:
            index = _number(str(label))
        if index is None or not 0 <= index < len(self.names):
            raise ConfigError(
                f"{photo} has the label {label!r}, which is not a class of this model; {self._first_classes()}: "
                "correct the label, or give the class names with --labels FILE"
            )
        return index

    def classes_of_texts(self, texts: Mapping[str, str], order: ClassOrder | None = None) -> dict[str, int]:
        """The class index of each label of a data set.

        Args:
            texts: where each label is, for error messages.
            order: how labels are read. None: as a class name or WordNet id, or else as a class number. number: as a
                class number. imagefolder: labels are sorted as text and numbered in this order.

        Raises:
            ConfigError: a label that is not a class of the model.
        """
        if order == "imagefolder":
            self._check_one_for_each_class(set(texts), "label")
            return {text: index for index, text in enumerate(sorted(texts))}
        by_number = self if order is None else numbered_labels(len(self.names))
        return {text: by_number.class_of_label(text, where) for text, where in texts.items()}

    def _classes_of_folders(self, folders: set[str], order: ClassOrder | None) -> Mapping[str, int]:
        if order == "imagefolder":
            self._check_one_for_each_class(folders, "folder")
            return {folder: index for index, folder in enumerate(sorted(folders))}
        by_number = order == "number" or self.numbered
        indices = {folder: _number(folder) if by_number else self._class_named(folder) for folder in folders}
        valid = {folder: index for folder, index in indices.items() if index is not None and index < len(self.names)}
        if unknown := sorted(folders - valid.keys()):
            raise ConfigError(self._unknown_folders_message(unknown, by_number))
        return valid

    def _check_one_for_each_class(self, names: set[str], what: str) -> None:
        if len(names) != len(self.names):
            raise ConfigError(
                f"--class-order imagefolder needs one {what} for each of the {len(self.names)} classes, got "
                f"{len(names)} {what}s ({_shortened(sorted(names))}); give all {what}s, or give the class names "
                "with --labels FILE"
            )

    def _unknown_folders_message(self, folders: list[str], by_number: bool) -> str:
        others = f" (also not: {_shortened(folders[1:])})" if folders[1:] else ""
        text = f"folder {folders[0]} is not a class of this model{others}"
        if by_number:
            return (
                f"{text}, whose classes are the numbers 0 to {len(self.names) - 1}; give the class names with --labels "
                "FILE, or give --class-order imagefolder if the model was trained on these folders sorted by name"
            )
        numbers = all(_number(folder) is not None for folder in folders)
        hint = ", or give --class-order number if the folders are named by class number" if numbers else ""
        return f"{text}; {self._first_classes()}: rename the folders, or give the class names with --labels FILE{hint}"

    def _first_classes(self) -> str:
        """The range of class numbers and the first three names, for error messages."""
        first = ", ".join((self.ids or self.names)[:3])
        numbers = f"its classes are 0 to {len(self.names) - 1}"
        return numbers if self.numbered else f"{numbers}, with the names {first}, ..."

    def _difference_to_imagefolder(self, folders: set[str]) -> tuple[str, int] | None:
        """(folder, class index in ImageFolder) of a folder whose number is another class; None if there is none."""
        by_text = sorted(folders if len(folders) == len(self.names) else self.names)
        return next(((name, i) for i, name in enumerate(by_text) if name in folders and _number(name) != i), None)

    def _class_named(self, name: str) -> int | None:
        """The class with this name or id, None if there is none. Raises ConfigError if several classes share it."""
        indices = self._indices_by_name.get(_composed(name), [])
        if len(indices) > 1:
            raise ConfigError(
                f"{name} is the name of classes {', '.join(map(str, indices))} of this model; give unique class names "
                "with --labels FILE, or name the folders by class number and give --class-order number"
            )
        return indices[0] if indices else None

    @cached_property
    def _indices_by_name(self) -> dict[str, list[int]]:
        indices: dict[str, list[int]] = {}
        for names in (self.names, self.ids):
            for index, name in enumerate(names):
                indices.setdefault(_composed(name), []).append(index)
        return indices


def imagenet_labels() -> Labels:
    """The classes of ImageNet-1k. A name that two classes share is followed by its WordNet id: "crane (n02012849)"."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    ids = tuple(info.label_names())
    names = [description.partition(",")[0] for description in info.label_descriptions()]
    unique = [f"{name} ({i})" if names.count(name) > 1 else name for name, i in zip(names, ids, strict=True)]
    return Labels(tuple(unique), ids)


def named_labels(names: tuple[str, ...]) -> Labels:
    """Labels of these names; with WordNet ids if they are those of ImageNet's classes, in ImageNet's order.

    A name may be one of several synonyms, separated by commas, as in models of transformers ("tench, Tinca tinca").
    """
    imagenet = imagenet_labels()
    pairs = list(zip(names, imagenet.names, strict=False))
    same = sum(bool(_synonyms(own) & _synonyms(other)) for own, other in pairs)
    is_imagenet = len(names) == len(imagenet.names) and same >= _SAME_NAMES * len(names)
    return Labels(names, imagenet.ids if is_imagenet else ())


def _synonyms(name: str) -> set[str]:
    return {part.strip().casefold() for part in name.split(",")}


def numbered_labels(classes: int) -> Labels:
    """Labels of classes without names: "0", "1", ..."""
    return Labels(tuple(str(index) for index in range(classes)))


def folder_labels(photos: Iterable[Path]) -> Labels:
    """The folders of ``photos`` as classes, for a model that has none itself."""
    return Labels(tuple(sorted({_composed(_folder(photo)) for photo in photos})))


def read_labels(path: Path, classes: int) -> Labels:
    """Read class names from a UTF-8 text file with one name per line.

    A byte order mark and empty lines are ignored.

    Args:
        path: the text file.
        classes: how many names are expected.

    Raises:
        ConfigError: the file cannot be read, lists a name twice, or has another number of names.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a UTF-8 text file with one class name per line, got: {error}") from None
    lines_of_name: dict[str, list[int]] = {}
    for number, line in enumerate(lines, 1):
        if name := line.strip():
            lines_of_name.setdefault(_composed(name), []).append(number)
    for name, numbers in lines_of_name.items():
        if len(numbers) > 1:
            raise ConfigError(
                f"{path} lists {name!r} in lines {' and '.join(map(str, numbers))}; give each class a unique name"
            )
    if len(lines_of_name) != classes:
        raise ConfigError(
            f"{path} has {len(lines_of_name)} class names, but the model has {classes} classes; write one name per line"
        )
    return Labels(tuple(line.strip() for line in lines if line.strip()))


def _folder(photo: Path) -> str:
    return photo.absolute().parent.name


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _number(text: str) -> int | None:
    """The text as a number (leading zeros are allowed), None if it is not a decimal number."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None


def _shortened(names: list[str], most: int = 4) -> str:
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])
