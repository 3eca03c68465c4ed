"""Patches are dropped at random: a control that every scorer must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backbones import Backbone
from ...slimming import Scorer
from ...slimming.scorers import Scores
from .base import Baseline, Images, Method
from .slim_model import decided_once

__all__ = ["RANDOM"]


class RandomScores(Scorer):
    """Random scores from a fixed seed, equal for all images: runs repeat, and images do not depend on their batch."""

    kind = "random"

    def forward(self, tokens: Tensor, rope: Tensor | None, backbone: Backbone, start: int) -> Scores:
        """The same random scores for every image."""
        patches = tokens.shape[1] - backbone.prefix
        drawn = torch.rand(patches, generator=torch.Generator().manual_seed(0)).to(tokens.device)
        return Scores(drawn.expand(len(tokens), -1), tokens[:, backbone.prefix :])


def _build(backbone: Backbone, target: float, images: Images) -> Baseline:
    return decided_once(backbone, target, RandomScores())


RANDOM = Method("random", "random", "control", "nothing to train", _build)
