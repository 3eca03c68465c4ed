"""Find photos: folders, globs and single files become one list in an order that never varies."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import ImageError

__all__ = ["PHOTO_SUFFIXES", "Labelled", "by_suffix", "list_labelled", "list_photos"]

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".apng", ".webp")
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


def list_photos(paths: AnyPath | Iterable[AnyPath], left_out: set[Path] | None = None) -> list[Path]:
    """List the photos that some paths stand for: in the order of the arguments, sorted inside each.

    A folder stands for every photo in it and in its subfolders, a glob for all that it matches, a file for
    itself. Hidden files and folders are passed over; a photo reached twice is listed once.

    Args:
        paths: one path, or several.
        left_out: a set to add the files to that folders and globs hold beside photos; hidden ones do not count.

    Raises:
        ImageError: a path that does not exist, a folder or glob without photos, a folder that cannot be read.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not given:
        raise ImageError("expected at least one photo, folder or glob, found an empty list; name one")
    unique: dict[str, Path] = {}
    others: set[Path] = set()
    for path in given:
        for photo in _photos_of(path, others):
            unique.setdefault(os.path.abspath(photo), photo)
    if left_out is not None:
        left_out |= {path for path in others if str(path) not in unique}  # which may be named beside their folder
    return list(unique.values())


def by_suffix(files: Iterable[Path], most: int = 5) -> str:
    """How many files there are of each suffix, for people: ".heic (12), .txt (1), no suffix (1)"."""
    counted = Counter(file.suffix.lower() or "no suffix" for file in files)
    shown = [f"{suffix} ({count})" for suffix, count in sorted(counted.items(), key=lambda item: (-item[1], item[0]))]
    rest = len(shown) - most
    return ", ".join([*shown[:most], *([f"{rest} other suffixes"] if rest > 0 else [])])


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


def _photos_of(path: AnyPath, left_out: set[Path] | None = None) -> list[Path]:
    """The photos that one argument stands for; never empty. Other files are added to ``left_out``."""
    path, others = Path(path), set[Path]()
    if os.path.isdir(path):
        photos = sorted(_photos_in(_walk(path, set()), others))
        found = f"none in this folder (looked for {', '.join(PHOTO_SUFFIXES)})"
    elif os.path.exists(path):
        return [path]
    elif glob.has_magic(os.fspath(path)):
        photos = sorted(set(_photos_in(_matches(path), others)))
        found = "nothing that matches this glob" if not others else f"none (looked for {', '.join(PHOTO_SUFFIXES)})"
    else:
        raise ImageError(f"{path}: expected a photo, folder or glob, found no such file; check the path")
    if not photos:
        found += f" but files with the suffixes {by_suffix(others)}" if others else ""
        raise ImageError(f"{path}: expected photos, found {found}; check the path")
    if left_out is not None:
        left_out |= others
    return photos


def _photos_in(files: Iterable[Path], left_out: set[Path]) -> Iterator[Path]:
    """Those files that are photos by their suffix; the others are added to ``left_out``, as absolute paths."""
    for file in files:
        if file.name.lower().endswith(PHOTO_SUFFIXES):
            yield file
        else:
            left_out.add(Path(os.path.abspath(file)))


def _matches(pattern: Path) -> Iterator[Path]:
    """Every file that a glob matches, folders opened; hidden ones are passed over."""
    for match in map(Path, sorted(glob.glob(os.fspath(pattern), recursive=True))):
        if os.path.isdir(match):
            yield from _walk(match, set())
        elif not match.name.startswith("."):
            yield match


def _walk(folder: Path, entered: set[str]) -> Iterator[Path]:
    """Every file under a folder but hidden ones. Links to folders are followed, but no folder is entered twice."""
    real = os.path.realpath(folder)
    if real in entered:
        return
    entered.add(real)
    for entry in _scan(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(folder / entry.name, entered)
        else:
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
