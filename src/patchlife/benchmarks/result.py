"""The result of a benchmark run and its JSON file: one file a run, never edited.

Tables, plots and docs are made from these files only.
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

__all__ = ["KIND", "Accuracy", "MethodInfo", "Result", "Speed"]

KIND = "patchlife-bench"
FORMAT = 3

FORMAT_1_NAMES = {"limit": "no-decision-bound", "affordable": "within_max_drop", "loss": "accuracy"}
"""Keys and method names of format 1 that format 2 calls by another name."""

FORMAT_1_PHRASES = {
    "limit (slices, nothing decided)": "no-decision bound",
    "no heirs": "no merging",
    "as it came": "unmodified",
    "its head, and its change to the backbone if it has one": "its scorer, and its weight delta if it has one",
    "training-free rule (coverage of class attention); nothing trained": "nothing to train (attention scorer)",
    "nothing: fresh predictors, for speed only": "nothing: untrained predictors, for speed only",
    "nothing: halting as it falls, for speed only": "nothing: untrained halting scores, for speed only",
    "its accuracy means nothing untrained": "its accuracy is not meaningful",
    "the interval reaches further, so more photos may tell otherwise": (
        "the interval exceeds the allowed drop, so evaluate more photos"
    ),
}
"""Phrases in titles and sentences of format 1, and their wording in format 2."""


@dataclass(frozen=True)
class MethodInfo:
    """The description of a method in a result file. See `baselines.Method`."""

    title: str
    source: str
    training: str
    trained: bool
    ours: bool


@dataclass(frozen=True)
class Speed:
    """One method at one batch size and one FLOPs target.

    Attributes:
        method: its name. batch: in images.
        target: fraction of the dense FLOPs that all methods but the dense model were set to.
        knob: the setting that meets the target. flops: cost of the timed batch, as a fraction of the dense FLOPs.
        engine: what ran the method; "eager" if its shapes cannot be compiled.
        seconds: of a batch. ratio: dense seconds over ``seconds``, from pairs of neighbouring runs.
        memory: peak of the activations, in bytes.
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
        """Throughput; None if it was not measured or is too noisy."""
        return None if self.seconds is None or self.noisy else self.batch / self.seconds.median

    @property
    def noisy(self) -> bool:
        """Whether the ratio was measured but spreads too widely."""
        return self.ratio is not None and self.ratio.noisy


@dataclass(frozen=True)
class Accuracy:
    """One method at one FLOPs target on labelled photos.

    Attributes:
        method: its name. target: fraction of the dense FLOPs that the method was set to.
        knob: the setting that meets the target. flops: mean over the photos, as a fraction of the dense FLOPs.
        photos: number of photos evaluated.
        right: number of photos whose predicted class is the label.
        agreeing: number of photos whose predicted class is the dense model's.
        divergence: mean KL divergence from the dense model's distribution, in nats; None in files older than format 3.
        left_out: why there are no numbers.
    """

    method: str
    target: float
    knob: str = ""
    flops: float | None = None
    photos: int = 0
    right: int = 0
    agreeing: int = 0
    divergence: float | None = None
    left_out: str = ""

    @property
    def top1(self) -> float | None:
        """Top-1 in per cent; None without photos."""
        return 100 * self.right / self.photos if self.photos else None


@dataclass
class Result:
    """A benchmark run.

    Attributes:
        model: its name. weights: where they came from. conditions: machine, versions, protocol, command.
        methods: by name. speed: rows of timing. accuracy: rows of top-1.
        advice: entries of `schedule_search.advise`, with --advice.
        within_max_drop: entries of `fastest_within_drop`, one for each batch size, with --advice and --data.
        data: the folder of the photos, their number, which of them (every N-th), and how many could not be read.
        complete: whether the run reached its end.
    """

    model: str
    weights: str
    conditions: dict[str, Any]
    methods: dict[str, MethodInfo] = field(default_factory=dict)
    speed: list[Speed] = field(default_factory=list)
    accuracy: list[Accuracy] = field(default_factory=list)
    advice: list[dict[str, Any]] = field(default_factory=list)
    within_max_drop: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    complete: bool = False

    @property
    def batches(self) -> list[int]:
        """Batch sizes that were timed, ascending."""
        return sorted({row.batch for row in self.speed})

    @property
    def photos_of(self) -> str:
        """The last two parts of the photos' folder; empty if accuracy was not measured."""
        return "/".join(Path(self.data["folder"]).parts[-2:]) if self.data else ""

    @property
    def targets(self) -> list[float]:
        """FLOPs targets of the run, largest first."""
        evaluated = {row.target for row in self.accuracy if row.method != "dense"}
        return sorted({row.target for row in self.speed} | evaluated, reverse=True)

    def at(self, batch: int, target: float) -> list[Speed]:
        """Rows that were timed together, the dense model first."""
        return [row for row in self.speed if row.batch == batch and row.target == target]

    def save(self, path: Path) -> Path:
        """Write the file, whole or not at all."""
        body = {"kind": KIND, "format": FORMAT, **dataclasses.asdict(self)}
        return write_atomic(path, json.dumps(body, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read a file of this format or an older one. Raises ConfigError for any other file."""
        try:
            body = json.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is not a result file of patchlife bench: {error}") from None
        if not isinstance(body, dict) or body.get("kind") != KIND:
            raise ConfigError(f"{path} is not a result file of patchlife bench: it lacks kind {KIND}")
        written = body.pop("format")
        if written > FORMAT:
            raise ConfigError(
                f"{path} has format {written}, and this version reads up to {FORMAT}; pip install -U patchlife"
            )
        if written == 1:
            body = _from_format_1(body)
        body.pop("kind")
        body["methods"] = {name: MethodInfo(**info) for name, info in body["methods"].items()}
        body["speed"] = [Speed(**_spreads(row)) for row in body["speed"]]
        body["accuracy"] = [Accuracy(**row) for row in body["accuracy"]]
        return cls(**body)


def _spreads(row: dict[str, Any]) -> dict[str, Any]:
    spreads = {name: Spread(**row[name]) for name in ("seconds", "ratio") if row[name] is not None}
    return {**row, **spreads}


def _from_format_1(body: dict[str, Any]) -> dict[str, Any]:
    """The content of a format 1 file in the words of format 2; what the run was given stays as it was recorded."""
    recorded = ("model", "weights", "conditions", "data")
    return {FORMAT_1_NAMES.get(key, key): value if key in recorded else _reworded(value) for key, value in body.items()}


def _reworded(value: Any) -> Any:
    if isinstance(value, dict):
        return {FORMAT_1_NAMES.get(key, key): _reworded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_reworded(item) for item in value]
    if not isinstance(value, str):
        return value
    for old, new in FORMAT_1_PHRASES.items():
        value = value.replace(old, new)
    return FORMAT_1_NAMES.get(value, value)
