"""JSON lines files that an interrupted run can continue, even if the last line is incomplete."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError

__all__ = ["encode", "printable", "read", "recover"]

Record = dict[str, Any]


def encode(record: Record) -> str:
    """A record as one line of JSON, in ASCII, so that any path can be read back on any system."""
    return json.dumps(record) + "\n"


def printable(path: str) -> str:
    """A path as text that UTF-8 can store: bytes of a file name that are not UTF-8 are written as ``\\xff``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read(path: Path) -> Iterator[Record]:
    """The records of a complete file, one at a time, so that a large file is never in memory."""
    with open(path, "rb") as file:
        for line in file:
            yield json.loads(line)


def recover(path: Path, key: str, without: str = "") -> list[Record]:
    """Cut off the incomplete last line of an interrupted file. Returns the records before it.

    A missing file or a device counts as an empty file.

    Args:
        path: the file.
        key: the first field of every record.
        without: a field that is left out of the returned records, for example because it is large.

    Raises ConfigError, and changes nothing, if a line is not a record that begins with ``key``.
    """
    records: list[Record] = []
    if not path.is_file():  # reading a device may never end
        return records
    complete, rest = 0, b""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                rest = line
                break
            record = _decoded(line, path, number, key)
            record.pop(without, None)
            records.append(record)
            complete += len(line)
    start = f'{{"{key}": '.encode()
    if rest[: len(start)] != start[: len(rest)]:
        raise _not_a_record(path, len(records) + 1, key)
    if rest:
        os.truncate(path, complete)
    return records


def _decoded(line: bytes, path: Path, number: int, key: str) -> Record:
    try:
        record = json.loads(line)
        if next(iter(record)) == key:
            return record
    except (ValueError, TypeError, StopIteration):
        pass
    raise _not_a_record(path, number, key)


def _not_a_record(path: Path, number: int, key: str) -> ConfigError:
    return ConfigError(
        f"line {number} of {path} is not a record that begins with {key!r}, so this is another kind of file; it "
        "was not changed, choose another file"
    )
