"""Settings of training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import ConfigError
from .checks import check_wholes

__all__ = ["Finetune", "Target", "TrainingConfig", "Views"]

Finetune = Literal["none", "adapter", "full"]
Target = Literal["logits", "features", "pixels"]
Views = Literal["fresh", "cached"]


@dataclass(frozen=True)
class TrainingConfig:
    """How the scorer and, optionally, the backbone are trained.

    Training has two stages. Stage 1 trains the scorer on features of the dense model, which are computed once and
    cached. Stage 2, off by default, trains the backbone by distillation from the dense model, and the scorer along with
    it; both see the same random view of each photo, unless ``views`` says otherwise. It distils the logits, or for a
    model without a classifier the embedding and the patch tokens, unless a target says otherwise.

    Attributes:
        photos: Train on at most N photos, drawn at random. Default: all photos.
        cache: Folder for cached features. Default: beside the adapter. Several fits of the same model on the same
            photos can share it.
        cache_gb: Maximum size of the cached features in GB, and of the cached pixels of --views fresh. Photos that do
            not fit are left out.
        epochs: Epochs of stage 1. 0 skips stage 1 and keeps the scorer that the adapter already has.
        batch_size: Photos per training step, summed over all processes.
        learning_rate: Peak learning rate of stage 1, after a short warm-up and before cosine decay to zero.
        finetune: Stage 2. none: no stage 2. adapter: low-rank deltas of the weight matrices and shifts of the vectors,
            which follow the budget and are zero at budget 1.0. full: all weights from the start block on, the same at
            every budget.
        finetune_epochs: Epochs of stage 2.
        finetune_learning_rate: Peak learning rate of stage 2. Default: 1e-3 for adapter, 1e-4 for full.
        rank: Rank of the low-rank deltas (--finetune adapter). Its channels are divided among two gates, which open as
            the budget falls.
        target: What training is for. logits: the classifier. features: patch features, for dense prediction with any
            head. pixels: the answers of a dense head, which only the Python function can be given. features and pixels
            change what the scorer learns too. Default: logits, or for a model without a classifier its embedding and
            patch tokens.
        feature_blocks: Blocks whose patch features are distilled (--target features), counted from 0, or from the end
            if negative. Default: the last block.
        label_weight: Weight of the cross-entropy with the labels in the loss of stage 2, in [0, 1]. The distillation
            loss has weight 1 - X. 0 needs no labels.
        patch_weight: Weight of the patch tokens in the loss of stage 2 of a model without a classifier or with a dense
            head, in [0, 1]. The loss of the output, the embedding or the answers of the head, has weight 1 - X. 0 does
            not cache the patch tokens of a model without a classifier.
        token_weight: Weight of the image token in the loss of stage 2, at least 0. The image token is the class token,
            or the mean of the patches of a model that does not read one; its cosine distance to that of the dense
            model, after each block from the start block on, is added. Not for targets features and pixels.
        views: What stage 2 sees of a photo. fresh: in each epoch another random crop; half of the crops are flipped,
            and half are mixed with another photo (none with --label-weight). The dense model runs at every step.
            cached: the photo as the model gets it in use. The dense model runs once on each photo.
        lowest_budget: Stage 2 draws the budget of every step at random between this value and 1. Default: 0.3 with
            several start blocks, if the model can reach it, else 0.35.
        starts: Start blocks that the scorer is fitted for; low budgets start earlier. Default: those of the model's
            settings if they name any, else a sixth and a quarter of the depth; for dense prediction a quarter.
        max_unreadable: Stop if more than this fraction of the photos cannot be read.
        save_every: Seconds between checkpoints.
        tracker: Also log metrics to this tracker of accelerate: tensorboard, wandb, mlflow, ... Its package must be
            installed.
        restart: Discard checkpoints and metrics of an earlier fit to the same folder. Cached features are kept.
        seed: Seed of all random numbers.
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
    rank: int = 24
    target: Target | None = None
    feature_blocks: tuple[int, ...] | None = None
    label_weight: float = 0.0
    patch_weight: float = 0.5
    token_weight: float = 0.0
    views: Views = "fresh"
    lowest_budget: float | None = None
    starts: tuple[int, ...] | None = None
    max_unreadable: float = 0.01
    save_every: float = 30.0
    tracker: str | None = field(default=None, metadata={"metavar": "NAME"})
    restart: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.finetune not in get_args(Finetune):
            raise ConfigError(f"finetune must be one of {', '.join(get_args(Finetune))}, got {self.finetune!r}")
        if self.target is not None and self.target not in get_args(Target):
            raise ConfigError(f"target must be one of {', '.join(get_args(Target))}, got {self.target!r}")
        if self.views not in get_args(Views):
            raise ConfigError(f"views must be one of {', '.join(get_args(Views))}, got {self.views!r}")
        for name in ("batch_size", "rank"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("photos", self.photos is None or self.photos >= 1, "at least 1")
        self._check("cache_gb", self.cache_gb > 0, "above 0")
        for name in ("epochs", "finetune_epochs"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        for name in ("label_weight", "patch_weight", "max_unreadable"):
            self._check(name, 0 <= getattr(self, name) <= 1, "a fraction in [0, 1]")
        self._check("token_weight", self.token_weight >= 0, "at least 0")
        self._check("lowest_budget", self.lowest_budget is None or 0 < self.lowest_budget < 1, "a fraction in (0, 1)")
        if self.starts is not None:
            object.__setattr__(self, "starts", tuple(sorted(set(check_wholes(self.starts, "starts")))))

    def _check(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ConfigError(f"{name} must be {rule}, got {getattr(self, name)!r}")

    @property
    def fresh_views(self) -> bool:
        """Whether there is a stage 2 and it sees fresh views."""
        return self.finetune != "none" and self.views == "fresh"

    @property
    def stage2_learning_rate(self) -> float:
        """Peak learning rate of stage 2, with its default filled in."""
        if self.finetune_learning_rate is not None:
            return self.finetune_learning_rate
        return 1e-4 if self.finetune == "full" else 1e-3

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self) | {"cache": str(self.cache) if self.cache else None}
