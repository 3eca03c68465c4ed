"""The protocol that a slimmed model and an engine for an exported file share."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol, Self

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import LifeConfig, Mode
from .calibration import Calibration
from .lives import Lives

__all__ = ["Classifier"]


class Classifier(Protocol):
    """A model that classifies images at several budgets: `SlimModel`, and engines by `runtime.EngineClassifier`."""

    @property
    def settings(self) -> LifeConfig:
        """Budget, mode and drop points in use."""

    @property
    def calibration(self) -> Calibration | None:
        """The thresholds of adaptive mode; None without any."""

    @property
    def device(self) -> torch.device:
        """Where images are expected."""

    @property
    def dtype(self) -> torch.dtype:
        """Number format in which images are expected."""

    @property
    def dense_flops(self) -> float:
        """FLOPs per image of the dense model."""

    def set_budget(self, budget: float) -> Self:
        """Run at this budget from now on."""

    def set_mode(self, mode: Mode) -> Self:
        """Run in this mode from now on. Raises ConfigError for a mode that it does not have."""

    def temporarily(self) -> AbstractContextManager[Self]:
        """Restore the settings in use after a ``with`` block."""

    def predict(self, images: Float[Tensor, "batch channels height width"]) -> tuple[Tensor, Lives]:
        """(logits, lives) of a batch."""

    def embedding(self, images: Float[Tensor, "batch channels height width"]) -> tuple[Tensor, Lives]:
        """(embedding, lives) of a batch."""

    def flops_of(self, lives: Lives, image_size: tuple[int, int] | None = None) -> list[int]:
        """FLOPs of each image of ``lives``."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors that differ between models with different predictions."""
