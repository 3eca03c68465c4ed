"""The learned head: one look at the tokens that enter the start block, and every patch's life is settled."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..backbones import Backbone
from .coverage import added_coverage
from .scorers import LifeHead, Opinion

__all__ = ["LifeRegressor"]


class LifeRegressor(LifeHead):
    """Predicts how much the later blocks will read from each patch, and which patches will grow alike.

    Two outputs of one small network, both regressed from what the dense model does later: a patch's share of
    importance, and a vector whose cosines are the patches' similarity a few blocks on. The score is what a patch
    adds to the coverage of the more important ones (`coverage.py`); the vectors also name its heir.

    Attributes:
        dim: token width of the backbone. prefix: its prefix tokens; their mean is a hint given to every patch.
        width: hidden units. kin_dim: size of the similarity vectors.
    """

    kind = "life-regressor"

    def __init__(self, dim: int, prefix: int, width: int = 96, kin_dim: int = 48) -> None:
        super().__init__()
        self.dim, self.prefix, self.width, self.kin_dim = dim, prefix, width, kin_dim
        self.norm = nn.LayerNorm(dim)
        self.patch = nn.Linear(dim, width)
        self.context = nn.Linear(dim, width)
        self.importance = nn.Linear(width, 1)
        self.kinship = nn.Linear(width, kin_dim)
        self.kinship_skip = nn.Linear(dim, kin_dim, bias=False)

    def settings(self) -> dict[str, Any]:
        """Arguments that build this head again."""
        return {"dim": self.dim, "prefix": self.prefix, "width": self.width, "kin_dim": self.kin_dim}

    def regress(self, tokens: Float[Tensor, "batch tokens dim"]) -> tuple[Tensor, Tensor]:
        """(importance logits (batch, patches), kin with unit rows (batch, patches, kin_dim))."""
        x = self.norm(tokens)
        patches = x[:, self.prefix :]
        context = (x[:, : self.prefix] if self.prefix else patches).mean(dim=1, keepdim=True)
        hidden = F.gelu(self.patch(patches) + self.context(context))
        kin = self.kinship(hidden) + self.kinship_skip(patches)
        return self.importance(hidden).squeeze(-1), F.normalize(kin, dim=-1)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"], rope: Tensor | None, backbone: Backbone, start: int
    ) -> Opinion:
        """Judge the patches of ``tokens``, which are about to enter block ``start`` of ``backbone``."""
        logits, kin = self.regress(tokens.to(self.norm.weight.dtype))
        importance = logits.float().softmax(dim=1)
        score, likeness = added_coverage(importance, kin)
        return Opinion(score, kin, likeness)
