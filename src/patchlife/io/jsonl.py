"""JSON lines that a run may be interrupted in, at any byte, and continue later."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import ConfigError

__all__ = ["encode", "recover"]

Record = dict[str, Any]


def encode(record: Record) -> str:
    """One line. ASCII only, so that any path survives on any system."""
    return json.dumps(record) + "\n"


def recover(path: Path, key: str) -> list[Record]:
    """Cut off the half-written last line of an interrupted file; returns the records before it.

    What is no file yet, or never will be (a device), counts as an empty one.

    Raises ConfigError, and changes nothing, when a line is no record that begins with ``key``.
    """
    content = path.read_bytes() if path.is_file() else b""  # reading a device may never end
    *lines, rest = content.split(b"\n")
    records = [_decoded(line, path, number, key) for number, line in enumerate(lines, 1)]
    beginning = f'{{"{key}": '.encode()
    if rest[: len(beginning)] != beginning[: len(rest)]:
        raise _alien(path, len(lines) + 1, key)
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
    raise _alien(path, number, key)


def _alien(path: Path, number: int, key: str) -> ConfigError:
    return ConfigError(
        f"line {number} of {path} is no record that begins with {key!r}, so this is another kind of file; it "
        "was left alone, choose a new one"
    )
