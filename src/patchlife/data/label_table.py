"""Labels of photos from a CSV file with the columns ``path`` and ``label``."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import ConfigError

__all__ = ["LabelRow", "read_label_table", "separated"]


class LabelRow(NamedTuple):
    """A row of the file.

    Attributes:
        path: as written.
        label: as written, without spaces at both ends.
        where: the file and the line, for error messages.
    """

    path: str
    label: str
    where: str


def read_label_table(file: Path, photos: Sequence[Path]) -> list[LabelRow]:
    """The row of each photo.

    A path is relative to the folder of ``file``, or else to the working folder. A file name alone also stands for the
    photo of this name in any folder, if there is only one. Rows of other photos are ignored.

    Args:
        file: a UTF-8 CSV file with a header; columns besides ``path`` and ``label`` are ignored.
        photos: all photos of the data set.

    Raises:
        ConfigError: the file is not of this format, lists a photo twice, or has no row for a photo.
    """
    rows = list(_rows(file))
    tables = [_by_path(rows, file.parent), {os.path.abspath(row.path): row for row in rows}]
    names = _by_name(rows)
    counts = Counter(photo.name for photo in photos)
    found, missing = [], []
    for photo in photos:
        path = os.path.abspath(photo)
        row = next((table[path] for table in tables if path in table), None) or names.get(photo.name)
        if row is None:
            missing.append(photo)
            continue
        if row.path == photo.name and counts[photo.name] > 1 and all(path not in table for table in tables):
            raise ConfigError(
                f"{row.where}: {row.path} is the name of {counts[photo.name]} photos, among them {photo}; give their "
                "paths, relative to the folder of the file"
            )
        found.append(row)
    if missing:
        raise ConfigError(
            f"{file} has no row for {len(missing)} of the {len(photos)} photos (the first: {missing[0]}); add rows, "
            "with paths relative to the folder of the file or to the working folder"
        )
    return found


def separated(label: str) -> list[str]:
    """The labels in a text that separates them by ``;`` or ``|``; none in an empty text."""
    return [part.strip() for part in re.split(r"[;|]", label) if part.strip()]


def _rows(file: Path) -> Iterator[LabelRow]:
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            if not {"path", "label"} <= set(reader.fieldnames or ()):
                got = ", ".join(reader.fieldnames or ()) or "an empty file"
                raise ConfigError(f"{file}: expected a CSV file with the header path,label, got {got[:200]}")
            for row in reader:
                where = f"{file}, line {reader.line_num}"
                if row["path"] is None or row["label"] is None or not row["path"].strip():
                    raise ConfigError(
                        f"{where}: expected a path and a label, got {','.join(filter(None, _texts(row)))}"
                    )
                yield LabelRow(row["path"].strip(), row["label"].strip(), where)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{file}: expected a UTF-8 CSV file with the header path,label, got: {error}") from None


def _texts(row: dict[str, str | None]) -> list[str]:
    return [value for value in row.values() if isinstance(value, str)]


def _by_path(rows: Sequence[LabelRow], folder: Path) -> dict[str, LabelRow]:
    """The rows by absolute path. Raises ConfigError if two rows have the same path."""
    table: dict[str, LabelRow] = {}
    for row in rows:
        earlier = table.setdefault(os.path.abspath(folder / row.path), row)
        if earlier is not row:
            line = earlier.where.rpartition(" ")[2]
            raise ConfigError(f"{row.where}: {row.path} is the photo of line {line}, too; give each photo one row")
    return table


def _by_name(rows: Sequence[LabelRow]) -> dict[str, LabelRow]:
    """The rows whose path is a file name alone."""
    return {row.path: row for row in rows if Path(row.path).name == row.path}
