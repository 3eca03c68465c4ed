from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from patchlife.errors import AdapterError
from patchlife.io import folders, locks
from patchlife.io.files import write_atomic
from patchlife.io.folders import SUMS, check_sums, read_consistently, recover, remove_leftovers, replace_folder

FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


def write_folder(path: Path, word: str, count: int = 3) -> None:
    """Replace ``path`` by a folder of ``count`` files that hold ``word``. The file names contain the count."""
    with replace_folder(path) as new:
        for index in range(count):
            (new / f"{index}of{count}").write_text(word)


def word_in(path: Path) -> str:
    """The word that all files of a folder hold. Fails if the folder is incomplete or a mixture of two versions."""

    def read() -> set[str]:
        paths = check_sums(path, AdapterError)
        assert {int(name.partition("of")[2]) for name in paths} == {len(paths)}
        return {file.read_text() for file in paths.values()}

    (word,) = read_consistently(path, read)
    return word


@pytest.fixture(params=["swap", "two renames"])
def method(request, monkeypatch) -> str:
    """How a folder replaces another one: by the swap call of this system, or by two renames where it is missing."""
    if request.param == "two renames":
        monkeypatch.setattr(folders, "_swap_call", lambda: None)
    return request.param


def test_linux_has_a_swap_call():
    if os.uname().sysname == "Linux":
        assert folders._swap_call() is not None


def test_a_folder_is_replaced_completely(tmp_path, method):
    path = tmp_path / "a" / "b"
    for word in ("first", "second", "third"):
        write_folder(path, word, len(word))
        assert word_in(path) == word
        assert [entry.name for entry in path.parent.iterdir()] == ["b"]
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", "full")
    assert word_in(tmp_path / "empty") == "full"


def test_a_link_is_kept_and_its_folder_replaced(tmp_path, method):
    write_folder(tmp_path / "there", "old")
    (tmp_path / "link").symlink_to("there")
    write_folder(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert word_in(tmp_path / "there") == word_in(tmp_path / "link") == "new"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "there"]


def test_an_error_leaves_the_old_folder(tmp_path, method):
    write_folder(tmp_path / "a", "old")
    with pytest.raises(KeyError), replace_folder(tmp_path / "a"):
        raise KeyError
    with pytest.raises(NotADirectoryError), replace_folder(write_atomic(tmp_path / "file", "mine")):
        pass
    assert word_in(tmp_path / "a") == "old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "file"]


def killed(steps: dict[str, int], when: str, work: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run ``work`` in a process that is killed before or after the n-th call of a function. Returns whether it was."""

    def with_kill(function: Callable, at: int) -> Callable:
        calls = 0

        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == at and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if calls == at and when == "after":
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    def run() -> None:
        for name, at in steps.items():
            owner, _, attribute = name.rpartition(".")
            owner = {"os": os, "shutil": folders.shutil, "folders": folders}[owner]
            monkeypatch.setattr(owner, attribute, with_kill(getattr(owner, attribute), at))
        work()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL


POINTS = {
    "swap": [
        "os.fsync",
        "folders.sync_folder",
        "folders._move_into_place",
        "folders._swapped",
        "shutil.rmtree",
        "os.close",
    ],
    "two renames": ["os.fsync", "folders._move_into_place", "os.rename", "folders._renamed_if_free", "shutil.rmtree"],
}


@FORK
@pytest.mark.parametrize("when", ["before", "after"])
def test_kill_9_at_every_step_leaves_the_old_folder_or_the_new_one(tmp_path, method, when, monkeypatch):
    killed_at = set()
    for point in POINTS[method]:
        for at in range(1, 6):
            path = tmp_path / f"{point}-{at}" / "adapter"
            write_folder(path, "old", 2)
            if killed({point: at}, when, lambda path=path: write_folder(path, "new", 3), monkeypatch):
                killed_at.add(point)
            assert word_in(path) in ("old", "new")
            write_folder(path, "newer", 4)
            assert word_in(path) == "newer"
            assert [entry.name for entry in path.parent.iterdir()] == ["adapter"], (point, at)
    assert killed_at == set(POINTS[method])


@FORK
def test_with_the_swap_call_the_folder_is_never_missing(tmp_path, monkeypatch):
    """`recover` is switched off: other programs do not call it."""
    monkeypatch.setattr(folders, "recover", lambda path: None)
    for point in POINTS["swap"]:
        for at in range(1, 5):
            path = tmp_path / f"{point}-{at}" / "adapter"
            write_folder(path, "old")
            killed({point: at}, "after", lambda path=path: write_folder(path, "new"), monkeypatch)
            assert (path / SUMS).is_file()
            assert word_in(path) in ("old", "new")


@FORK
def test_a_folder_that_is_missing_after_a_kill_between_two_renames_is_restored(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_swap_call", lambda: None)
    path = tmp_path / "adapter"
    write_folder(path, "old")
    assert killed({"os.rename": 1}, "after", lambda: write_folder(path, "new"), monkeypatch)
    assert not path.exists()
    recover(path)
    assert word_in(path) == "old"
    assert killed({"os.rename": 1}, "after", lambda: write_folder(path, "new"), monkeypatch)
    remove_leftovers(tmp_path)
    assert word_in(path) == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def write_often(path: Path, word: str, count: int) -> None:
    for _ in range(25):
        write_folder(path, word, count)


@FORK
def test_of_several_writers_the_folder_of_the_last_one_remains(tmp_path, method):
    path, context = tmp_path / "adapter", multiprocessing.get_context("fork")
    write_folder(path, "first")
    writers = [context.Process(target=write_often, args=(path, f"word {count}", count)) for count in (1, 4, 9)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(word_in(path))
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert seen <= {"first", "word 1", "word 4", "word 9"}
    assert word_in(path) in seen | {"word 1", "word 4", "word 9"}
    write_folder(path, "last")
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_the_folder_of_a_running_writer_is_not_removed(tmp_path, method):
    write_folder(tmp_path / "step-1", "old")
    leftover = tmp_path / f".step-9.{'0' * 32}"
    leftover.mkdir()
    with replace_folder(tmp_path / "step-2") as new:
        (new / "0of1").write_text("new")
        remove_leftovers(tmp_path, "step-")
        write_folder(tmp_path / "step-1", "other")
        assert new.is_dir()
        assert leftover.is_dir()
    remove_leftovers(tmp_path, "step-")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-1", "step-2"]
    assert word_in(tmp_path / "step-2") == "new"


def test_without_locks_only_old_leftovers_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_acquire", lambda *args: False)
    new, old = (tmp_path / f".step-{n}.{str(n) * 32}" for n in (1, 2))
    for entry in (new, old):
        entry.mkdir()
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    write_folder(tmp_path / "step-3", "new")
    remove_leftovers(tmp_path, "step-")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([new.name, "step-3"])


def test_only_leftovers_of_the_given_name_are_removed(tmp_path):
    leftover, others = f".a.{'1' * 32}", [f".b.{'1' * 32}", ".a", ".a.txt", "a", f"a.{'1' * 32}"]
    for name in (leftover, *others):
        (tmp_path / name).mkdir()
    write_atomic(tmp_path / f".a.{'2' * 32}", "a file")
    remove_leftovers(tmp_path, "a")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*others, f".a.{'2' * 32}"])
    remove_leftovers(tmp_path / "nowhere")


def test_a_folder_with_a_long_name(tmp_path, method):
    path = tmp_path / ("long" * 50)
    for word in ("one", "two"):
        write_folder(path, word)
    assert word_in(path) == "two"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_reader_gets_files_of_one_version(tmp_path):
    path = tmp_path / "adapter"
    write_folder(path, "old", 2)
    tries = []

    def read() -> list[str]:
        first = (path / "0of2").read_text() if (path / "0of2").exists() else (path / "0of3").read_text()
        tries.append(first)
        if len(tries) == 1:
            write_folder(path, "new", 3)
        return [first, (path / "1of3").read_text()]

    assert read_consistently(path, read) == ["new", "new"]
    with pytest.raises(FileNotFoundError):
        read_consistently(path, lambda: (path / "none").read_text())
