from __future__ import annotations

import hashlib
import os
import threading
import time

import pytest

from patchlife.io.files import sha256_of, write_atomic
from patchlife.io.locks import locked


def test_bytes_and_text_are_written(tmp_path):
    path = tmp_path / "a.bin"
    assert write_atomic(path, b"\0\1") == path
    assert path.read_bytes() == b"\0\1"
    write_atomic(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_a_failure_leaves_the_old_file_and_no_temporary_files(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / "a.txt", "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    ordinary, written = tmp_path / "ordinary", tmp_path / "written"
    ordinary.touch()
    write_atomic(written, b"")
    assert written.stat().st_mode == ordinary.stat().st_mode
    written.chmod(0o600)
    write_atomic(written, b"again")
    assert written.stat().st_mode & 0o777 == 0o600


def test_sha256(tmp_path):
    path = write_atomic(tmp_path / "a", b"x" * 300_000)
    assert sha256_of(path) == hashlib.sha256(b"x" * 300_000).hexdigest()


def test_a_lock_admits_one_at_a_time(tmp_path):
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        with locked(tmp_path / "lock"):
            inside += 1
            most = max(most, inside)
            time.sleep(0.01)
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
