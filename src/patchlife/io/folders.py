"""Atomic writing of folders: they are complete or absent. A list of checksums in each verifies them."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

from ..errors import PatchLifeError
from .files import sha256_of, sync_folder, temporary_path
from .locks import lock

__all__ = ["SUMS", "check_sums", "read_consistently", "recover", "remove_leftovers", "replace_folder"]

T = TypeVar("T")

SUMS = "SHA256SUMS"
"""Name of a folder's list of checksums, in the format of `sha256sum -c`."""

_OLD_SUFFIX = ".old"
_LEFTOVER = re.compile(r"\.(.+)\.[0-9a-f]{32}(?:\.old)?")  # names from `temporary_path`
_ATTEMPTS = 100
_STALE_AFTER = 24 * 3600.0  # seconds after which a leftover cannot belong to a running writer
_LOCK_TIMEOUT = 10.0  # seconds to wait for a running `remove_leftovers`, which takes less


@contextmanager
def replace_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder to fill. When the block ends without error, the folder replaces ``path``, with checksums.

    If the block raises or the disk is full, ``path`` stays unchanged. If the process is killed, ``path`` is the old
    folder or the new one. If several processes write, the folder of the last one remains, complete.
    """
    path = Path(os.path.realpath(path))  # a link is kept; the folder that it points to is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    with lock(path.parent, exclusive=False, wait=_LOCK_TIMEOUT):
        new = temporary_path(path)
        new.mkdir()
        try:
            yield new
            files = sorted(p for p in new.iterdir() if p.is_file())
            (new / SUMS).write_text("".join(f"{sha256_of(p)}  {p.name}\n" for p in files))
            for file in [*files, new / SUMS]:
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
            sync_folder(new)
            _move_into_place(new, path)
            sync_folder(path.parent)
        finally:  # removes an unfinished new folder, or the replaced old one
            shutil.rmtree(new, ignore_errors=True)


def remove_leftovers(folder: str | os.PathLike[str], name: str = "") -> None:
    """Remove temporary folders that killed writers left in ``folder``, of paths whose names begin with ``name``.

    Nothing is removed while a `replace_folder` runs in ``folder``. On disks without locks, only leftovers older than a
    day are removed. Paths that need it are recovered first (see `recover`).
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    leftovers = [
        entry
        for entry in folder.iterdir()
        if (match := _LEFTOVER.fullmatch(entry.name)) and match[1].startswith(name[:100])
    ]
    if not any(entry.is_dir() for entry in leftovers):
        return
    with lock(folder, exclusive=True) as has_lock:
        for entry in [entry for entry in leftovers if has_lock or _is_stale(entry)]:
            path = entry.with_name(entry.name.removesuffix(_OLD_SUFFIX)[1:-33])
            recover(path)
            if entry.is_dir() and (path.exists() or not entry.name.endswith(_OLD_SUFFIX)):
                shutil.rmtree(entry, ignore_errors=True)


def _is_stale(entry: Path) -> bool:
    try:
        return time.time() - entry.stat().st_mtime > _STALE_AFTER
    except OSError:  # removed by its writer
        return False


def recover(path: str | os.PathLike[str]) -> None:
    """Restore a folder that is missing because its writer was killed in `_replace_by_two_renames`."""
    path = Path(os.path.realpath(path))
    if path.exists() or not path.parent.is_dir():
        return
    candidates = [entry for entry in path.parent.iterdir() if entry.name.startswith(f".{path.name[:100]}.")]
    old = [entry for entry in candidates if _LEFTOVER.fullmatch(entry.name) and entry.name.endswith(_OLD_SUFFIX)]
    if old:
        with suppress(OSError):  # another process removed or restored one, or the folder is read-only
            os.rename(max(old, key=lambda entry: entry.stat().st_mtime), path)


def read_consistently(folder: str | os.PathLike[str], read: Callable[[], T]) -> T:
    """The result of ``read()``, which reads files of ``folder``. Reads again if ``folder`` is replaced meanwhile."""
    for _ in range(_ATTEMPTS):
        recover(folder)
        before = _version_of(folder)
        try:
            result = read()
        except Exception:
            if _version_of(folder) == before:
                raise
            continue
        if _version_of(folder) == before:
            return result
    return read()


def _version_of(folder: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """Numbers that differ between two folders that have the same path at different times; None if it is missing."""
    try:
        stat = os.stat(folder)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns  # inode numbers are reused


def check_sums(folder: str | os.PathLike[str], error: type[PatchLifeError]) -> dict[str, Path]:
    """Paths of the files in the checksum list of ``folder``, by name, after verifying each checksum.

    Raises ``error`` if the list or a file is missing, or a checksum differs.
    """
    folder = Path(folder)
    recover(folder)
    if not (folder / SUMS).is_file():
        raise error(f"{folder} has no {SUMS}, so it is not a complete folder of patchlife; save or download it again")
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


# ---- renaming


def _move_into_place(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``. A folder that is at ``path`` gets the name ``new``."""
    for _ in range(_ATTEMPTS):
        with suppress(FileNotFoundError):  # another writer renamed it in the meantime: try again
            if path.is_dir() and any(path.iterdir()):
                if _swapped(new, path) or _replace_by_two_renames(new, path):
                    return
                continue
            with suppress(OSError):  # an empty folder
                os.rmdir(path)
            if _renamed_if_free(new, path):
                return
    raise OSError(errno.EBUSY, "other processes keep replacing this folder", str(path))


def _replace_by_two_renames(new: Path, path: Path) -> bool:
    """Replace ``path`` on systems that cannot swap names. After a kill between the renames, `recover` restores it."""
    old = new.with_name(new.name + _OLD_SUFFIX)
    os.rename(path, old)
    try:
        done = _renamed_if_free(new, path)
    except BaseException:
        recover(path)
        raise
    if done:
        os.rename(old, new)
    else:  # another writer was faster: ``path`` is newer than ``old``
        shutil.rmtree(old, ignore_errors=True)
    return done


def _renamed_if_free(new: Path, path: Path) -> bool:
    """Rename a folder; False if ``path`` is a folder that is not empty."""
    try:
        os.rename(new, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _swapped(one: Path, other: Path) -> bool:
    """Swap the names of two folders atomically; False if the system or the file system cannot."""
    swap = _swap_call()
    if swap is None:
        return False
    if swap(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


@cache
def _swap_call() -> Callable[[bytes, bytes], int] | None:
    """The system call that swaps two names; it returns 0 on success. None if the system has no such call."""
    if sys.platform not in ("linux", "darwin"):
        return None
    libc, here, flag = ctypes.CDLL(None, use_errno=True), -100, 2  # AT_FDCWD; RENAME_EXCHANGE and RENAME_SWAP
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        return lambda one, other: libc.renameat2(here, one, here, other, flag)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        return lambda one, other: libc.renamex_np(one, other, flag)
    return None
