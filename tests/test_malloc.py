"""Freed memory is kept by the command line only, and never against the user's settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from patchlife import malloc

GLIBC = malloc._has_glibc()
needs_glibc = pytest.mark.skipif(not GLIBC, reason="needs glibc")

FAULTS = """
import resource, sys, torch
if sys.argv[1] == "keep":
    from patchlife.malloc import keep_freed_memory
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def call():
    torch.empty(10 * 2**20).fill_(1)  # 40 MiB, more than glibc's own largest threshold
start = peak()
for _ in range(20):  # glibc keeps several blocks of this size before it finds a kept one again
    call()
before = faults()
for _ in range(10):
    call()
print(faults() - before, peak() - start)
"""

CONDITIONS = """
import json, sys
from patchlife.cli.main import main
from patchlife import malloc
before = malloc.malloc_setting()
code = main(["predict", "no-such-model", sys.argv[1]])
heavy = "torch" in sys.modules
from patchlife.evaluation.timing import conditions
print(json.dumps([before, code, heavy, conditions()["malloc"]]))
"""

IMPORT = """
import sys
import patchlife, patchlife.malloc
print(patchlife.malloc.malloc_setting(), sorted({"torch", "numpy"} & sys.modules.keys()))
import patchlife.runtime, patchlife.slimming, patchlife.evaluation.timing
print(patchlife.malloc.malloc_setting())
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    """What a Python process prints, without the settings of this one."""
    own = (*malloc._OPTIONS, "GLIBC_TUNABLES", "LD_PRELOAD")
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True).stdout


@needs_glibc
def test_kept_memory_is_used_again_without_page_faults() -> None:
    (default, default_peak), (kept, kept_peak) = (map(float, run(FAULTS, how).split()) for how in ("default", "keep"))
    assert default > 10 * max(kept, 1)
    assert default_peak < 2 * 40
    assert kept_peak < 12 * 40, "MiB: the memory that is kept is bounded"


@needs_glibc
def test_the_command_line_keeps_freed_memory_and_conditions_say_so() -> None:
    before, code, heavy, after = json.loads(run(CONDITIONS, "/no/such/photo"))
    assert (before, code, heavy) == ("default", 2, False)
    assert after == "keeps freed memory"


def test_an_import_changes_nothing() -> None:
    assert run(IMPORT).splitlines() == ["default []", "default"]


@pytest.mark.parametrize(
    ("name", "value", "stated"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072", "MALLOC_TRIM_THRESHOLD_=131072"),
        ("MALLOC_MMAP_MAX_", "9", "MALLOC_MMAP_MAX_=9"),
        ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2:glibc.malloc.mmap_max=9", "glibc.malloc.mmap_max=9"),
    ],
)
def test_settings_of_the_user_are_left_alone_and_stated(name: str, value: str, stated: str) -> None:
    assert json.loads(run(CONDITIONS, "/no/such/photo", **{name: value}))[3] == stated


@needs_glibc
def test_other_settings_of_malloc_do_not_matter() -> None:
    assert json.loads(run(CONDITIONS, "/no/such/photo", MALLOC_ARENA_MAX="2"))[3] == "keeps freed memory"


def test_a_preloaded_malloc_is_left_alone_and_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(malloc, "_kept", False)
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libother.so /usr/lib/libjemalloc.so.2")
    assert not malloc.keep_freed_memory()
    assert malloc.malloc_setting() == "libjemalloc.so.2"


@pytest.mark.parametrize("missing", ["system", "confstr", "mallopt"])
def test_without_glibc_nothing_happens(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_name(name: str) -> str:
        raise ValueError("unrecognized configuration name")

    def no_library(name: None) -> None:
        raise OSError("dynamic loading not supported")

    for name in (*malloc._OPTIONS, "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(malloc, "_kept", False)
    if missing == "system":
        monkeypatch.setattr(malloc.sys, "platform", "darwin")
    elif missing == "confstr":
        monkeypatch.setattr(malloc.os, "confstr", no_such_name, raising=False)
    else:
        monkeypatch.setattr(malloc.ctypes, "CDLL", no_library)
    assert not malloc.keep_freed_memory()
    assert malloc.malloc_setting() == "default"


def test_a_smaller_threshold_is_used_if_the_largest_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Library:
        @staticmethod
        def mallopt(parameter: int, value: int) -> int:
            calls.append((parameter, value))
            return int(value <= 32 * 2**20)

    for name in (*malloc._OPTIONS, "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(malloc, "_kept", False)
    monkeypatch.setattr(malloc, "_has_glibc", lambda: True)
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: Library)
    assert malloc.keep_freed_memory()
    assert calls == [(-3, 2**31 - 1), (-3, 32 * 2**20), (-1, -1)]
    assert malloc.malloc_setting() == "keeps freed memory"
