"""What the verbs of the command line can be told. `cli/arguments.py` turns these classes into options."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from ..errors import ConfigError
from .checks import check_budget, check_whole
from .slimming import MODES, LifeConfig, Mode
from .training import TrainingConfig

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
        int8: Compute blocks in 8-bit integers, the scorer in float. dynamic (onnx, openvino) computes the range of each
            token at run time; static (openvino) takes one range for all tokens from --photos. If the predictions agree
            on too few images, as many of the blocks before the decision as needed stay in float. Integer products are
            exact on every processor, but openvino with dynamic rounds activations only on processors with VNNI.
        photos: Photos, folders or globs to calibrate int8 on and to compare the file with the model on.
        max_photos: At most so many of the photos, evenly spread.
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
    max_photos: int = 64
    labelled: bool = False

    def __post_init__(self) -> None:
        _check_at_least(1, max_photos=self.max_photos)
        if self.budgets is not None:
            object.__setattr__(self, "budgets", tuple(check_budget(budget, "budgets") for budget in self.budgets))
        said = [f"--{name}" for name in ("budget", "speedup", "kept") if name in self.model.life]
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


@dataclass(frozen=True)
class FitConfig:
    """Learn the lives of a model's patches from photos; labels are not needed.

    Attributes:
        model: Which model, with which weights.
        data: Photos, folders or globs of them; WebDataset shards (*.tar, read where they lie, never unpacked); timm's
            data sets as timm:NAME[:SPLIT[:ROOT]].
        out: Folder for the adapter. An interrupted fit goes on where it stopped when the same command is given again;
            one with other settings is refused (see --restart).
        validation: Labelled photos (a folder for each class, see --class-order) on which to measure accuracy while learning;
            nothing is learned from them, and of each FOLDER every k-th is taken, 500 at most.
        device: auto takes a CUDA GPU where there is one, else the CPU.
        learn: How lives are learned.
    """

    model: ModelConfig
    data: tuple[str, ...]
    out: Path = field(default=Path("patchlife-adapter"), metadata={"metavar": "FOLDER"})
    validation: tuple[str, ...] = field(default=(), metadata={"metavar": "FOLDER"})
    device: Device = "auto"
    learn: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass(frozen=True)
class EvalConfig:
    """Measure a model's accuracy at several budgets against its dense self, on labelled photos.

    Attributes:
        model: Which model, with which weights.
        data: A folder with a folder of photos for each class; --class-order says what these are called.
        budgets: Fractions of the dense model's FLOPs.
        modes: fixed, adaptive, or both.
        every: Take every so-manieth photo only.
        engine: What runs the model; eager if not given. onnx and openvino export it at each budget on the first run
            and keep the files in a cache folder. An exported package brings its own; its budget 1 is then dense.
        trust: Open a .pt2 file (export --format torch). Opening one can run any code, so do it only if you trust where
            it came from.
        out: File for the results (JSON); a plot is drawn beside it where matplotlib is installed.
        run: Where photos are run, and how many at a time.
    """

    model: ModelConfig
    data: Path
    budgets: tuple[float, ...] = (1.0, 0.8, 0.6, 0.45)
    modes: tuple[str, ...] = field(default=("fixed",), metadata={"metavar": "MODE"})
    every: int = 1
    engine: EngineName | None = None
    trust: bool = False
    out: Path | None = None
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def settings(self) -> list[tuple[float, Mode]]:
        """Every budget in every mode."""
        return [(budget, cast(Mode, mode)) for mode in self.modes for budget in self.budgets]

    def __post_init__(self) -> None:
        object.__setattr__(self, "budgets", tuple(check_budget(budget, "budgets") for budget in self.budgets))
        for mode in self.modes:
            if mode not in MODES:
                raise ConfigError(f"modes must be of {', '.join(MODES)}, got {mode!r}")
        if "adaptive" in self.modes and self.engine not in (None, "eager"):
            raise ConfigError(f"--engine {self.engine} runs fixed mode only, got adaptive; drop one of the two")
        if self.every < 1:
            raise ConfigError(f"every must be at least 1, got {self.every}")


Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class BenchConfig:
    """Measure this and other methods side by side, on this machine: speed, and accuracy on labelled photos.

    Attributes:
        model: A timm name, hf-hub:ORG/NAME, local-dir:FOLDER, the folder of a life adapter, or demo. Random weights
            will do for speed.
        checkpoint: The backbone's weights, a safetensors file.
        pretrained: Take timm's own weights for this name; they are downloaded once.
        model_args: Arguments for timm's model, such as global_pool=avg or in_chans=1.
        labels: Names of the classes, one a line; ImageNet's for a model of 1000 classes if not given.
        class_order: What the folders in --data are called: number, the number of the class; imagefolder, any name, and
            the classes are in the order of these names as text, as torchvision's ImageFolder gave them. If not given:
            the name of the class or its WordNet id, and its number where the classes have no names.
        image_size: Side of the square that photos are brought to; the model's own if not given.
        data: Labelled photos, a folder for each class: measure accuracy too.
        methods: Which methods; all of them if not given. dense is always there to compare with.
        speed: Time the methods; --no-speed measures accuracy only, on --data.
        batch_sizes: Images in a batch.
        flops: Fractions of the dense model's FLOPs at which the methods meet.
        engine: compile runs methods of static shapes through torch.compile. onnx and openvino, on the CPU, run dense,
            no-decision-bound and ours in fixed mode as exported graphs, made on the first run and kept in a cache
            folder ($PATCHLIFE_CACHE says where); others say why they are absent. Dense is also timed eagerly in torch,
            which is where top-1 is always measured.
        dtype: Number format of weights and images.
        rounds: How often all methods take turns.
        patience: For each batch size and fraction, begin no new round after so many seconds; five are always run.
        predictors: Trained predictors of DynamicViT, a safetensors file; without them only its speed is measured.
        advice: Also time single blocks at several token counts and say which schedule is fastest here, or that
            slimming does not pay. With --data also which one is fastest, over all fractions, within --max-drop.
        max_drop: Points of top-1 that an advised schedule may lose against dense.
        report: Draw these result files again, measure nothing.
        device: auto takes a CUDA GPU where there is one, else the CPU.
        out: Folder for result (JSON), report (HTML) and plot (PNG). Older results in it stay.
    """

    model: str = field(default="", metadata={"positional": True})
    checkpoint: Path | None = None
    pretrained: bool = False
    model_args: dict[str, Any] = field(default_factory=dict, metadata={"metavar": "NAME=VALUE"})
    labels: Path | None = None
    class_order: ClassOrder | None = None
    image_size: int | None = field(default=None, metadata={"metavar": "PIXELS"})
    data: Path | None = field(default=None, metadata={"metavar": "FOLDER"})
    methods: tuple[str, ...] | None = field(default=None, metadata={"metavar": "NAME"})
    speed: bool = True
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64)
    flops: tuple[float, ...] = (0.8, 0.6, 0.45)
    engine: EngineName = "eager"
    dtype: Precision = "float32"
    rounds: int = 20
    patience: float = field(default=120.0, metadata={"metavar": "SECONDS"})
    predictors: Path | None = None
    advice: bool = False
    max_drop: float = field(default=1.0, metadata={"metavar": "POINTS"})
    report: tuple[Path, ...] | None = None
    device: Device = "auto"
    out: Path = field(default=Path("patchlife-bench"), metadata={"metavar": "FOLDER"})

    def __post_init__(self) -> None:
        if bool(self.model) == bool(self.report):
            raise ConfigError("bench measures a MODEL, or draws result files again with --report; give one of both")
        object.__setattr__(self, "flops", tuple(check_budget(fraction, "flops") for fraction in self.flops))
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError(f"batch_sizes must be at least 1, got {self.batch_sizes}")
        if not self.speed and (self.data is None or self.advice) and not self.report:
            raise ConfigError(
                "without speed there is accuracy only, which takes labelled photos and gives no advice; add --data "
                "FOLDER and drop --advice, or drop --no-speed"
            )
        if self.engine in ("onnx", "openvino") and (self.dtype != "float32" or self.device not in ("auto", "cpu")):
            raise ConfigError(
                f"--engine {self.engine} runs float32 on the CPU, got {self.dtype} on {self.device}; drop --dtype and "
                "--device, or --engine"
            )
        if not 0 <= self.max_drop <= 100:
            raise ConfigError(f"max_drop must be points of top-1, 0 to 100, got {self.max_drop:g}")
        if self.rounds < 5:
            raise ConfigError(f"rounds must be at least 5, got {self.rounds}")


def _check_at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")


def _checked_life(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as `LifeConfig` stores them. Refuses what no model could do before any model is built."""
    checked = LifeConfig.from_dict(settings)
    targets = [name for name in ("budget", "speedup", "kept") if settings.get(name) is not None]
    if len(targets) > 1:
        raise ConfigError(f"{' and '.join(targets)} say the same thing in different ways; give one of them")
    return {name: value if name == "speedup" else getattr(checked, name) for name, value in settings.items()}
