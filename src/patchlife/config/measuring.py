"""Settings of the verbs that measure models. As in `verbs.py`, the attribute docstrings are the help texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from ..errors import ConfigError
from .checks import check_at_least, check_budget
from .groups import BackboneConfig, Device, EngineName, ModelConfig, Precision, RunConfig, check_dtype
from .slimming import MODES, Mode

__all__ = ["CURVE_BUDGETS", "BenchConfig", "EvalConfig"]

CURVE_BUDGETS = (0.3, 0.35, 0.4, 0.45, 0.5, 0.61, 0.7, 0.8, 0.9, 1.0)
"""The budgets of a curve of accuracy against the budget. At 1.0 a slimmed model is the dense model."""


@dataclass(frozen=True)
class EvalConfig:
    """Measure accuracy at several budgets and compare with the dense model, on labelled photos.

    Without labels (all photos in one folder that is not a class), only the agreement with the dense model is measured.
    Of a model without a classifier, the embeddings are measured: by their cosine to those of the dense model, and by
    the accuracy of their nearest neighbours.

    Attributes:
        model: Model and weights.
        data: Folder with one subfolder of photos per class (see --class-order). For a model without a classifier any
            folder of photos; neighbours are compared only if it has several subfolders, whose names are the classes.
        labels_from: CSV file with the columns path and label, which replaces the subfolders. A label is a class name, a
            WordNet id or a class number; for a model without a classifier any text. Several labels of a photo, with
            --multi-label, are separated by ; or |.
        budgets: Budgets, as fractions of the dense model's FLOPs. Default: 1.0,0.8,0.6,0.45; with --curve
            0.3,0.35,0.4,0.45,0.5,0.61,0.7,0.8,0.9,1.0.
        modes: fixed, adaptive, or both as fixed,adaptive.
        every: Use every N-th photo.
        gallery: For a model without a classifier: photos among which the neighbours are searched, with one subfolder
            per class. Default: the photos of DATA themselves, each one left out in turn.
        neighbours: For a model without a classifier: how many neighbours vote for the class of a photo. Default: 10.
        engine: Engine that runs the model. onnx and openvino export the model at each budget on the first run and keep
            the files in a cache folder. Default: eager, or the engine of an exported bundle, whose graph of budget 1 is
            then the dense model.
        trust: Allow opening a .pt2 file (export --format torch). A .pt2 file can run any code: open it only if
            you trust its source.
        out: File for the results (JSON). If matplotlib is installed, a plot is written beside it.
        curve: Draw top-1 and KL divergence from the dense model against the budget: a picture (.png), or a page with
            the numbers in a table (.html). Without labels, the agreement with the dense model replaces top-1.
            Budgets that the model cannot reach are left out and named.
        points: Results of other methods or models to draw beside this model's: files of patchlife bench --data, or of
            eval --out, measured on the same photos.
        run: Device, number format and batches.
    """

    model: ModelConfig
    data: Path
    budgets: tuple[float, ...] = ()
    modes: tuple[str, ...] = field(default=("fixed",), metadata={"metavar": "MODE"})
    every: int = 1
    labels_from: Path | None = field(default=None, metadata={"metavar": "CSV"})
    gallery: Path | None = field(default=None, metadata={"metavar": "FOLDER"})
    neighbours: int | None = None
    engine: EngineName | None = None
    trust: bool = False
    out: Path | None = None
    curve: Path | None = None
    points: tuple[Path, ...] = field(default=(), metadata={"metavar": "RESULT"})
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def settings(self) -> list[tuple[float, Mode]]:
        """(budget, mode) for every budget in every mode."""
        return [(budget, cast(Mode, mode)) for mode in self.modes for budget in self.budgets]

    def __post_init__(self) -> None:
        budgets = tuple(self.budgets) or (CURVE_BUDGETS if self.curve else (1.0, 0.8, 0.6, 0.45))
        object.__setattr__(self, "budgets", tuple(check_budget(budget, "budgets") for budget in budgets))
        if self.curve is not None and self.curve.suffix not in (".png", ".html"):
            raise ConfigError(f"--curve must end in .png or .html, got {self.curve}")
        if self.points and not (self.curve or self.out):
            raise ConfigError("--points are drawn in a plot, got none; add --curve FILE.png or FILE.html")
        for mode in self.modes:
            if mode not in MODES:
                raise ConfigError(f"modes must be from {', '.join(MODES)}, got {mode!r}")
        if "adaptive" in self.modes and self.engine not in (None, "eager"):
            raise ConfigError(f"--engine {self.engine} runs fixed mode only, got adaptive; remove --engine or adaptive")
        if unused := [name for name in ("budget", "speedup", "kept", "mode") if name in self.model.life]:
            raise ConfigError(f"--{unused[0]} has no effect in eval; give --budgets and --modes instead")
        check_at_least(1, every=self.every, neighbours=self.neighbours)
        check_dtype(self.engine, self.run.dtype)


@dataclass(frozen=True)
class BenchConfig(BackboneConfig):
    """Compare this method with baselines on this machine: speed, and accuracy on labelled photos.

    Random weights are enough for speed.

    Attributes:
        data: Folder with one subfolder of photos per class. With it, accuracy is measured too.
        every: Use every N-th photo of --data.
        methods: Methods to compare. Default: all. dense is always included as the reference.
        speed: Measure speed. --no-speed measures accuracy only, on --data.
        batch_sizes: Batch sizes.
        flops: Budgets at which the methods are compared, as fractions of the dense model's FLOPs.
        engine: eager: plain torch. compile: torch.compile for methods with static shapes. onnx, openvino: exported
            graphs on the CPU, for dense, the no-decision bound and patchlife in fixed mode; the other methods are
            listed as left out, with the reason. Exported files are kept in a cache folder (environment variable
            PATCHLIFE_CACHE).
            The dense model is timed in eager mode as well; accuracy is always measured in eager mode.
        dtype: Number format of weights and images.
        rounds: Number of timing rounds; each round times every method once.
        patience: Start no new round after N seconds, for each batch size and budget. At least five rounds are run.
        predictors: Trained predictors of DynamicViT, a safetensors file. Without it, only the speed of DynamicViT is
            measured.
        advice: Also report on how many CPU threads the dense and the slimmed model are fastest, and the fastest
            schedule on this machine at these numbers, or that slimming does not pay. With --data, also report the
            fastest of all budgets and schedules within --max-drop.
        max_drop: Largest loss of top-1 accuracy against the dense model, in percentage points, of the schedule that
            --advice reports.
        report: Draw the report of earlier result files again, without measuring.
        device: Device of the model. auto: a CUDA GPU if there is one, else the CPU.
        out: Folder for the result (JSON), report (HTML) and plot (PNG). Earlier results in it are kept.
    """

    model: str = field(default="", metadata={"positional": True})
    data: Path | None = field(default=None, metadata={"metavar": "FOLDER"})
    every: int = 1
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
        super().__post_init__()
        if bool(self.model) == bool(self.report):
            got = "both" if self.model else "neither"
            raise ConfigError(f"expected either a MODEL to measure or result files to draw (--report FILE), got {got}")
        object.__setattr__(self, "flops", tuple(check_budget(fraction, "flops") for fraction in self.flops))
        check_at_least(1, every=self.every)
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError(f"batch_sizes must be at least 1, got {self.batch_sizes}")
        if not self.speed and (self.data is None or self.advice) and not self.report:
            raise ConfigError(
                "--no-speed measures accuracy only, which needs labelled photos and gives no advice; add --data FOLDER "
                "and remove --advice, or remove --no-speed"
            )
        if self.engine in ("onnx", "openvino") and (self.dtype != "float32" or self.device not in ("auto", "cpu")):
            raise ConfigError(
                f"--engine {self.engine} runs float32 on the CPU, got {self.dtype} on {self.device}; drop --dtype and "
                "--device, or --engine"
            )
        if not 0 <= self.max_drop <= 100:
            raise ConfigError(f"max_drop must be in percentage points, 0 to 100, got {self.max_drop:g}")
        if self.rounds < 5:
            raise ConfigError(f"rounds must be at least 5, got {self.rounds}")
