"""Files that are either whole or not there, and the sum that tells whether they still are."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import PatchLifeError

__all__ = ["PACKAGE", "SUMS", "check_sums", "is_exported", "replace_folder", "sha256_of", "write_atomic"]

SUMS = "SHA256SUMS"
"""A folder's list of checksums, as `sha256sum -c` reads it."""

PACKAGE = "package.json"
"""The file that makes a folder a package of exported graphs."""


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write a file so that a crash, at any moment, leaves the old content or the new one, never a mixture.

    Args:
        path: the file; its folder must exist.
        data: bytes, or text to be stored as UTF-8.

    Returns:
        The path.
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    temporary = _beside(path)
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
    _sync_folder(path.parent)
    return path


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replace_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty folder to fill; when the block ends well it takes the place of ``path``, checksums included.

    If the block raises, or the disk fills, ``path`` stays what it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = _beside(path), _beside(path)
    fresh.mkdir()
    try:
        yield fresh
        files = sorted(p for p in fresh.iterdir() if p.is_file())
        (fresh / SUMS).write_text("".join(f"{sha256_of(p)}  {p.name}\n" for p in files))
        for file in [*files, fresh / SUMS]:
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        _sync_folder(fresh)
        if path.exists():
            os.rename(path, old)
        os.rename(fresh, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    _sync_folder(path.parent)


def check_sums(folder: str | os.PathLike[str], error: type[PatchLifeError]) -> dict[str, Path]:
    """The files that ``folder``'s checksum list names, each verified.

    Raises ``error`` when the list is missing, a file is missing, or a single byte differs.
    """
    folder = Path(folder)
    if not (folder / SUMS).is_file():
        raise error(f"{folder} has no {SUMS}, so it is not a complete patchlife folder; save or download it again")
    files = {}
    for line in (folder / SUMS).read_text(errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise error(f"{folder} lacks {name!r}, which its {SUMS} lists; save or download it again")
        if sha256_of(file) != digest:
            raise error(f"{file} is damaged: its sha256 is not the one in {SUMS}; save or download it again")
        files[name] = file
    return files


def is_exported(model: str | os.PathLike[str]) -> bool:
    """Whether what a user calls MODEL is an exported file or package, rather than a name or an adapter's folder."""
    return Path(model).is_file() or (Path(model) / PACKAGE).is_file()


def _beside(path: Path) -> Path:
    """A name that nothing has, in the same folder (so that renaming stays within one disk)."""
    return path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}")


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself durable, where the system lets a folder be opened."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
