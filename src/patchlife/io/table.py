"""What a file of records is that is written at once: a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Table"]

Record = dict[str, Any]


def _only(path: Path) -> list[Path]:
    return [path]


@dataclass(frozen=True)
class Table:
    """A kind of file that is written at once, from records that are read one at a time.

    Attributes:
        write: takes the path, a function that gives the records from the first one on, and the number of records.
        read: from the path to the records. Raises ConfigError for another kind of file.
        files: from the path to all files of the table, the path among them.
    """

    write: Callable[[Path, Callable[[], Iterator[Record]], int], None]
    read: Callable[[Path], Iterator[Record]]
    files: Callable[[Path], list[Path]] = _only  # by name: tables are sent to other processes
