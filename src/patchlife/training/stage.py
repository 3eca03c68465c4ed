"""A training stage: a loss from the targets of a batch, and its length, learning rate and order of photos."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .targets import Targets

__all__ = ["Stage", "StageConfig", "Step", "TargetSource"]


class Step(NamedTuple):
    """The input of a stage at one step.

    Attributes:
        targets: of the photos of the batch.
        labels: class indices (batch,), -1 where unknown.
        random_draw: a number in [0, 1), the same in every process.
    """

    targets: Targets
    labels: Tensor
    random_draw: float


class TargetSource(Protocol):
    """The photos of a stage, one row for each, and the targets of its steps: cached ones, or those of fresh views.

    Attributes:
        content: a short checksum of the photos, and of all else that the targets depend on but the run's settings.
        image_size: size (height, width) of the images that the targets are of; None for the model's own size.
    """

    content: str
    image_size: tuple[int, int] | None

    def __len__(self) -> int: ...

    def labels(self, rows: Sequence[int]) -> Tensor:
        """Class indices of these rows, -1 where unknown."""
        ...

    def names(self, rows: Sequence[int]) -> list[str]:
        """Paths of the photos of these rows, for messages."""
        ...

    def targets(self, rows: Sequence[int]) -> Targets:
        """The targets of these rows, the same in every call."""
        ...

    def step_targets(self, rows: Sequence[int], part: slice, generator: torch.Generator) -> Targets:
        """The targets that a step trains on, of a ``part`` of its ``rows``; ``generator`` is that of the step."""
        ...


class Stage(nn.Module):
    """A module to train; `forward` computes a loss and named numbers for the log."""

    def forward(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        """(mean loss over the photos of the step, numbers to log)."""
        raise NotImplementedError

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters to train, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def lr_multiplier(self, name: str) -> float:
        """Factor on the learning rate for the parameter of this name."""
        return 1.0


@dataclass(frozen=True)
class StageConfig:
    """Length, learning rate and order of photos of a stage.

    Attributes:
        name: of the stage, for logs and folders.
        epochs: passes over the photos. batch_size: photos per step, over all processes together.
        learning_rate: the peak. warmup: the fraction of all steps in which the learning rate rises to the peak.
        weight_decay: AdamW's. clip: the largest norm of the gradient.
        save_every: seconds between checkpoints. seed: of the order and of every random draw.
        prior_stages: names of the stages that this run trained before.
        run_settings: other settings that change the result (weights, photos), by name, as JSON values.
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
    prior_stages: tuple[str, ...] = ()
    run_settings: Mapping[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """All settings that change the result, by name; the number of processes and the device do not."""
        own = ("epochs", "batch_size", "learning_rate", "warmup", "weight_decay", "clip")
        return {"seed": self.seed, **{f"{self.name} {name}": getattr(self, name) for name in own}, **self.run_settings}

    def steps(self, photos: int) -> int:
        """Number of steps of the stage; an incomplete last batch of an epoch is left out."""
        return self.epochs * max(1, photos // self.batch_size)

    def rows(self, step: int, photos: int) -> list[int]:
        """Indices of the photos in the global batch of a step; every epoch has its own random order."""
        epoch, batch = divmod(step, max(1, photos // self.batch_size))
        order = torch.randperm(photos, generator=self._generator(epoch, 0))
        return order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()

    def random_draw(self, step: int) -> float:
        """The random number of a step, uniform in [0, 1)."""
        return torch.rand((), generator=self._generator(step, 1)).item()

    def view_generator(self, step: int) -> torch.Generator:
        """The generator of the random views of a step."""
        return self._generator(step, 2)

    def learning_rate_at(self, step: int, steps: int) -> float:
        """Learning rate of a step: it rises linearly, then falls to zero along a cosine."""
        rise = max(1, round(self.warmup * steps))
        if step < rise:
            return self.learning_rate * (step + 1) / rise
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    def _generator(self, index: int, stream: int) -> torch.Generator:
        name = f"{self.seed} {stream} {index}"  # hashed, because torch uses the lowest 32 bits of a seed only
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))
