"""The jobs of `gpu.py`: their order, how long each takes, and which of its methods fit into the time left.

Preparing a method (building, compiling, the first run) takes longer than timing it. So a job is planned by the seconds
that earlier jobs took for each method, and one that does not fit is reduced to its most important methods.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

__all__ = ["ENGINES", "LATER", "MODELS", "Job", "Pace", "left_out_lines", "plan", "reduced"]

MODELS = {
    "vit_base_patch16_224": {},
    "deit_small_patch16_224": {},
    "vit_tiny_patch16_224": {},
    "vit_large_patch16_224": {},
    "vit_small_patch14_dinov2": {"img_size": 518},
}
LATER = ("vit_large_patch16_224", "vit_small_patch14_dinov2")
"""Models that take more time than the others."""
ENGINES = ("graph", "compile", "eager-graph", "eager")
BATCHES = (32, 256, 1)

# methods, the most important first
STATIC = (
    "dense",
    "ours-fixed",
    "no-decision-bound",
    "ours-slices",
    "tome",
    "evit",
    "dynamicvit",
    "class-attention",
    "diffrate",
    "ppt",
    "tnt",
)
COMPILED = ("dense", "ours-fixed", "no-decision-bound", "ours-slices", "tome")
DYNAMIC = ("ours-adaptive", "ats", "a-vit", "mame")
FEWEST = 2  # the dense model and ours

GUESSES = {"graph": 25.0, "compile": 15.0, "eager-graph": 5.0, "eager": 5.0}
"""Seconds of a method in the first job of an engine."""
LIMITS = {"graph": 75.0, "compile": 45.0, "eager-graph": 30.0, "eager": 30.0}
"""Seconds of a job after which no further method is prepared."""
TIMING = 12.0
"""Seconds of a job after which no further round of timing begins."""
LARGE = 2.5
"""Methods of the models in `LATER` take so many times as long."""


@dataclass(frozen=True)
class Job:
    """One comparison of methods."""

    model: str
    engine: str
    batch: int
    methods: tuple[str, ...]

    @property
    def weight(self) -> float:
        """How many times as long a method takes as in other models."""
        return LARGE if self.model in LATER else 1.0

    def __str__(self) -> str:
        return f"{self.model}, {self.engine}, batch {self.batch}"


def methods_of(engine: str) -> tuple[str, ...]:
    """Names of the methods; those whose shapes depend on the images run eagerly only."""
    if engine == "eager":
        return (*STATIC[:4], DYNAMIC[0], *STATIC[4:], *DYNAMIC[1:])
    return STATIC if engine == "eager-graph" else COMPILED


def plan(models: Sequence[str], engines: Sequence[str], batches: Sequence[int]) -> list[Job]:
    """All jobs, the most important first.

    First graph and compile at batches 32 and 256, then the other engines, then large models, then other batches.
    Engines that compile the same graph follow each other: the second one finds it in the compiler's cache.
    """

    def order(job: Job) -> tuple[int, ...]:
        usual = job.batch in BATCHES[:2]
        tier = (not usual) * 4 + (job.model in LATER) * 2 + (job.engine not in ENGINES[:2])
        batch = BATCHES.index(job.batch) if job.batch in BATCHES else job.batch
        return tier, batch, models.index(job.model), engines.index(job.engine)

    jobs = [Job(m, e, b, methods_of(e)) for m in models for e in engines for b in batches]
    return sorted(jobs, key=order)


class Pace:
    """How many seconds a method takes in each engine: a guess at first, then the median of what was measured."""

    def __init__(self) -> None:
        self.measured: dict[str, list[float]] = {}

    def add(self, job: Job, seconds: float, prepared: int) -> None:
        """A job took ``seconds`` for so many methods."""
        self.measured.setdefault(job.engine, []).append(seconds / max(1, prepared) / job.weight)

    def of_a_method(self, job: Job) -> float:
        """Expected seconds of each method of ``job``, with its share of the timing."""
        measured = self.measured.get(job.engine)
        return job.weight * (median(measured) if measured else GUESSES[job.engine])


def reduced(job: Job, left: float, pace: Pace) -> Job | None:
    """``job`` with as many methods as fit into ``left`` seconds; None if not even the dense model and ours do."""
    fits = int(max(0.0, left - TIMING) / pace.of_a_method(job))
    return replace(job, methods=job.methods[:fits]) if fits >= FEWEST else None


def prepare_until(job: Job, started: float, deadline: float) -> float:
    """The time after which a job prepares no further method: its own limit, and enough time to finish the timing."""
    return min(started + job.weight * LIMITS[job.engine], deadline - TIMING)


def left_out_lines(jobs: Sequence[Job], without: Mapping[Job, Sequence[str]]) -> Iterator[str]:
    """One line for each engine whose ``jobs`` did not start, and for each job that ran ``without`` some methods."""
    for engine in dict.fromkeys(job.engine for job in jobs):
        names = [f"{job.model} batch {job.batch}" for job in jobs if job.engine == engine]
        yield f"{engine}: no time left for {len(names)} jobs: {', '.join(names)}"
    for job, methods in without.items():
        if methods:
            yield f"{job}: no time left for {', '.join(methods)}"
