"""Baselines that decide once: a `SlimModel` with another scorer."""

from __future__ import annotations

from torch import Tensor

from ...backbones import Backbone
from ...config import LifeConfig
from ...slimming import Scorer, SlimModel
from .base import Baseline, Images

__all__ = ["Slimmed", "decided_once"]


class Slimmed(Baseline):
    """A `SlimModel` as a baseline."""

    def __init__(self, model: SlimModel) -> None:
        super().__init__(model.backbone, f"patches {model.schedule()}")
        self.model = model

    def forward(self, images: Images) -> Tensor:
        """Logits."""
        return self.model.output(images)

    def tensor_module(self) -> SlimModel:
        """The model inside."""
        return self.model

    def flops(self, images: Images) -> float:
        """FLOPs per image; in adaptive mode the mean over ``images``."""
        size = (images.shape[-2], images.shape[-1])
        if self.model.settings.mode == "fixed":
            return self.model.cost(size).total(self.model.schedule(size).kept)
        flops = self.model.flops_of(self.model.lives(images), size)
        return sum(flops) / len(flops)


def decided_once(backbone: Backbone, target: float, scorer: Scorer) -> Baseline:
    """Slices in the order of ``scorer``'s scores on the default schedule, without merging."""
    return Slimmed(SlimModel(backbone, LifeConfig(budget=target, merge=False), scorer).eval())
