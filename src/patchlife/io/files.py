"""Files that are either whole or not there, and the sum that tells whether they still are."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

from ..errors import PatchLifeError

__all__ = [
    "BUNDLE",
    "SUMS",
    "check_sums",
    "is_exported",
    "locked",
    "recover",
    "replace_folder",
    "sha256_of",
    "steadily",
    "sweep",
    "write_atomic",
]

T = TypeVar("T")

SUMS = "SHA256SUMS"
"""A folder's list of checksums, as `sha256sum -c` reads it."""

BUNDLE = "bundle.json"
"""The file that makes a folder a package of exported graphs."""

_OLD = ".old"
_LEFT = re.compile(r"\.(.+)\.[0-9a-f]{32}(?:\.old)?")  # how `_beside` calls folders
_TRIES = 100
_STALE = 24 * 3600.0  # seconds after which no writer is still at it
_PATIENCE = 10.0  # seconds to wait for a `sweep`, which takes less


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

    If the block raises, or the disk fills, ``path`` stays what it was. Whenever the process is killed, ``path`` is the
    old folder or the new one. Of several writers the last one wins, with all of its files.
    """
    path = Path(os.path.realpath(path))  # a link stays one, and what it names is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    with _lock(path.parent, exclusive=False, wait=_PATIENCE):
        fresh = _beside(path)
        fresh.mkdir()
        try:
            yield fresh
            files = sorted(p for p in fresh.iterdir() if p.is_file())
            (fresh / SUMS).write_text("".join(f"{sha256_of(p)}  {p.name}\n" for p in files))
            for file in [*files, fresh / SUMS]:
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
            _sync_folder(fresh)
            _put(fresh, path)
            _sync_folder(path.parent)
        finally:  # what is unfinished, or what stood there before
            shutil.rmtree(fresh, ignore_errors=True)


def sweep(folder: str | os.PathLike[str], name: str = "") -> None:
    """Remove what killed writers left in ``folder`` of paths whose names begin with ``name``.

    Nothing is removed while any `replace_folder` is at work in ``folder``; where the disk knows no locks, only what is
    a day old. A path that is missing because its writer was killed between two steps comes back first (see `recover`).
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    left = [entry for entry in folder.iterdir() if (of := _LEFT.fullmatch(entry.name)) and of[1].startswith(name[:100])]
    if not any(entry.is_dir() for entry in left):
        return
    with _lock(folder, exclusive=True) as alone:
        for entry in [entry for entry in left if alone or _is_stale(entry)]:
            path = entry.with_name(entry.name.removesuffix(_OLD)[1:-33])
            recover(path)
            if entry.is_dir() and (path.exists() or not entry.name.endswith(_OLD)):
                shutil.rmtree(entry, ignore_errors=True)


def _is_stale(entry: Path) -> bool:
    try:
        return time.time() - entry.stat().st_mtime > _STALE
    except OSError:  # its writer is done
        return False


def recover(path: str | os.PathLike[str]) -> None:
    """Put a folder back that is missing because its writer was killed between two steps (`_put_in_two_steps`)."""
    path = Path(os.path.realpath(path))
    if path.exists() or not path.parent.is_dir():
        return
    beside = [entry for entry in path.parent.iterdir() if entry.name.startswith(f".{path.name[:100]}.")]
    old = [entry for entry in beside if _LEFT.fullmatch(entry.name) and entry.name.endswith(_OLD)]
    for entry in sorted(old, key=lambda entry: entry.stat().st_mtime)[-1:]:
        with suppress(OSError):  # another process was first, or nothing may be written here
            os.rename(entry, path)


def steadily(folder: str | os.PathLike[str], read: Callable[[], T]) -> T:
    """What ``read`` gets from the files of ``folder``, all of one version: again if it was replaced meanwhile."""
    for _ in range(_TRIES):
        recover(folder)
        before = _which(folder)
        try:
            result = read()
        except Exception:
            if _which(folder) == before:
                raise
            continue
        if _which(folder) == before:
            return result
    return read()


@contextmanager
def locked(file: str | os.PathLike[str]) -> Iterator[None]:
    """Let one process at a time into the block, the others wait; ``file`` is made for that, and stays.

    Where the system has no such locks, all of them may enter.
    """
    Path(file).touch()
    with _lock(Path(file), exclusive=True, wait=float("inf")):
        yield


def check_sums(folder: str | os.PathLike[str], error: type[PatchLifeError]) -> dict[str, Path]:
    """The files that ``folder``'s checksum list names, each verified.

    Raises ``error`` when the list is missing, a file is missing, or a single byte differs.
    """
    folder = Path(folder)
    recover(folder)
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
    return Path(model).is_file() or (Path(model) / BUNDLE).is_file()


def _put(fresh: Path, path: Path) -> None:
    """Give ``fresh`` the name ``path``. What had it is then called ``fresh``."""
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):  # another writer moved what stood there just now: look again
            if path.is_dir() and any(path.iterdir()):
                if _exchanged(fresh, path) or _put_in_two_steps(fresh, path):
                    return
                continue
            with suppress(OSError):  # an empty folder
                os.rmdir(path)
            if _moved(fresh, path):
                return
    raise OSError(errno.EBUSY, "other processes replace this folder all the time", str(path))


def _put_in_two_steps(fresh: Path, path: Path) -> bool:
    """Where two names cannot be exchanged. If the process is killed in between, `recover` puts the old one back."""
    old = fresh.with_name(fresh.name + _OLD)
    os.rename(path, old)
    try:
        done = _moved(fresh, path)
    except BaseException:
        recover(path)
        raise
    if done:
        os.rename(old, fresh)
    else:  # another writer was faster: its folder is newer than the old one
        shutil.rmtree(old, ignore_errors=True)
    return done


def _moved(fresh: Path, path: Path) -> bool:
    """Rename a folder, unless another one that is not empty has the name."""
    try:
        os.rename(fresh, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the disk's format cannot."""
    exchange = _exchange()
    if exchange is None:
        return False
    if exchange(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


@cache
def _exchange() -> Callable[[bytes, bytes], int] | None:
    """The system's own call, 0 on success."""
    if sys.platform not in ("linux", "darwin"):
        return None
    libc, here, flag = ctypes.CDLL(None, use_errno=True), -100, 2  # AT_FDCWD; RENAME_EXCHANGE and RENAME_SWAP
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        return lambda one, other: libc.renameat2(here, one, here, other, flag)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        return lambda one, other: libc.renamex_np(one, other, flag)
    return None


@contextmanager
def _lock(path: Path, exclusive: bool, wait: float = 0.0) -> Iterator[bool]:
    """Hold a lock on a file or folder that ends with the process, however it ends; yields whether we have it.

    Another process that has it is waited for, up to ``wait`` seconds.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # a system that opens no folders
        yield False
        return
    try:
        yield _acquired(handle, exclusive, wait)
    finally:
        os.close(handle)


def _acquired(handle: int, exclusive: bool, wait: float) -> bool:
    try:
        import fcntl
    except ImportError:  # a system without
        return False
    until = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_NB | (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH))
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.02)
        except OSError:  # a disk without
            return False


def _which(folder: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """What tells a folder from another one of the same name."""
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns  # numbers of removed folders come again


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
