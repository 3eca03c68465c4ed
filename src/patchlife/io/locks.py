"""Locks between processes, on files and folders. They end with their process at the latest."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["lock", "locked"]


@contextmanager
def locked(file: str | os.PathLike[str]) -> Iterator[None]:
    """Context that only one process at a time enters; others wait. ``file`` is created as the lock and stays.

    On systems without file locks, the context does not exclude other processes.
    """
    Path(file).touch()
    with lock(Path(file), exclusive=True, wait=float("inf")):
        yield


@contextmanager
def lock(path: Path, exclusive: bool, wait: float = 0.0) -> Iterator[bool]:
    """Hold a lock on a file or folder; yields whether it was acquired. The lock ends with the process at the latest.

    ``wait``: seconds to wait for other processes that hold the lock.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # the system cannot open folders
        yield False
        return
    try:
        yield _acquire(handle, exclusive, wait)
    finally:
        os.close(handle)


def _acquire(handle: int, exclusive: bool, wait: float) -> bool:
    try:
        import fcntl
    except ImportError:  # the system has no such locks
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
        except OSError:  # the file system has no locks
            return False
