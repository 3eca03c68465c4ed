"""Files that are either whole or absent: temporary name, fsync, rename, fsync of the parent."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .errors import PatchLifeError

__all__ = ["SUMS", "check_sums", "replace_folder", "sha256_of", "write_atomic"]

SUMS = "SHA256SUMS"


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file's content, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write ``data`` so that ``path`` holds the old content or the new, never a part of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    return path


@contextmanager
def replace_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty folder to fill; when the block ends well it takes the place of ``path``, checksums included.

    If the block raises, or the disk fills, ``path`` stays what it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield fresh
        files = sorted(p for p in fresh.iterdir() if p.is_file())
        (fresh / SUMS).write_text("".join(f"{sha256_of(p)}  {p.name}\n" for p in files))
        for file in [*files, fresh / SUMS]:
            _sync_file(file)
        os.chmod(fresh, 0o777 & ~_umask())
        _sync_folder(fresh)
        _swap(fresh, path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    _sync_folder(path.parent)


def check_sums(folder: str | os.PathLike[str], error: type[PatchLifeError]) -> Mapping[str, Path]:
    """The files that ``folder``'s checksum list names, each verified.

    Raises ``error`` when the list is missing, a file is missing, or a single byte differs.
    """
    folder = Path(folder)
    sums = folder / SUMS
    if not sums.is_file():
        raise error(
            f"{folder} has no {SUMS}, so it is not a complete patchlife folder; save or download it again"
        )
    files = {}
    for line in sums.read_text().splitlines():
        digest, _, name = line.partition("  ")
        file = folder / name
        if not file.is_file() or Path(name).name != name:
            raise error(f"{folder} lacks {name}, which its {SUMS} lists; save or download it again")
        if sha256_of(file) != digest:
            raise error(f"{file} is damaged: its sha256 is not the one in {SUMS}; save or download it again")
        files[name] = file
    return files


def _swap(fresh: Path, path: Path) -> None:
    """Rename ``fresh`` to ``path``; what stood there is moved aside first and removed last."""
    if not path.exists():
        os.rename(fresh, path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    os.rename(path, aside / "was")
    try:
        os.rename(fresh, path)
    except BaseException:
        os.rename(aside / "was", path)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
