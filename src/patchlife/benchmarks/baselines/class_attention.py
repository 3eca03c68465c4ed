"""Patches ranked once by the attention that the class token pays them at the start block.

The score of EViT (arXiv 2202.07800), asked a single time, without fusing what is dropped.
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
    """Attention of the class token, mean over the heads."""

    kind = "class-attention"

    def forward(self, tokens: Tensor, rope: Tensor | None, backbone: Backbone, start: int) -> Scores:
        """Judge the patches of ``tokens``, which are about to enter block ``start``."""
        logits = backbone.class_row(start, tokens, backbone.token_rope(rope, start))
        score = logits.float().softmax(dim=-1).mean(dim=1)[:, backbone.prefix :]
        return Scores(score, tokens[:, backbone.prefix :])


def _build(backbone: Backbone, target: float, images: Images) -> Baseline:
    check_class_token(backbone, "class attention")
    return decided_once(backbone, target, ClassAttention())


CLASS_ATTENTION = Method(
    "class-attention", "class attention, once", "score of EViT, arXiv 2202.07800", "nothing to train", _build
)
