"""What a comparison found, as it lies on disk: one JSON file a run, never changed after it.

Tables, plots and docs are drawn from these files only.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..evaluation.timing import Spread
from ..io.files import write_atomic

__all__ = ["Accuracy", "MethodInfo", "Result", "Speed", "load_all"]

KIND = "patchlife-bench"
FORMAT = 1


@dataclass(frozen=True)
class MethodInfo:
    """A method, as a result file remembers it. See `baselines.Method`."""

    title: str
    source: str
    training: str
    trained: bool
    ours: bool


@dataclass(frozen=True)
class Speed:
    """One method at one batch size and one FLOPs target.

    Attributes:
        method: its name. target: fraction of the dense FLOPs that the others in this race were asked for.
        knob: its setting. flops: fraction of the dense FLOPs that the timed batch cost.
        engine: what ran it; "eager" where its shapes cannot be compiled.
        seconds: of a batch. ratio: dense seconds over these, pair by pair.
        memory: bytes of activations alive at once, at their peak.
        left_out: why there are no numbers.
    """

    method: str
    batch: int
    target: float
    knob: str = ""
    flops: float | None = None
    engine: str = "eager"
    seconds: Spread | None = None
    ratio: Spread | None = None
    memory: int | None = None
    left_out: str = ""

    @property
    def images_per_second(self) -> float | None:
        """Throughput; None where it was not measured or too noisy."""
        return None if self.seconds is None or self.noisy else self.batch / self.seconds.median

    @property
    def noisy(self) -> bool:
        """Measured, but too unsteady to say."""
        return self.ratio is not None and self.ratio.noisy


@dataclass(frozen=True)
class Accuracy:
    """One method at one FLOPs target on labelled photos.

    Attributes:
        flops: fraction of the dense FLOPs, mean over the photos. photos: how many were evaluated.
        right: how many of them were named as they are labelled. agreeing: as the dense model names them.
        left_out: why there are no numbers.
    """

    method: str
    target: float
    knob: str = ""
    flops: float | None = None
    photos: int = 0
    right: int = 0
    agreeing: int = 0
    left_out: str = ""

    @property
    def top1(self) -> float | None:
        """Per cent."""
        return 100 * self.right / self.photos if self.photos else None


@dataclass
class Result:
    """A run of the comparison.

    Attributes:
        model: its name. weights: where they came from. conditions: machine, versions, protocol, command.
        methods: by name. speed, accuracy: the rows. advice: what `advice.py` found, if asked.
        affordable: what `affordable.py` chose at each batch size, if asked and there were photos.
        data: the photos' folder and how many could not be read.
        complete: nothing that was planned is missing.
    """

    model: str
    weights: str
    conditions: dict[str, Any]
    methods: dict[str, MethodInfo] = field(default_factory=dict)
    speed: list[Speed] = field(default_factory=list)
    accuracy: list[Accuracy] = field(default_factory=list)
    advice: list[dict[str, Any]] = field(default_factory=list)
    affordable: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    complete: bool = False

    @property
    def batches(self) -> list[int]:
        """Batch sizes that were timed."""
        return sorted({row.batch for row in self.speed})

    @property
    def photos_of(self) -> str:
        """The last two names of the photos' folder; empty where accuracy was not measured."""
        return "/".join(Path(self.data["folder"]).parts[-2:]) if self.data else ""

    @property
    def targets(self) -> list[float]:
        """FLOPs fractions that were asked for, largest first."""
        evaluated = {row.target for row in self.accuracy if row.method != "dense"}
        return sorted({row.target for row in self.speed} | evaluated, reverse=True)

    def at(self, batch: int, target: float) -> list[Speed]:
        """What was timed together, the dense model first."""
        return [row for row in self.speed if row.batch == batch and row.target == target]

    def save(self, path: Path) -> Path:
        """Write the file, whole or not at all."""
        body = {"kind": KIND, "format": FORMAT, **dataclasses.asdict(self)}
        return write_atomic(path, json.dumps(body, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read a file back. Raises ConfigError when it is no result of this program's."""
        try:
            body = json.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is no result file: {error}") from None
        if not isinstance(body, dict) or body.get("kind") != KIND:
            raise ConfigError(f"{path} is no result of patchlife bench (it does not say kind: {KIND})")
        if body.pop("format") > FORMAT:
            raise ConfigError(f"{path} was written by a newer patchlife; pip install -U patchlife")
        body.pop("kind")
        body["methods"] = {name: MethodInfo(**about) for name, about in body["methods"].items()}
        body["speed"] = [Speed(**_spreads(row)) for row in body["speed"]]
        body["accuracy"] = [Accuracy(**row) for row in body["accuracy"]]
        return cls(**body)


def load_all(folder: Path) -> dict[str, Result]:
    """Every result under ``folder``, by its path in it; other JSON files are passed over."""
    found = {}
    for path in sorted(folder.rglob("*.json")):
        if f'"kind": "{KIND}"' in path.read_text("utf-8")[:200]:
            found[str(path.relative_to(folder))] = Result.load(path)
    return found


def _spreads(row: dict[str, Any]) -> dict[str, Any]:
    spreads = {name: Spread(**row[name]) for name in ("seconds", "ratio") if row[name] is not None}
    return {**row, **spreads}
