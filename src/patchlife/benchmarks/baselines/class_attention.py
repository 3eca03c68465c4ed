"""Patches ranked once, by the class token's attention to them in the start block.

This is the score of EViT (arXiv 2202.07800), computed a single time; dropped patches are not fused.
"""

from __future__ import annotations

from torch import Tensor

from ...backbones import Backbone
from ...slimming import Scorer
from ...slimming.scorers import Scores
from .base import Baseline, Images, Method, check_class_token
from .slim_model import decided_once

__all__ = ["CLASS_ATTENTION", "ClassAttention"]


class ClassAttention(Scorer):
    """Scores patches by the class token's attention, mean over the heads."""

    kind = "class-attention"

    def forward(self, tokens: Tensor, rope: Tensor | None, backbone: Backbone, start: int) -> Scores:
        """Score the patches of ``tokens``, the input of block ``start``."""
        logits = backbone.class_row(start, tokens, backbone.token_rope(rope, start))
        score = logits.float().softmax(dim=-1).mean(dim=1)[:, backbone.prefix :]
        return Scores(score, tokens[:, backbone.prefix :])


def _build(backbone: Backbone, target: float, images: Images) -> Baseline:
    check_class_token(backbone, "class attention")
    return decided_once(backbone, target, ClassAttention())


CLASS_ATTENTION = Method(
    "class-attention", "class attention, once", "score of EViT, arXiv 2202.07800", "nothing to train", _build
)
