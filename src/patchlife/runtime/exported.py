"""Exported files and bundles as classifiers, with preprocessing and labels from their metadata."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ..config import LifeConfig, Mode, ModelConfig
from ..data.labels import read_labels
from ..errors import ConfigError
from ..io.files import sha256_of
from ..slimming import Calibration, Lives
from .bundle import Bundle
from .engine import Engine
from .open_file import open_engine
from .pipeline import Pipeline

__all__ = ["EngineClassifier", "open_exported"]


class EngineClassifier:
    """A `Classifier` that runs engines, one for each budget.

    Args:
        engine_for: returns the engine for given settings; called once for each.
        config: the first settings.
        weights: tensors that differ between models with different predictions.

    Attributes:
        calibration: None, because engines run in fixed mode.
        device: the CPU, where engines expect images.
        dtype: float32, in which engines expect images.
    """

    settings: LifeConfig
    calibration: Calibration | None = None
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(
        self, engine_for: Callable[[LifeConfig], Engine], config: LifeConfig, weights: dict[str, Tensor]
    ) -> None:
        self.engine_for, self.settings, self.weights = functools.cache(engine_for), config, weights

    @property
    def engine(self) -> Engine:
        """The engine for the present settings; created on first use."""
        return self.engine_for(self.settings)

    @property
    def dense_flops(self) -> float:
        """FLOPs per image of the dense model."""
        return self.engine.metadata.dense_flops

    def set_budget(self, budget: float) -> Self:
        """Run at this budget from now on; its engine is created on first use."""
        if budget != self.settings.budget or self.settings.kept:
            self.settings = self.settings.replace(budget=budget)
        return self

    def set_mode(self, mode: Mode) -> Self:
        """Raise ConfigError for any mode but fixed."""
        if mode != "fixed":
            raise ConfigError(f"engines run in fixed mode only, got {mode}")
        return self

    @contextmanager
    def temporarily(self) -> Iterator[Self]:
        """Restore the settings in use after a ``with`` block."""
        before = self.settings
        try:
            yield self
        finally:
            self.settings = before

    def predict(self, images: Tensor) -> tuple[Tensor, Lives]:
        """(logits, lives) of a batch."""
        return self.engine.predict(images)

    def embedding(self, images: Tensor) -> tuple[Tensor, Lives]:
        """(embedding, lives) of a batch. Raises ConfigError for a file that gives logits."""
        if self.engine.metadata.labels:
            raise ConfigError(
                "this exported model gives logits, not embeddings; give the model or adapter that it was exported from"
            )
        return self.engine.predict(images)

    def flops_of(self, lives: Lives, image_size: tuple[int, int] | None = None) -> list[int]:
        """FLOPs of each image: the same for all."""
        return [self.engine.metadata.flops] * len(lives)

    def state_dict(self) -> dict[str, Tensor]:
        """The weights; of a file, its checksum as a tensor."""
        return self.weights


def open_exported(config: ModelConfig, trust: bool = False) -> Pipeline[EngineClassifier]:
    """The pipeline of an exported file or bundle; ``trust`` also opens a .pt2 file (see `open_engine`).

    Raises ConfigError for settings that were fixed at export, and for a budget that is not in it.
    """
    path = Path(config.model)
    fixed = {"--checkpoint": config.checkpoint, "--pretrained": config.pretrained, "--image-size": config.image_size}
    given = [option for option, value in fixed.items() if value] + ["--model-args"] * bool(config.model_args)
    given += [f"--{name}" for name in config.life if name != "budget"]
    if given:
        raise ConfigError(f"{path} is an exported model: {', '.join(given)} was fixed at export; remove it")
    engine, engine_for, digest = _at_budget(path, config.life.get("budget"), trust)
    metadata = engine.metadata
    labels = metadata.read_labels()
    if config.labels:
        labels = read_labels(config.labels, len(labels.names))
    weights = {"sha256": torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8)}
    model = EngineClassifier(engine_for, LifeConfig.from_dict(metadata.config), weights)
    multi_label = config.multi_label or metadata.multi_label
    return Pipeline(metadata.model, model, metadata.read_preprocess(), labels, multi_label)


def _at_budget(path: Path, budget: float | None, trust: bool) -> tuple[Engine, Callable[[LifeConfig], Engine], str]:
    """(the engine of a file, or of a bundle's graph of ``budget``; a function for other settings; a checksum)."""
    if path.is_dir():
        bundle = Bundle(path)
        return bundle.engine(budget), lambda settings: bundle.engine(settings.budget), bundle.sha256
    engine = open_engine(path, budget=budget, trust=trust)
    own = LifeConfig.from_dict(engine.metadata.config)

    def engine_for(settings: LifeConfig) -> Engine:
        return engine if settings == own else open_engine(path, budget=settings.budget, trust=trust)

    return engine, engine_for, sha256_of(path)
