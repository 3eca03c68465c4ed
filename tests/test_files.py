from __future__ import annotations

import hashlib
import os

import pytest

from patchlife.files import sha256_of, write_atomic


def test_bytes_and_text(tmp_path):
    path = tmp_path / "a.bin"
    assert write_atomic(path, b"\0\1") == path
    assert path.read_bytes() == b"\0\1"
    write_atomic(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_a_failure_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / "a.txt", "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_permissions_are_those_of_a_plain_file(tmp_path):
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    plain.touch()
    write_atomic(ours, b"")
    assert ours.stat().st_mode == plain.stat().st_mode
    ours.chmod(0o600)
    write_atomic(ours, b"again")
    assert ours.stat().st_mode & 0o777 == 0o600


def test_sha256(tmp_path):
    path = write_atomic(tmp_path / "a", b"x" * 300_000)
    assert sha256_of(path) == hashlib.sha256(b"x" * 300_000).hexdigest()
