"""A model with everything needed to run it on photos: preprocessing and class names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import Device
from ..data import Preprocess
from ..data.labels import Labels
from ..errors import ConfigError
from ..slimming.classifier import Classifier

__all__ = ["Pipeline", "pick_device"]

Model = TypeVar("Model", bound=Classifier, covariant=True)


@dataclass(frozen=True)
class Pipeline(Generic[Model]):
    """A model, its preprocessing and its class names.

    Attributes:
        name: of the backbone, for people and for names of files.
        model: a `SlimModel` in eval mode on its device, or an `EngineClassifier`.
        preprocess: from a photo to the model's input.
        labels: names of the classes; none for a model without a classifier.
        multi_label: whether a photo can have several classes or none: the probability of each class is the sigmoid of
            its logit, not the softmax.
    """

    name: str
    model: Model
    preprocess: Preprocess
    labels: Labels
    multi_label: bool = False

    @property
    def device(self) -> torch.device:
        """Where the model expects images."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format in which the model expects images."""
        return self.model.dtype

    def probabilities(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
        """The probability of each class: each by itself for a multi-label model, else their sum is 1."""
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=-1)


def pick_device(device: Device) -> torch.device:
    """The torch device for a --device option. Raises ConfigError if this machine has no such device."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return torch.device("cuda" if available["cuda"] else "cpu")
    if not available[device]:
        names = ", ".join(name for name, usable in available.items() if usable)
        raise ConfigError(f"torch finds no {device} device, only {names}; choose --device auto")
    return torch.device(device)
