"""What a stage of a fit is: a loss from a batch of cached targets, and how long and how fast it learns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .targets import Targets

__all__ = ["Stage", "StageConfig", "Step"]


class Step(NamedTuple):
    """What a stage is given: a batch, and a number in [0, 1) to draw from, the same on every process."""

    targets: Targets
    labels: Tensor
    chance: float


class Stage(nn.Module):
    """Something that learns: `forward` turns a step into a loss and named numbers for the log."""

    def forward(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        """The loss of one step, mean over its photos."""
        raise NotImplementedError

    def trained(self) -> dict[str, nn.Parameter]:
        """What is learned, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def lr_multiplier(self, name: str) -> float:
        """How many times the stage_config's learning rate a parameter learns at."""
        return 1.0


@dataclass(frozen=True)
class StageConfig:
    """How much, how fast and in which order.

    Attributes:
        name: of the stage, for logs and folders.
        epochs: passes over the photos. batch_size: photos per step, all processes together.
        learning_rate: the peak. warmup: the fraction of all steps that lead up to it.
        weight_decay: AdamW's. clip: the gradient's largest norm.
        save_every: seconds between checkpoints. seed: of the order and of every draw.
        after: names of the run's earlier stages.
        also: what else the result follows from (weights, photos), by name, as JSON values.
    """

    name: str
    epochs: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    save_every: float = 30.0
    seed: int = 0
    after: tuple[str, ...] = ()
    also: Mapping[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """All that the result follows from, by name. Processes, device and how often it is saved are not among it."""
        own = ("epochs", "batch_size", "learning_rate", "warmup", "weight_decay", "clip")
        return {"seed": self.seed, **{f"{self.name} {name}": getattr(self, name) for name in own}, **self.also}

    def steps(self, photos: int) -> int:
        """Steps of the whole stage_config; photos that do not fill an epoch's last batch wait for the next epoch."""
        return self.epochs * max(1, photos // self.batch_size)

    def rows(self, step: int, photos: int) -> list[int]:
        """The photos of one step's global batch."""
        epoch, batch = divmod(step, max(1, photos // self.batch_size))
        order = torch.randperm(photos, generator=self._dice(epoch, 0))
        return order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()

    def chance(self, step: int) -> float:
        """The step's draw, uniform in [0, 1)."""
        return torch.rand((), generator=self._dice(step, 1)).item()

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step: a linear rise, then a cosine to zero."""
        rise = max(1, round(self.warmup * steps))
        if step < rise:
            return self.learning_rate * (step + 1) / rise
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    def _dice(self, index: int, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 2 + stream) * 2**32 + index)
