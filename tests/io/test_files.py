from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from patchlife.errors import AdapterError
from patchlife.io import files
from patchlife.io.files import (
    SUMS,
    check_sums,
    locked,
    recover,
    replace_folder,
    sha256_of,
    steadily,
    sweep,
    write_atomic,
)

FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


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


# ---- folders


def put(path: Path, word: str, count: int = 3) -> None:
    """Replace ``path`` by a folder whose files all hold ``word``, under names that tell how many there are."""
    with replace_folder(path) as fresh:
        for index in range(count):
            (fresh / f"{index}of{count}").write_text(word)


def held(path: Path) -> str:
    """The word in all of its files; fails if the folder is not whole, or a mixture."""

    def read() -> set[str]:
        found = check_sums(path, AdapterError)
        assert {int(name.partition("of")[2]) for name in found} == {len(found)}
        return {file.read_text() for file in found.values()}

    (word,) = steadily(path, read)
    return word


@pytest.fixture(params=["exchange", "two steps"])
def way(request, monkeypatch) -> str:
    """How a folder takes the place of another one: on this system, and on one that can only rename."""
    if request.param == "two steps":
        monkeypatch.setattr(files, "_exchange", lambda: None)
    return request.param


def test_this_system_exchanges_folders():
    if os.uname().sysname == "Linux":
        assert files._exchange() is not None


def test_a_folder_is_replaced_whole(tmp_path, way):
    path = tmp_path / "a" / "b"
    for word in ("first", "second", "third"):
        put(path, word, len(word))
        assert held(path) == word
        assert [entry.name for entry in path.parent.iterdir()] == ["b"]
    (tmp_path / "empty").mkdir()
    put(tmp_path / "empty", "full")
    assert held(tmp_path / "empty") == "full"


def test_a_link_stays_one(tmp_path, way):
    put(tmp_path / "there", "old")
    (tmp_path / "link").symlink_to("there")
    put(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert held(tmp_path / "there") == held(tmp_path / "link") == "new"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "there"]


def test_an_error_leaves_the_old_folder(tmp_path, way):
    put(tmp_path / "a", "old")
    with pytest.raises(KeyError), replace_folder(tmp_path / "a"):
        raise KeyError
    with pytest.raises(NotADirectoryError), replace_folder(write_atomic(tmp_path / "file", "mine")):
        pass
    assert held(tmp_path / "a") == "old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "file"]


def killed(steps: dict[str, int], when: str, work: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run ``work`` in a process that is killed before or after the n-th call of a function; whether it was."""

    def deadly(function: Callable, at: int) -> Callable:
        calls = 0

        def call(*given, **named):
            nonlocal calls
            calls += 1
            if calls == at and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*given, **named)
            if calls == at and when == "after":
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    def run() -> None:
        for name, at in steps.items():
            owner, _, attribute = name.rpartition(".")
            owner = {"os": os, "shutil": files.shutil, "files": files}[owner]
            monkeypatch.setattr(owner, attribute, deadly(getattr(owner, attribute), at))
        work()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL


POINTS = {
    "exchange": ["os.fsync", "files._sync_folder", "files._put", "files._exchanged", "shutil.rmtree", "os.close"],
    "two steps": ["os.fsync", "files._put", "os.rename", "files._moved", "shutil.rmtree"],
}


@FORK
@pytest.mark.parametrize("when", ["before", "after"])
def test_kill_9_at_every_step_leaves_the_old_folder_or_the_new_one(tmp_path, way, when, monkeypatch):
    died = set()
    for point in POINTS[way]:
        for at in range(1, 6):
            path = tmp_path / f"{point}-{at}" / "adapter"
            put(path, "old", 2)
            if killed({point: at}, when, lambda path=path: put(path, "new", 3), monkeypatch):
                died.add(point)
            assert held(path) in ("old", "new")
            put(path, "newer", 4)
            assert held(path) == "newer"
            assert [entry.name for entry in path.parent.iterdir()] == ["adapter"], (point, at)
    assert died == set(POINTS[way])


@FORK
def test_exchanging_never_leaves_a_moment_without_the_folder(tmp_path, monkeypatch):
    """Without `recover`, as any other program sees it."""
    monkeypatch.setattr(files, "recover", lambda path: None)
    for point in POINTS["exchange"]:
        for at in range(1, 5):
            path = tmp_path / f"{point}-{at}" / "adapter"
            put(path, "old")
            killed({point: at}, "after", lambda path=path: put(path, "new"), monkeypatch)
            assert (path / SUMS).is_file()
            assert held(path) in ("old", "new")


@FORK
def test_a_reader_gets_back_what_a_kill_between_two_renames_took(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda: None)
    path = tmp_path / "adapter"
    put(path, "old")
    assert killed({"os.rename": 1}, "after", lambda: put(path, "new"), monkeypatch)
    assert not path.exists()
    recover(path)
    assert held(path) == "old"
    assert killed({"os.rename": 1}, "after", lambda: put(path, "new"), monkeypatch)
    sweep(tmp_path)
    assert held(path) == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def write_often(path: Path, word: str, count: int) -> None:
    for _ in range(25):
        put(path, word, count)


@FORK
def test_of_several_writers_the_last_one_wins_whole(tmp_path, way):
    path, context = tmp_path / "adapter", multiprocessing.get_context("fork")
    put(path, "first")
    writers = [context.Process(target=write_often, args=(path, f"word {count}", count)) for count in (1, 4, 9)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(held(path))
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert seen <= {"first", "word 1", "word 4", "word 9"}
    assert held(path) in seen | {"word 1", "word 4", "word 9"}
    put(path, "last")
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_a_living_writers_folder_is_not_swept(tmp_path, way):
    put(tmp_path / "step-1", "old")
    dead = tmp_path / f".step-9.{'0' * 32}"
    dead.mkdir()
    with replace_folder(tmp_path / "step-2") as fresh:
        (fresh / "0of1").write_text("new")
        sweep(tmp_path, "step-")
        put(tmp_path / "step-1", "other")
        assert fresh.is_dir()
        assert dead.is_dir()
    sweep(tmp_path, "step-")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-1", "step-2"]
    assert held(tmp_path / "step-2") == "new"


def test_without_locks_only_old_leftovers_are_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_acquired", lambda *given: False)
    new, old = (tmp_path / f".step-{n}.{str(n) * 32}" for n in (1, 2))
    for entry in (new, old):
        entry.mkdir()
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    put(tmp_path / "step-3", "new")
    sweep(tmp_path, "step-")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([new.name, "step-3"])


def test_only_leftovers_of_that_name_are_swept(tmp_path):
    ours, others = f".a.{'1' * 32}", [f".b.{'1' * 32}", ".a", ".a.txt", "a", f"a.{'1' * 32}"]
    for name in (ours, *others):
        (tmp_path / name).mkdir()
    write_atomic(tmp_path / f".a.{'2' * 32}", "a file")
    sweep(tmp_path, "a")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*others, f".a.{'2' * 32}"])
    sweep(tmp_path / "nowhere")


def test_a_long_name(tmp_path, way):
    path = tmp_path / ("long" * 50)
    for word in ("one", "two"):
        put(path, word)
    assert held(path) == "two"
    assert len(list(tmp_path.iterdir())) == 1


def test_one_at_a_time(tmp_path):
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


def test_what_is_read_is_of_one_version(tmp_path):
    path = tmp_path / "adapter"
    put(path, "old", 2)
    tries = []

    def read() -> list[str]:
        first = (path / "0of2").read_text() if (path / "0of2").exists() else (path / "0of3").read_text()
        tries.append(first)
        if len(tries) == 1:
            put(path, "new", 3)
        return [first, (path / "1of3").read_text()]

    assert steadily(path, read) == ["new", "new"]
    with pytest.raises(FileNotFoundError):
        steadily(path, lambda: (path / "none").read_text())
