"""Settings of learning lives, each with its default and its meaning, once. No torch here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import ConfigError

__all__ = ["Finetune", "TrainingConfig"]

Finetune = Literal["none", "adapter", "full"]


@dataclass(frozen=True)
class TrainingConfig:
    """How lives are learned.

    Attributes:
        photos: Use at most this many photos, drawn at random; all of them if not given.
        cache: Folder for cached features; beside the adapter if not given. Fits of one model on the same photos can
            share it.
        cache_gb: Disk that cached features may take, in GB; fewer photos are used where more would not fit.
        epochs: Passes of stage 1 (the life head) over the cached features; 0 keeps a head that was learned before.
        batch_size: Photos per step, over all processes together.
        learning_rate: Peak of stage 1, reached after a short warm-up and annealed to zero along a cosine.
        finetune: Stage 2: none, adapter (low rank, merged when loaded) or full (every weight from the start block on).
        finetune_epochs: Passes of stage 2.
        finetune_learning_rate: Peak of stage 2; 1e-3 for an adapter and 1e-4 for full if not given.
        rank: Rank of the adapter's change to each weight matrix.
        label_weight: Share of the labels in stage 2's loss, in [0, 1]; the rest is the teacher.
        lowest_budget: Stage 2 draws a budget between this and 1 at every step.
        max_unreadable: Stop when more than this fraction of the photos cannot be read.
        save_every: Seconds between checkpoints.
        tracker: Also log metrics to this tracker of accelerate: tensorboard, wandb, mlflow, ...; its package must be
            installed.
        restart: Discard the checkpoints and metrics of an earlier fit to the same folder; cached features stay.
        seed: Everything random follows from it.
    """

    photos: int | None = None
    cache: Path | None = field(default=None, metadata={"metavar": "FOLDER"})
    cache_gb: float = 4.0
    epochs: int = 8
    batch_size: int = 50
    learning_rate: float = 2e-3
    finetune: Finetune = "none"
    finetune_epochs: int = 3
    finetune_learning_rate: float | None = None
    rank: int = 16
    label_weight: float = 0.0
    lowest_budget: float = 0.35
    max_unreadable: float = 0.01
    save_every: float = 30.0
    tracker: str | None = field(default=None, metadata={"metavar": "NAME"})
    restart: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.finetune not in get_args(Finetune):
            raise ConfigError(f"finetune must be one of {', '.join(get_args(Finetune))}, got {self.finetune!r}")
        for name in ("batch_size", "rank"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("photos", self.photos is None or self.photos >= 1, "at least 1")
        self._check("cache_gb", self.cache_gb > 0, "above 0")
        for name in ("epochs", "finetune_epochs"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        for name in ("label_weight", "max_unreadable"):
            self._check(name, 0 <= getattr(self, name) <= 1, "a fraction in [0, 1]")
        self._check("lowest_budget", 0 < self.lowest_budget < 1, "a fraction in (0, 1)")

    def _check(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ConfigError(f"{name} must be {rule}, got {getattr(self, name)!r}")

    @property
    def stage2_learning_rate(self) -> float:
        """The peak of stage 2, with its default filled in."""
        if self.finetune_learning_rate is not None:
            return self.finetune_learning_rate
        return 1e-4 if self.finetune == "full" else 1e-3

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self) | {"cache": str(self.cache) if self.cache else None}
