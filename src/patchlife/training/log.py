"""Metrics of training: JSON lines in a file, copied to the trackers of accelerate where some are set up."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from ..errors import ConfigError
from ..io.files import write_atomic

__all__ = ["Line", "Log", "check_tracker", "lines_of", "seconds_per_step"]

Line = dict[str, Any]


class Log:
    """The metrics of one stage. A resumed run first removes the lines of steps that it will repeat.

    A line has the numbers of one training step, or of one validation set after that many steps ("validation" is the
    name of the set). Lines of other stages are kept: each stage resumes from its own checkpoint.

    Attributes:
        active: whether this process writes; only the main process does.
        seconds: of training so far, with the prior stages of this run, without validation and collection of targets.

    Args:
        path: the file.
        stage: name of the stage.
        first: the step at which the stage begins or resumes.
        active: see above.
        photos_per_step: in a global batch.
        prior_stages: names of the stages that this run trained before.
        validation_content: checksum of each validation set, as in the lines' "photos"; lines with another are removed.
        track: called with (values, step) for each new line; steps are counted over all stages of the run.
    """

    def __init__(
        self,
        path: Path,
        stage: str,
        first: int,
        active: bool,
        photos_per_step: int = 1,
        prior_stages: Sequence[str] = (),
        validation_content: Mapping[str, str] | None = None,
        track: Callable[[dict[str, float], int], None] | None = None,
    ) -> None:
        self.path, self.stage, self.active, self.seconds = path, stage, active, 0.0
        self._photos, self._track = photos_per_step, track
        self._prior_steps = 0
        self._validated: set[tuple[int, str, float]] = set()
        if not active:
            return
        kept = _lines_to_keep(path, stage, first, validation_content or {})
        if path.is_file():
            write_atomic(path, "".join(text + "\n" for text, _ in kept))
        for _, line in kept:
            if line["stage"] in (stage, *prior_stages):
                self._count(line)

    def write(self, values: Mapping[str, Any]) -> None:
        """Add a line; it is on disk when this returns."""
        if self.active:
            line = {"stage": self.stage, **_rounded(values)}
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
            self._count(line)
            if self._track is not None:
                self._track(_tracked(line), self._prior_steps + line["step"])

    def has(self, step: int, validation: str, budget: float) -> bool:
        """Whether the validation set of this name has a line after ``step`` steps at this budget."""
        return (step, validation, budget) in self._validated

    def _count(self, line: Line) -> None:
        self.seconds += self._photos / line["photos_per_s"] if "photos_per_s" in line else 0
        if line["stage"] != self.stage:
            self._prior_steps += "validation" not in line
        elif "validation" in line:
            self._validated.add((line["step"], line["validation"], line["budget"]))


def check_tracker(name: str) -> None:
    """Raise ConfigError unless accelerate has a tracker of this name and its package is installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name not in LOGGER_TYPE_TO_CLASS:
        raise ConfigError(f"tracker must be one of {', '.join(LOGGER_TYPE_TO_CLASS)}, got {name!r}")
    if name not in map(str, get_available_trackers()):
        raise ConfigError(f"tracker {name} needs a package that is not installed: pip install {name}")


def lines_of(path: Path) -> list[tuple[str, Line]]:
    """The lines of a metrics file and their values; an incomplete line, left by a crash, is skipped."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else ():
        with suppress(json.JSONDecodeError):
            lines.append((text, json.loads(text)))
    return lines


def seconds_per_step(path: Path, stage: str, photos_per_step: int) -> float | None:
    """The median time of a training step of the stage, in seconds; None if no step was trained."""
    speeds = [line["photos_per_s"] for _, line in lines_of(path) if line["stage"] == stage and "photos_per_s" in line]
    return float(f"{photos_per_step / median(speeds):.3g}") if speeds else None


def _lines_to_keep(path: Path, stage: str, first: int, validation_content: Mapping[str, str]) -> list[tuple[str, Line]]:
    """Lines of other stages and of completed steps, without those of a validation set whose photos have changed."""
    kept = []
    for text, line in lines_of(path):
        # a validation line of step `first` was written after `first` steps; the training step `first` is still to do
        completed = line["stage"] != stage or line["step"] < first + ("validation" in line)
        expected = validation_content.get(line.get("validation", ""), line.get("photos"))
        if completed and line.get("photos") == expected:
            kept.append((text, line))
    return kept


def _tracked(line: Line) -> dict[str, float]:
    """The floats of a line, under names that tell stages, validation sets and budgets apart."""
    prefix, skipped = f"{line['stage']}/", set()
    if "validation" in line:
        prefix, skipped = f"{prefix}{line['validation']} at {line['budget']:g}/", {"budget"}
    return {prefix + name: value for name, value in line.items() if isinstance(value, float) and name not in skipped}


def _rounded(values: Mapping[str, Any]) -> Line:
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
