"""Atomic writing of files: after a crash at any moment they hold the old content or the new content. Checksums."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replace_file", "sha256_of", "sync_folder", "temporary_path", "write_atomic"]


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write a file atomically: after a crash at any moment it holds the old content or the new content.

    Args:
        path: the file; its folder must exist.
        data: bytes, or text that is encoded as UTF-8.

    Returns:
        The path.
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    temporary = temporary_path(path)
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.chmod(temporary, path.stat().st_mode & 0o777)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return path


@contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path to write a file to. When the block ends without error, that file replaces ``path``.

    For files that are written in parts, by one process at a time. After a crash at any moment ``path`` holds the old
    content or the new content.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")  # a fixed name: the next attempt replaces a leftover
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def temporary_path(path: Path) -> Path:
    """An unused path in the same folder, so that renaming stays within one file system."""
    return path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}")


def sync_folder(folder: Path) -> None:
    """Flush the renaming to disk, on systems that can open a folder."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
