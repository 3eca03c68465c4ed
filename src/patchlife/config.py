"""Every setting, its default and its meaning, once. No torch here: help texts are made from this file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .checks import check_budget, check_speedup, check_switch, check_whole, check_wholes
from .errors import ConfigError

__all__ = [
    "ClassOrder",
    "DemoConfig",
    "Device",
    "DrawConfig",
    "EngineName",
    "ExportConfig",
    "InfoConfig",
    "LifeConfig",
    "Mode",
    "ModelConfig",
    "PredictConfig",
    "RunConfig",
]

Mode = Literal["fixed", "adaptive"]
MODES = ("fixed", "adaptive")


@dataclass(frozen=True)
class LifeConfig:
    """How a backbone is slimmed.

    Attributes:
        budget: Fraction of the dense model's FLOPs that an image may cost, in (0, 1].
        mode: fixed keeps the same number of patches of every image; adaptive lets each image's lives decide.
        start: First block at which a patch may be missing; a quarter of the depth if not given.
        drops: Blocks at which patches go, each at or after start; start and half of the depth if not given.
        survivors: An explicit schedule instead of a budget: how many patches enter each block.
        speedup: A target instead of a budget: 1.6 means a budget of 1 / 1.6.
        heirs: A dying patch leaves its token to the most similar patch that lives on; off means pure slices.
    """

    budget: float = 0.6
    mode: Mode = "fixed"
    start: int | None = None
    drops: tuple[int, ...] | None = None
    survivors: tuple[int, ...] | None = None
    speedup: float | None = None
    heirs: bool = True

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.speedup is not None:
            self._settle("budget", 1 / check_speedup(self.speedup))
            self._settle("speedup", None)
        self._settle("budget", check_budget(self.budget))
        self._settle("heirs", check_switch(self.heirs, "heirs"))
        if self.start is not None:
            self._settle("start", check_whole(self.start, "start"))
        for name in ("drops", "survivors"):
            if getattr(self, name) is not None:
                self._settle(name, check_wholes(getattr(self, name), name))

    def _settle(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def replace(self, **changes: Any) -> LifeConfig:
        """A copy with some settings changed; an explicit schedule does not outlive a new budget."""
        if "budget" in changes or "speedup" in changes:
            changes = {"survivors": None, **changes}
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items() if v is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LifeConfig:
        """The inverse of `to_dict`. Raises ConfigError for settings this version does not know."""
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ConfigError(f"unknown settings {sorted(unknown)}; were they written by a newer patchlife?")
        return cls(**values)


# ---- what the command line's verbs can be told; `arguments.py` turns these into options


Device = Literal["auto", "cpu", "cuda", "mps"]
EngineName = Literal["eager", "compile", "onnx", "openvino"]
ClassOrder = Literal["number", "imagefolder"]


@dataclass(frozen=True)
class ModelConfig:
    """Which model, with which weights.

    Attributes:
        model: A timm name, hf-hub:ORG/NAME or local-dir:FOLDER (with config.json and model.safetensors as timm writes
            them), the folder of a life adapter, or demo: the small model inside this package.
        checkpoint: The backbone's weights, a safetensors file. For an adapter: where that file is now. The number of
            classes and the image size follow the file.
        pretrained: Take timm's own weights for this name; they are downloaded once. hf-hub and local-dir always do.
        model_args: Arguments for timm's model, such as global_pool=avg, in_chans=1 (photos are then made grey),
            img_size=384 or img_size=256,128 (height, width). An adapter keeps its own where no others are given.
        labels: Names of the classes, one a line; ImageNet's for a model of 1000 classes if not given.
        class_order: What the folders of labelled photos are called: number, the number of the class; imagefolder, any
            name, and the classes are in the order of these names as text (0, 1, 10, 11, 2, ...), as torchvision's
            ImageFolder gave them when the model was trained. If not given: the name of the class or its WordNet id,
            and its number where the classes have no names.
        image_size: Side of the square that photos are brought to, in pixels; if not given, what the checkpoint's
            positions were made for, or the model's own. Positions are interpolated.
        life: How it is slimmed. An adapter keeps its own settings where nothing else is asked for.
    """

    model: str
    checkpoint: Path | None = None
    pretrained: bool = False
    model_args: dict[str, Any] = field(default_factory=dict, metadata={"metavar": "NAME=VALUE"})
    labels: Path | None = None
    class_order: ClassOrder | None = None
    image_size: int | None = field(default=None, metadata={"metavar": "PIXELS"})
    life: dict[str, Any] = field(default_factory=dict, metadata={"settings_of": LifeConfig})

    def __post_init__(self) -> None:
        if self.image_size is not None:
            object.__setattr__(self, "image_size", check_whole(self.image_size, "image_size"))
        _check_at_least(1, image_size=self.image_size)
        object.__setattr__(self, "life", _checked_life(self.life))


@dataclass(frozen=True)
class RunConfig:
    """Where photos are run, and how many at a time.

    Attributes:
        device: auto takes a CUDA GPU where there is one, else the CPU.
        batch_size: Photos in a batch.
        workers: Threads that read photos; one a core, at most 8, if not given.
        progress: Draw a progress bar; only on a terminal if not given.
    """

    device: Device = "auto"
    batch_size: int = 16
    workers: int | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        _check_at_least(1, batch_size=self.batch_size, workers=self.workers)


@dataclass(frozen=True)
class PredictConfig:
    """Classify photos: one JSON line each, in the order of the paths.

    Attributes:
        model: Which model, with which weights.
        paths: Photos, folders or globs. Of folders, the files with the suffixes of JPEG, PNG and WEBP.
        out: File for the JSON lines; without it they go to the standard output.
        resume: Continue an interrupted --out file. A photo that has a line there, be it an error, is not run
            again: to try failed ones once more, delete their lines.
        top: How many classes to name for each photo.
        labelled: Each photo lies in the folder of its class (see --class-order): say how often the model finds it.
        engine: What runs the model; eager if not given, and an exported file or package brings its own. onnx and
            openvino export it on the first run and keep the file in a cache folder ($PATCHLIFE_CACHE says where).
        trust: Open a .pt2 file (export --format torch). Opening one can run any code, so do it only if you trust where
            it came from.
        run: Where photos are run, and how many at a time.
    """

    model: ModelConfig
    paths: tuple[str, ...]
    out: Path | None = None
    resume: bool = False
    top: int = 5
    labelled: bool = False
    engine: EngineName | None = None
    trust: bool = False
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _check_at_least(1, top=self.top)
        if self.resume and self.out is None:
            raise ConfigError("resume continues a file, got none; name it with --out FILE")


@dataclass(frozen=True)
class ExportConfig:
    """Write a slimmed model as one file for ONNX Runtime, OpenVINO or torch, proved to answer alike.

    Attributes:
        model: Which model, with which weights.
        out: The file, or the folder of a package; named after model, budget and format if not given. The sha256 of
            everything is written along.
        budgets: Instead of --budget: a package, one folder with a graph for each of these and the weights once
            (onnx, openvino).
        format: onnx, openvino (a zip of model.xml and model.bin) or torch (.pt2, which can run code when it is
            opened: predict and eval open it with --trust only).
        lives: Give the file a second output, how many blocks each patch lives.
        int8: Blocks in 8-bit integers, the life head in float (onnx, openvino). dynamic finds the range of each token
            as it runs; static takes one for all from the photos. If too few photos agree, as many of the blocks
            before the decision as it takes stay in float, too. Products of integers are exact on every
            processor; but dynamic in OpenVINO rounds activations only on processors with VNNI.
        photos: Photos, folders or globs to calibrate int8 on and to compare the file with the model on.
        limit: At most so many of the photos, evenly spread.
        labelled: Each photo lies in the folder of its class (see --class-order): also say how often model and file
            find it.
    """

    model: ModelConfig
    out: Path | None = None
    budgets: tuple[float, ...] | None = None
    format: Literal["onnx", "openvino", "torch"] = "onnx"
    lives: bool = True
    int8: Literal["off", "dynamic", "static"] = "off"
    photos: tuple[Path, ...] | None = field(default=None, metadata={"metavar": "PATH"})
    limit: int = 64
    labelled: bool = False

    def __post_init__(self) -> None:
        _check_at_least(1, limit=self.limit)
        if self.budgets is not None:
            object.__setattr__(self, "budgets", tuple(check_budget(budget, "budgets") for budget in self.budgets))
        said = [f"--{name}" for name in ("budget", "speedup", "survivors") if name in self.model.life]
        if self.budgets and said:
            raise ConfigError(f"--budgets names all budgets of a package, got {said[0]} as well; give one of both")
        if self.labelled and not self.photos:
            raise ConfigError("labelled is about photos, got none; give some with --photos PATH,PATH")


@dataclass(frozen=True)
class DrawConfig:
    """Draw the life of every patch over photos.

    Attributes:
        model: Which model, with which weights.
        paths: Photos, folders or globs.
        out: Folder for the pictures; made if it is not there.
        strip: Also draw what is alive at five blocks, from the first to the last.
        sheet: Also draw contact sheets of all life maps, with what the model says about each photo.
        whole: Show the whole photo, with the margin that the model does not see dimmed.
        width: Width of a life map.
        run: Where photos are run, and how many at a time.
    """

    model: ModelConfig
    paths: tuple[str, ...]
    out: Path = field(default=Path("patchlife-pictures"), metadata={"metavar": "FOLDER"})
    strip: bool = False
    sheet: bool = False
    whole: bool = False
    width: int = field(default=480, metadata={"metavar": "PIXELS"})
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(frozen=True)
class InfoConfig:
    """Say what a model is made of, what it costs, and what slimming saves.

    Attributes:
        model: Which model, with which weights; random ones will do.
        json: Print JSON instead of text.
    """

    model: ModelConfig
    json: bool = False


@dataclass(frozen=True)
class DemoConfig:
    """Run the small model inside this package on its photos, dense against slimmed, and report.

    Attributes:
        out: Folder for the report and its pictures; made if it is not there.
        rounds: How often dense and slimmed take turns when they are timed.
        life: How the model is slimmed.
        run: Where photos are run, and how many at a time.
    """

    out: Path = field(default=Path("patchlife-demo"), metadata={"metavar": "FOLDER"})
    rounds: int = 20
    life: dict[str, Any] = field(default_factory=dict, metadata={"settings_of": LifeConfig})
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _check_at_least(5, rounds=self.rounds)
        object.__setattr__(self, "life", _checked_life(self.life))


def _check_at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")


def _checked_life(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as `LifeConfig` stores them. Refuses what no model could do before any model is built."""
    checked = LifeConfig.from_dict(settings)
    targets = [name for name in ("budget", "speedup", "survivors") if settings.get(name) is not None]
    if len(targets) > 1:
        raise ConfigError(f"{' and '.join(targets)} say the same thing in different ways; give one of them")
    return {name: value if name == "speedup" else getattr(checked, name) for name, value in settings.items()}
