"""Timing of several functions in turns, so that changes of the machine's speed affect all of them.

    timing = alternate({"dense": lambda: vit(images), "slimmed": lambda: model(images)}, metadata={"batch": 16})
    print(timing.verdict("slimmed"))        # 1.58x (1.55x to 1.61x)
    json.dumps(timing.to_dict())

The first function is the reference. It runs right before or after each of the others, and a ratio is taken between
such neighbours, because the speed of a shared machine can change within one round. The result is the median over the
rounds, together with the conditions of the measurement.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..malloc import malloc_setting

__all__ = ["Spread", "Timing", "alternate", "conditions", "cpu_threads", "synchronise"]

NOISY = 1.5
"""A ratio is too noisy if its p90 is more than this many times its p10."""

_MIN_ROUNDS = 5  # fewer values give no percentiles
_SHARE = 2**16  # elements per thread; torch starts a thread for 2**15 elements or more


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least two values."""
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        return cls(statistics.median(values), deciles[0], deciles[-1])

    @property
    def noisy(self) -> bool:
        """Whether the spread is too wide for the median to be stated."""
        return not self.p90 <= NOISY * self.p10


@dataclass(frozen=True)
class Timing:
    """Results of `alternate`.

    Attributes:
        seconds: of one call, by name.
        ratios: seconds of the reference over seconds of this function, from neighbouring runs, by name: 1.6 means 1.6
            times as fast.
        conditions: machine, versions, rounds, and the caller's metadata.
    """

    seconds: dict[str, Spread]
    ratios: dict[str, Spread]
    conditions: dict[str, Any]

    @property
    def noisy(self) -> list[str]:
        """Names whose ratio is too noisy to be stated."""
        return [name for name, ratio in self.ratios.items() if ratio.noisy]

    def verdict(self, name: str) -> str:
        """Speed relative to the reference as text, or that the run was too noisy."""
        ratio = self.ratios[name]
        if ratio.noisy:
            return f"too noisy ({ratio.p10:.2f}x to {ratio.p90:.2f}x)"
        return f"{ratio.median:.2f}x ({ratio.p10:.2f}x to {ratio.p90:.2f}x)"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the names that are too noisy."""
        return {**asdict(self), "noisy": self.noisy}


@torch.inference_mode()
def alternate(
    runs: Mapping[str, Callable[[], object]],
    rounds: int = 20,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    patience: float = math.inf,
    metadata: Mapping[str, Any] | None = None,
    threads: Mapping[str, int] | None = None,
) -> Timing:
    """Time functions in turns, round after round. The first function is the reference of the ratios.

    The reference runs right before or after each of the others; every second round runs in reverse order.

    Args:
        runs: functions by name; all work inside a function is timed.
        rounds: number of rounds; each of the other functions runs once in a round.
        warmup: rounds before, which are not counted.
        device: where the functions run; it is synchronised before and after every call.
        patience: in seconds; no round begins after that, but five are always run.
        metadata: conditions that only the caller has: batch size, dtype, model.
        threads: CPU threads of torch during each function, by name; they are started before the time is taken. A
            function without an entry runs on the present number, which is set again afterwards.

    Raises:
        ConfigError: no functions, or fewer than 5 rounds.
    """
    if not runs or rounds < _MIN_ROUNDS:
        raise ConfigError(
            f"timing needs functions and at least {_MIN_ROUNDS} rounds, got {len(runs)} functions and {rounds} rounds"
        )
    first, *others = runs
    turns = _turns(first, others)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    threads_of = {name: (threads or {}).get(name, torch.get_num_threads()) for name in runs}
    with _no_garbage_collection(), cpu_threads(threads_of[first]):
        for _ in range(warmup):
            list(_round(runs, turns, device, threads_of))
        deadline = time.perf_counter() + patience
        for done in range(rounds):
            if done >= _MIN_ROUNDS and time.perf_counter() > deadline:
                break
            for name, seconds, ratio in _round(runs, turns[:: -1 if done % 2 else 1], device, threads_of):
                taken[name].append(seconds)
                ratios[name].append(ratio)
    protocol: dict[str, Any] = {"rounds": min(map(len, ratios.values())), "warmup": warmup, "reference": first}
    if threads:
        protocol["threads"] = threads_of
    return Timing(
        {name: Spread.of(values) for name, values in taken.items()},
        {name: Spread.of(values) for name, values in ratios.items()},
        {**conditions(device), **protocol, **(metadata or {})},
    )


def _turns(first: str, others: Sequence[str]) -> list[str]:
    """The order of one round, with the first function beside each of the others: f a b f c d f."""
    turns = [first]
    for position, name in enumerate(others):
        turns += [name, first] if position % 2 else [name]
    return turns


def _round(
    runs: Mapping[str, Callable[[], object]],
    turns: Sequence[str],
    device: torch.device | str,
    threads: Mapping[str, int],
) -> Iterator[tuple[str, float, float]]:
    """(name, seconds, ratio of the neighbouring reference's seconds to these) of each turn."""
    seconds, first = [], next(iter(runs))
    for name in turns:
        _use_threads(threads[name])
        seconds.append(_seconds(runs[name], device))
    for position, name in enumerate(turns):
        around = (position, position - 1, position + 1)
        reference = next(p for p in around if 0 <= p < len(turns) and turns[p] == first)
        yield name, seconds[position], seconds[reference] / seconds[position]


def conditions(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Machine and software versions of a measurement."""
    kind = torch.device(device).type
    return {
        "device": torch.cuda.get_device_name(device) if kind == "cuda" else kind,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "malloc": malloc_setting(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "timm": version("timm"),
        "python": platform.python_version(),
        "system": platform.system(),
    }


@contextmanager
def cpu_threads(number: int) -> Iterator[None]:
    """Let torch run on ``number`` CPU threads, and on the present number again afterwards."""
    present = torch.get_num_threads()
    try:
        _use_threads(number)
        yield
    finally:
        _use_threads(present)


def synchronise(device: torch.device | str) -> None:
    """Wait until ``device`` has finished all work; does nothing for a CPU."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def _seconds(run: Callable[[], object], device: torch.device | str) -> float:
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def _use_threads(number: int) -> None:
    """Let torch run on ``number`` threads, which are started here."""
    if number != torch.get_num_threads():
        torch.set_num_threads(number)
        torch.empty(number * _SHARE).fill_(0)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Disable garbage collection, which would add to the time of one call."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _cpu_name() -> str:
    """The name of the processor, or the machine's architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
