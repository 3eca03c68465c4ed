"""Who is faster, and by how much: contestants take turns, so that whatever the machine does meanwhile hits all.

    timing = alternate({"dense": lambda: vit(images), "slimmed": lambda: model(images)}, about={"batch": 16})
    print(timing.verdict("slimmed"))        # 1.58x (1.55x to 1.61x)
    json.dumps(timing.to_dict())

A ratio is taken between neighbours in time: the first one runs again beside each of the others, for a shared machine's
speed can change within one round. The median over the rounds is the result. A result without its conditions is none, so
they travel along.
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

__all__ = ["Spread", "Timing", "alternate", "conditions", "synchronise"]

NOISY = 1.5
"""A ratio whose p90 is more than so many times its p10 says nothing."""

_FEWEST = 5  # rounds, below which percentiles mean nothing


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
        """Too wide for the median to mean anything."""
        return not self.p90 <= NOISY * self.p10


@dataclass(frozen=True)
class Timing:
    """What came out when several functions took turns.

    Attributes:
        seconds: of one call, by name.
        ratios: the first one's seconds over this one's, pair by pair of neighbours: 1.6 means 1.6 times as fast.
        conditions: machine, versions, rounds, and what the caller said about the runs.
    """

    seconds: dict[str, Spread]
    ratios: dict[str, Spread]
    conditions: dict[str, Any]

    @property
    def noisy(self) -> list[str]:
        """Names whose ratio is too wide to be stated."""
        return [name for name, ratio in self.ratios.items() if ratio.noisy]

    def verdict(self, name: str) -> str:
        """How many times as fast as the first one, for people; or that the run was too noisy to say."""
        ratio = self.ratios[name]
        if ratio.noisy:
            return f"too noisy to say ({ratio.p10:.2f}x to {ratio.p90:.2f}x)"
        return f"{ratio.median:.2f}x ({ratio.p10:.2f}x to {ratio.p90:.2f}x)"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with what is too noisy named."""
        return {**asdict(self), "noisy": self.noisy}


@torch.inference_mode()
def alternate(
    runs: Mapping[str, Callable[[], object]],
    rounds: int = 20,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    patience: float = math.inf,
    about: Mapping[str, Any] | None = None,
) -> Timing:
    """Time functions in turns, round after round. The first is what the others are compared with.

    It runs right before or after each of the others; every second round goes backwards.

    Args:
        runs: name and function. Work that is not to be timed does not belong into the function.
        rounds: how many turns each of the others gets.
        warmup: rounds before these that do not count.
        device: where the functions work; it is waited for before and after every call.
        patience: in seconds; when they are over no further round begins, but five are always run.
        about: what else a reader must know: batch size, dtype, model.
    """
    if not runs or rounds < _FEWEST:
        raise ConfigError(f"timing needs functions and at least {_FEWEST} rounds, got {len(runs)} and {rounds}")
    first, *others = runs
    turns = _turns(first, others)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    with _no_garbage_collection():
        for _ in range(warmup):
            list(_round(runs, turns, device))
        deadline = time.perf_counter() + patience
        for done in range(rounds):
            if done >= _FEWEST and time.perf_counter() > deadline:
                break
            for name, seconds, ratio in _round(runs, turns[:: -1 if done % 2 else 1], device):
                taken[name].append(seconds)
                ratios[name].append(ratio)
    protocol = {"rounds": min(map(len, ratios.values())), "warmup": warmup, "reference": first}
    return Timing(
        {name: Spread.of(values) for name, values in taken.items()},
        {name: Spread.of(values) for name, values in ratios.items()},
        {**conditions(device), **protocol, **(about or {})},
    )


def _turns(first: str, others: Sequence[str]) -> list[str]:
    """One round: two others, then the first again, so that it stands beside each: f a b f c d f."""
    turns = [first]
    for place, name in enumerate(others):
        turns += [name, first] if place % 2 else [name]
    return turns


def _round(
    runs: Mapping[str, Callable[[], object]], turns: Sequence[str], device: torch.device | str
) -> Iterator[tuple[str, float, float]]:
    """(name, seconds, the first one's seconds beside it over these) of each turn."""
    seconds, first = [_seconds(runs[name], device) for name in turns], next(iter(runs))
    for place, name in enumerate(turns):
        beside = next(p for p in (place, place - 1, place + 1) if 0 <= p < len(turns) and turns[p] == first)
        yield name, seconds[place], seconds[beside] / seconds[place]


def conditions(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The machine and the software that a number was measured with."""
    kind = torch.device(device).type
    return {
        "device": torch.cuda.get_device_name(device) if kind == "cuda" else kind,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "timm": version("timm"),
        "python": platform.python_version(),
        "system": platform.system(),
    }


def synchronise(device: torch.device | str) -> None:
    """Wait until ``device`` has done all that it was told; a CPU always has."""
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


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection in the middle of a call would be blamed on that call."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _cpu_name() -> str:
    """What the processor calls itself, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
