"""List the photos in folders, globs and single files, in an order that is the same on every machine."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import ImageError

__all__ = ["PHOTO_SUFFIXES", "by_suffix", "list_photos"]

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".apng", ".webp")
"""Suffixes of photos inside a folder, in upper or lower case. A file that is given itself may have any suffix."""

AnyPath = str | os.PathLike[str]


def list_photos(paths: AnyPath | Iterable[AnyPath], left_out: set[Path] | None = None) -> list[Path]:
    """List the photos of files, folders and globs, in the order of the arguments and sorted within each argument.

    A folder includes its subfolders. Hidden files and folders are skipped. A photo found twice is listed once.

    Args:
        paths: one path or several.
        left_out: if given, files in folders and globs that are not photos by their suffix are added to this set;
            hidden files are not.

    Raises:
        ImageError: a path does not exist, a folder or glob has no photos, or a folder cannot be read.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not given:
        raise ImageError("expected at least one photo, folder or glob, got an empty list; give one")
    unique: dict[str, Path] = {}
    others: set[Path] = set()
    for path in given:
        for photo in _photos_of(path, others):
            unique.setdefault(os.path.abspath(photo), photo)
    if left_out is not None:
        # a file of any suffix counts as a photo if it is given itself, next to its folder
        left_out |= {path for path in others if str(path) not in unique}
    return list(unique.values())


def by_suffix(files: Iterable[Path], most: int = 5) -> str:
    """The number of files with each suffix, as text: ".heic (12), .txt (1), no suffix (1)"."""
    counted = Counter(file.suffix.lower() or "no suffix" for file in files)
    shown = [f"{suffix} ({count})" for suffix, count in sorted(counted.items(), key=lambda item: (-item[1], item[0]))]
    rest = len(shown) - most
    return ", ".join([*shown[:most], *([f"{rest} other suffixes"] if rest > 0 else [])])


def _photos_of(path: AnyPath, left_out: set[Path] | None = None) -> list[Path]:
    """The photos of one argument, never empty. Files that are not photos are added to ``left_out``."""
    path, others = Path(path), set[Path]()
    if os.path.isdir(path):
        photos = sorted(_photos_in(_walk(path, set()), others))
        found = f"none in this folder (looked for {', '.join(PHOTO_SUFFIXES)})"
    elif os.path.exists(path):
        return [path]
    elif glob.has_magic(os.fspath(path)):
        photos = sorted(set(_photos_in(_matches(path), others)))
        found = "no file that matches this glob" if not others else f"none (looked for {', '.join(PHOTO_SUFFIXES)})"
    else:
        raise ImageError(f"{path}: expected a photo, folder or glob, found no such file; check the path")
    if not photos:
        found += f" but files with the suffixes {by_suffix(others)}" if others else ""
        raise ImageError(f"{path}: expected photos, found {found}; check the path")
    if left_out is not None:
        left_out |= others
    return photos


def _photos_in(files: Iterable[Path], left_out: set[Path]) -> Iterator[Path]:
    """The files with a photo suffix; absolute paths of the others are added to ``left_out``."""
    for file in files:
        if file.name.lower().endswith(PHOTO_SUFFIXES):
            yield file
        else:
            left_out.add(Path(os.path.abspath(file)))


def _matches(pattern: Path) -> Iterator[Path]:
    """Every file that matches a glob or is inside a matching folder; hidden files are skipped."""
    for match in map(Path, sorted(glob.glob(os.fspath(pattern), recursive=True))):
        if os.path.isdir(match):
            yield from _walk(match, set())
        elif not match.name.startswith("."):
            yield match


def _walk(folder: Path, entered: set[str]) -> Iterator[Path]:
    """Every file under a folder, except hidden files. Links to folders are followed; no folder is entered twice."""
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
    """The entries of a folder, sorted by name, so that the order is the same on every machine."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ImageError(
            f"{folder}: expected a folder that can be read, found {error.strerror}; check its permissions"
        ) from error
