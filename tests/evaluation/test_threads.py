"""The number of threads is chosen from times, and torch's own number is set again."""

from __future__ import annotations

import os

import pytest
import torch

import patchlife.evaluation.threads as threads
import patchlife.evaluation.timing as timing
from patchlife.errors import ConfigError
from patchlife.evaluation.threads import ThreadTimes, fastest_threads, thread_counts, threads_text, usable_cores
from patchlife.evaluation.timing import Spread, alternate, cpu_threads


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still; the functions under test add to its only value."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("cores", "counts"), [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (6, (1, 2, 4, 6)), (16, (1, 2, 4, 8, 16))]
)
def test_powers_of_two_and_all_cores_are_tried(cores: int, counts: tuple[int, ...]) -> None:
    assert thread_counts(cores) == counts


def test_no_cores_are_refused() -> None:
    with pytest.raises(ConfigError, match="cores must be at least 1, got 0"):
        thread_counts(0)


@pytest.mark.parametrize(("limit", "cores"), [("3", 3), ("3,2", 3), ("99", 8), ("", 8), ("0", 8), ("all", 8)])
def test_usable_cores_are_limited_by_affinity_and_by_the_environment(
    limit: str, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", limit)
    assert usable_cores() == cores


def test_without_affinity_all_cores_are_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(threads.os, "sched_getaffinity", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert usable_cores() == os.cpu_count()


def test_each_function_gets_the_number_at_which_it_is_fastest(clock: list[float]) -> None:
    """Dense gains from three threads; waking the second thread costs the slimmed model more than it saves."""
    present = torch.get_num_threads()
    seconds = {("dense", 1): 9.0, ("dense", 3): 4.0, ("slimmed", 1): 2.0, ("slimmed", 3): 3.0}

    def function(name: str):
        def run() -> None:
            clock[0] += seconds[name, torch.get_num_threads()]

        return run

    times = fastest_threads({name: function(name) for name in ("dense", "slimmed")}, (1, 3), rounds=5)
    assert {name: t.best for name, t in times.items()} == {"dense": 3, "slimmed": 1}
    assert {n: spread.median for n, spread in times["dense"].seconds.items()} == {1: 9, 3: 4}
    assert times["slimmed"].milliseconds() == {"1": 2000, "3": 3000}
    assert torch.get_num_threads() == present


def test_more_threads_must_save_three_per_cent() -> None:
    def times(one: float, two: float) -> ThreadTimes:
        return ThreadTimes.of({1: Spread(one, one, one), 2: Spread(two, two, two)})

    assert times(1.02, 1).best == 1
    assert times(1.04, 1).best == 2
    assert times(1, 1.2).best == 1


def test_timed_functions_run_on_their_own_number_of_threads(clock: list[float]) -> None:
    present, seen = torch.get_num_threads(), set()

    def function(name: str):
        def run() -> None:
            seen.add((name, torch.get_num_threads()))
            clock[0] += 1

        return run

    timed = alternate({"a": function("a"), "b": function("b")}, rounds=5, threads={"a": 3})
    assert seen == {("a", 3), ("b", present)}
    assert timed.conditions["threads"] == {"a": 3, "b": present}
    assert torch.get_num_threads() == present


def test_the_number_of_threads_is_restored_after_an_error() -> None:
    present = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        alternate({"a": lambda: 1 / 0}, rounds=5, threads={"a": present + 2})
    assert torch.get_num_threads() == present


def test_threads_of_a_block_of_code() -> None:
    present = torch.get_num_threads()
    with cpu_threads(present + 2):
        assert torch.get_num_threads() == present + 2
    assert torch.get_num_threads() == present
    with pytest.raises(ZeroDivisionError), cpu_threads(present + 2):
        _ = 1 / 0
    assert torch.get_num_threads() == present


def test_numbers_of_threads_as_text() -> None:
    assert (threads_text(1), threads_text(2)) == ("1 thread", "2 threads")
