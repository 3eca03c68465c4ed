"""The number of CPU threads at which each of several functions is fastest on this machine.

    times = fastest_threads({"dense": lambda: vit(images), "slimmed": lambda: model(images)}, thread_counts())
    times["slimmed"].best       # 1

Waking a thread costs time at every operation. A small batch may cost less than that, so one thread can be the fastest,
and a slimmed model has less work per operation than the dense one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from .timing import Spread, alternate

__all__ = ["ThreadTimes", "fastest_of", "fastest_threads", "thread_counts", "threads_text", "usable_cores"]

_CLEARLY = 1.03
"""A larger number of threads is chosen only if it is this many times as fast as a smaller one."""


@dataclass(frozen=True)
class ThreadTimes:
    """Times of one function at several numbers of CPU threads.

    Attributes:
        seconds: of one call, by number of threads.
        best: the number of threads at which the median is least; the smaller of two numbers that differ by less than
            3 %, because the other cores then stay free.
    """

    seconds: dict[int, Spread]
    best: int

    @classmethod
    def of(cls, seconds: dict[int, Spread]) -> ThreadTimes:
        """The best number, from the times at each number."""
        least = min(spread.median for spread in seconds.values())
        return cls(seconds, min(n for n, spread in seconds.items() if spread.median < _CLEARLY * least))

    def milliseconds(self) -> dict[str, float]:
        """The median of a call by number of threads, as plain values for JSON."""
        return {str(n): round(1000 * spread.median, 2) for n, spread in self.seconds.items()}


def usable_cores() -> int:
    """CPU cores that this process may use: by its affinity, and at most OMP_NUM_THREADS if that is set."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return min(cores, int(limit)) if limit.isdecimal() and int(limit) else cores


def thread_counts(cores: int | None = None) -> tuple[int, ...]:
    """Numbers of threads to try: the powers of two up to ``cores``, and ``cores`` itself (1, 2, 4, 6 of six).

    ``cores`` is `usable_cores` if it is not given. Raises ConfigError if it is less than 1.
    """
    cores = usable_cores() if cores is None else cores
    if cores < 1:
        raise ConfigError(f"cores must be at least 1, got {cores}")
    return tuple(sorted({2**power for power in range(cores.bit_length())} | {cores}))


def threads_text(number: int) -> str:
    """A number of threads as text: 1 thread, 2 threads."""
    return f"{number} thread{'' if number == 1 else 's'}"


def fastest_threads(
    runs: Mapping[str, Callable[[], object]],
    counts: Sequence[int],
    rounds: int = 7,
    patience: float = 10.0,
) -> dict[str, ThreadTimes]:
    """Time each function at each number of threads, all in turns, on the CPU.

    Args:
        runs: functions by name. They run on the number of threads that torch has at the call.
        counts: numbers of threads, see `thread_counts`.
        rounds: each function runs at least once in a round at each number.
        patience: in seconds; no round begins after that, but five are always run.

    Returns:
        The times of each function, by name.
    """
    return fastest_of({name: dict.fromkeys(counts, run) for name, run in runs.items()}, rounds, patience)


def fastest_of(
    runs: Mapping[str, Mapping[int, Callable[[], object]]], rounds: int = 7, patience: float = 10.0
) -> dict[str, ThreadTimes]:
    """`fastest_threads` for functions whose number of threads is fixed when they are made, such as engines.

    Args:
        runs: by name, and then by number of threads.
        rounds, patience: see `fastest_threads`.
    """
    keys = {f"{name}, {n}": (name, n) for name, by_count in runs.items() for n in by_count}
    functions = {key: runs[name][n] for key, (name, n) in keys.items()}
    threads = {key: n for key, (_, n) in keys.items()}
    timing = alternate(functions, rounds, warmup=1, patience=patience, threads=threads)
    return {
        name: ThreadTimes.of({n: timing.seconds[f"{name}, {n}"] for n in by_count}) for name, by_count in runs.items()
    }
