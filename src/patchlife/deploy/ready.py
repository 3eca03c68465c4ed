"""An engine where the command line's verbs expect a slimmed model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..config import Device, LifeConfig, ModelConfig
from ..errors import ConfigError
from ..files import SUMS, sha256_of
from ..life import Lives, SlimModel
from ..models import ReadyModel
from .cache import cached_engine
from .engines import Engine, eager_engine, open_engine

__all__ = ["ReadyEngine", "open_ready", "with_engine"]


class EngineModel:
    """What `predict` asks of a `SlimModel`, answered by an engine.

    Attributes:
        engine: what runs. config: settings that it was exported with.
        weights: what tells it from other models, as tensors.
        calibration: None; engines run in fixed mode.
    """

    calibration = None

    def __init__(self, engine: Engine, weights: dict[str, Tensor]) -> None:
        self.engine, self.weights = engine, weights
        self.config = LifeConfig.from_dict(engine.about.config)

    def predict(self, images: Tensor) -> tuple[Tensor, Lives]:
        """(logits, lives) of a batch."""
        return self.engine.predict(images)

    def flops_of(self, lives: Lives, image_size: tuple[int, int] | None = None) -> list[int]:
        """FLOPs of each image: the same for all."""
        return [self.engine.about.flops] * len(lives)

    def cost(self) -> EngineCost:
        """What the dense model costs."""
        return EngineCost(self.engine.about.dense_flops)

    def state_dict(self) -> dict[str, Tensor]:
        """Weights, or for a file its checksum: either changes when the answers may."""
        return self.weights


@dataclass(frozen=True)
class EngineCost:
    """FLOPs per image of the dense model."""

    dense: int


@dataclass(frozen=True)
class ReadyEngine(ReadyModel):
    """A `ReadyModel` that an engine runs."""

    @property
    def device(self) -> torch.device:
        """Engines take their images on the CPU."""
        return torch.device("cpu")


def open_ready(config: ModelConfig) -> ReadyModel:
    """An exported file or package, ready for photos.

    Raises ConfigError for settings that were fixed when it was exported, and for a budget that is not in it.
    """
    path = Path(config.model)
    fixed = {"--checkpoint": config.checkpoint, "--pretrained": config.pretrained, "--image-size": config.image_size}
    said = [option for option, value in fixed.items() if value]
    said += [f"--{name}" for name in config.life if name != "budget"]
    if said:
        raise ConfigError(f"{path} is an exported model: {', '.join(said)} was settled by patchlife export; drop it")
    engine = open_engine(path, budget=config.life.get("budget"))
    about = engine.about
    digest = sha256_of(path / SUMS if path.is_dir() else path)
    labels = about.read_labels()
    if config.labels:
        from ..labels import read_labels

        labels = read_labels(config.labels, len(labels.names))
    weights = {"sha256": torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8)}
    return _ready(about.model, engine, weights, about.read_preprocess(), labels)


def with_engine(ready: ReadyModel, engine: str, device: Device) -> ReadyModel:
    """``ready`` run by another engine: compile, or onnx and openvino through an export kept in a cache."""
    model = ready.model
    if model.config.mode != "fixed":
        raise ConfigError(f"--engine {engine} runs fixed mode only, got adaptive; drop one of the two")
    if engine == "compile":
        runs = eager_engine(model, compiled=True)
    elif device == "cuda":
        raise ConfigError(f"--engine {engine} runs on the CPU, got --device cuda; drop one of the two")
    else:
        kind: Any = engine
        runs = cached_engine(model, kind, ready.labels, ready.preprocess)
    return _ready(ready.name, runs, model.state_dict(), ready.preprocess, ready.labels)


def _ready(name: str, engine: Engine, weights: dict[str, Tensor], preprocess: Any, labels: Any) -> ReadyEngine:
    return ReadyEngine(name, cast(SlimModel, EngineModel(engine, weights)), preprocess, labels)
