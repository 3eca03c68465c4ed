"""What ``patchlife bench`` can be told. No torch here: help texts are made from this file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..checks import check_budget
from ..config import ClassOrder, Device, EngineName
from ..errors import ConfigError

__all__ = ["BenchConfig", "Precision"]

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
            limit and ours in fixed mode as exported graphs, made on the first run and kept in a cache folder
            ($PATCHLIFE_CACHE says where); others say why they are absent. Dense is also timed eagerly in torch, which
            is where top-1 is always measured.
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
