"""Find photos: folders, globs and single files become one list in an order that never varies."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import ImageError

__all__ = ["PHOTO_SUFFIXES", "Labelled", "list_labelled", "list_photos"]

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""What counts as a photo inside a folder, in any case. A file named on its own may have any suffix."""

AnyPath = str | os.PathLike[str]


class Labelled(NamedTuple):
    """Photos with their classes.

    Attributes:
        paths: the photos, class after class.
        labels: for each photo, the index of its class in ``classes``.
        classes: the names of the class folders, sorted.
    """

    paths: list[Path]
    labels: list[int]
    classes: list[str]


def list_photos(paths: AnyPath | Iterable[AnyPath]) -> list[Path]:
    """List the photos that some paths stand for: in the order of the arguments, sorted inside each.

    A folder stands for every photo in it and in its subfolders, a glob for all that it matches, a file for
    itself. Hidden files and folders are passed over; a photo reached twice is listed once.

    Args:
        paths: one path, or several.

    Raises:
        ImageError: a path that does not exist, a folder or glob without photos, a folder that cannot be read.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not given:
        raise ImageError("expected at least one photo, folder or glob, found an empty list; name one")
    unique: dict[str, Path] = {}
    for path in given:
        for photo in _photos_of(path):
            unique.setdefault(os.path.abspath(photo), photo)
    return list(unique.values())


def list_labelled(folder: AnyPath) -> Labelled:
    """List a folder that holds one subfolder of photos per class, as torchvision's ``ImageFolder`` reads it.

    Args:
        folder: the parent folder. Photos that lie directly in it have no class and are passed over.

    Raises:
        ImageError: no such folder, no class folders in it, a class without photos.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        found = "a file" if os.path.exists(folder) else "no such folder"
        raise ImageError(f"{folder}: expected a folder of class folders, found {found}; check the path")
    names = (entry.name for entry in _scan(folder) if entry.is_dir() and not entry.name.startswith("."))
    classes = sorted(names)
    if not classes:
        raise ImageError(
            f"{folder}: expected one subfolder of photos per class, found no subfolder; "
            "to list unlabelled photos use list_photos"
        )
    photos = [_photos_of(folder / name) for name in classes]
    labels = [label for label, of_class in enumerate(photos) for _ in of_class]
    return Labelled([photo for of_class in photos for photo in of_class], labels, classes)


def _photos_of(path: AnyPath) -> list[Path]:
    """The photos that one argument stands for; never empty."""
    path = Path(path)
    if os.path.isdir(path):
        photos = sorted(_walk(path, set()))
        found = f"none in this folder (looked for {', '.join(PHOTO_SUFFIXES)})"
    elif os.path.exists(path):
        return [path]
    elif glob.has_magic(os.fspath(path)):
        photos = _matches(path)
        found = "nothing that matches this glob"
    else:
        raise ImageError(f"{path}: expected a photo, folder or glob, found no such file; check the path")
    if not photos:
        raise ImageError(f"{path}: expected photos, found {found}; check the path")
    return photos


def _matches(pattern: Path) -> list[Path]:
    """What a glob matches, folders opened. A broad one (``*``) may match notes and logs: those stay out."""
    matches = [Path(match) for match in sorted(glob.glob(os.fspath(pattern), recursive=True))]
    opened = (_walk(match, set()) if os.path.isdir(match) else [match] for match in matches)
    return sorted({photo for group in opened for photo in group if _is_photo(photo.name)})


def _walk(folder: Path, entered: set[str]) -> Iterator[Path]:
    """Every photo under a folder. Links to folders are followed, but no folder is entered twice."""
    real = os.path.realpath(folder)
    if real in entered:
        return
    entered.add(real)
    for entry in _scan(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(folder / entry.name, entered)
        elif _is_photo(entry.name):
            yield folder / entry.name


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    """A folder's entries by name, so that walks and what they skip are the same on every machine."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ImageError(
            f"{folder}: expected a folder that can be read, found {error.strerror}; check its permissions"
        ) from error


def _is_photo(name: str) -> bool:
    return name.lower().endswith(PHOTO_SUFFIXES) and not name.startswith(".")
