"""An engine where the command line's verbs expect a slimmed model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..config import LifeConfig, Mode, ModelConfig
from ..errors import ConfigError
from ..io.files import sha256_of
from ..slimming import Lives, SlimModel
from .bundle import Bundle
from .engine import Engine
from .open_file import open_engine
from .opening import Pipeline

__all__ = ["EngineClassifier", "EnginePipeline", "open_exported"]


class EngineClassifier:
    """What `predict` and `evaluate` ask of a `SlimModel`, answered by engines, one for each budget.

    Args:
        open_at: gives the engine of settings; asked once for each. config: the first of them.
        weights: what tells the model from others, as tensors.

    Attributes:
        calibration: None; engines run in fixed mode.
    """

    calibration = None

    def __init__(self, open_at: Callable[[LifeConfig], Engine], config: LifeConfig, weights: dict[str, Tensor]) -> None:
        self.open_at, self.config, self.weights = functools.cache(open_at), config, weights

    @property
    def engine(self) -> Engine:
        """What runs at the present settings; made when it is first needed."""
        return self.open_at(self.config)

    def set_budget(self, budget: float) -> EngineClassifier:
        """Run at this budget from now on; its engine is made when it is first needed."""
        if budget != self.config.budget or self.config.kept:
            self.config = self.config.replace(budget=budget)
        return self

    @contextmanager
    def temporarily(self) -> Iterator[EngineClassifier]:
        """Let settings be changed for a while; afterwards they are the exact earlier ones."""
        before = self.config
        try:
            yield self
        finally:
            self.config = before

    def set_mode(self, mode: Mode) -> EngineClassifier:
        """Refuse any mode but fixed."""
        if mode != "fixed":
            raise ConfigError(f"engines run fixed mode only, got {mode}")
        return self

    def predict(self, images: Tensor) -> tuple[Tensor, Lives]:
        """(logits, lives) of a batch."""
        return self.engine.predict(images)

    def flops_of(self, lives: Lives, image_size: tuple[int, int] | None = None) -> list[int]:
        """FLOPs of each image: the same for all."""
        return [self.engine.metadata.flops] * len(lives)

    def cost(self) -> EngineCost:
        """What the dense model costs."""
        return EngineCost(self.engine.metadata.dense_flops)

    def state_dict(self) -> dict[str, Tensor]:
        """Weights, or for a file its checksum: either changes when the answers may."""
        return self.weights


@dataclass(frozen=True)
class EngineCost:
    """FLOPs per image of the dense model."""

    dense: int


@dataclass(frozen=True)
class EnginePipeline(Pipeline):
    """A `Pipeline` that an engine runs."""

    @property
    def device(self) -> torch.device:
        """Engines take their images on the CPU."""
        return torch.device("cpu")


def open_exported(config: ModelConfig, trust: bool = False) -> Pipeline:
    """An exported file or package, pipeline for photos; ``trust`` opens a .pt2 file, too (see `open_engine`).

    Raises ConfigError for settings that were fixed when it was exported, and for a budget that is not in it.
    """
    path = Path(config.model)
    fixed = {"--checkpoint": config.checkpoint, "--pretrained": config.pretrained, "--image-size": config.image_size}
    said = [option for option, value in fixed.items() if value] + ["--model-args"] * bool(config.model_args)
    said += [f"--{name}" for name in config.life if name != "budget"]
    if said:
        raise ConfigError(f"{path} is an exported model: {', '.join(said)} was settled by patchlife export; drop it")
    engine, open_at, digest = _at_budget(path, config.life.get("budget"), trust)
    metadata = engine.metadata
    labels = metadata.read_labels()
    if config.labels:
        from ..data.labels import read_labels

        labels = read_labels(config.labels, len(labels.names))
    weights = {"sha256": torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8)}
    model = EngineClassifier(open_at, LifeConfig.from_dict(metadata.config), weights)
    return EnginePipeline(metadata.model, cast(SlimModel, model), metadata.read_preprocess(), labels)


def _at_budget(path: Path, budget: float | None, trust: bool) -> tuple[Engine, Callable[[LifeConfig], Engine], str]:
    """(the engine of a file, or of a package's graph of ``budget``; what opens the others; checksum of all of it)."""
    if path.is_dir():
        package = Bundle(path)
        return package.engine(budget), lambda settings: package.engine(settings.budget), package.sha256
    engine = open_engine(path, budget=budget, trust=trust)
    own = LifeConfig.from_dict(engine.metadata.config)

    def open_at(settings: LifeConfig) -> Engine:
        return engine if settings == own else open_engine(path, budget=settings.budget, trust=trust)

    return engine, open_at, sha256_of(path)
