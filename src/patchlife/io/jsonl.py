"""JSON lines files that an interrupted run can continue, even if the last line is incomplete."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import ConfigError

__all__ = ["encode", "recover"]

Record = dict[str, Any]


def encode(record: Record) -> str:
    """A record as one line of JSON, in ASCII, so that any path can be read back on any system."""
    return json.dumps(record) + "\n"


def recover(path: Path, key: str) -> list[Record]:
    """Cut off the incomplete last line of an interrupted file. Returns the records before it.

    A missing file or a device counts as an empty file.

    Raises ConfigError, and changes nothing, if a line is not a record that begins with ``key``.
    """
    content = path.read_bytes() if path.is_file() else b""  # reading a device may never end
    *lines, rest = content.split(b"\n")
    records = [_decoded(line, path, number, key) for number, line in enumerate(lines, 1)]
    start = f'{{"{key}": '.encode()
    if rest[: len(start)] != start[: len(rest)]:
        raise _not_a_record(path, len(lines) + 1, key)
    if rest:
        os.truncate(path, len(content) - len(rest))
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
