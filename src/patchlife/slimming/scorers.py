"""Who decides: modules that look once at the tokens entering the start block and score every patch.

A score is on any scale of its own; the higher, the longer the patch lives. `plan.py` turns scores into lives.
Kin vectors say which patches resemble each other; they choose the heirs (`heirs.py`).
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..backbones import Backbone
from .coverage import added_coverage
from .similarity import Likeness

__all__ = ["AttentionRule", "LifeHead", "Opinion", "attention_received"]


class Opinion(NamedTuple):
    """What a head thinks of the patches of a batch.

    Attributes:
        score: the higher, the longer a patch lives.
        kin: vectors with unit rows; patches resemble each other as these do.
        likeness: the cosines of ``kin``, if the head has computed them anyway.
    """

    score: Float[Tensor, "batch patches"]
    kin: Float[Tensor, "batch patches kin_dim"]
    likeness: Likeness | None = None

    def alike(self) -> Likeness:
        """The cosines of ``kin``."""
        return Likeness.of(self.kin) if self.likeness is None else self.likeness


class LifeHead(nn.Module):
    """Interface of everything that can decide: the rule below, and heads that were learned.

    Attributes:
        kind: what adapters call it.
    """

    kind: ClassVar[str]

    def settings(self) -> dict[str, Any]:
        """Arguments that build this head again (its weights are saved apart)."""
        return {}

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        rope: Tensor | None,
        backbone: Backbone,
        start: int,
    ) -> Opinion:
        """Judge the patches of ``tokens``, which are about to enter block ``start`` of ``backbone``."""
        raise NotImplementedError


class AttentionRule(LifeHead):
    """The training-free rule: the attention that a patch receives in the start block, if nobody better speaks for it.

    The score is what a patch adds to the coverage of those that receive more (`coverage.py`); patches resemble each
    other as their tokens do.
    """

    kind = "attention-coverage"  # a new name whenever scores change, for calibrations are of scores

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        rope: Tensor | None,
        backbone: Backbone,
        start: int,
    ) -> Opinion:
        """Judge the patches of ``tokens``, which are about to enter block ``start`` of ``backbone``."""
        received = attention_received(tokens, rope, backbone, start).float().sum(dim=1)
        kin = nn.functional.normalize(tokens[:, backbone.prefix :], dim=-1)
        score, likeness = added_coverage(received / received.sum(dim=1, keepdim=True), kin)
        return Opinion(score, kin, likeness)


def attention_received(
    tokens: Float[Tensor, "batch tokens dim"], rope: Tensor | None, backbone: Backbone, index: int
) -> Float[Tensor, "batch heads patches"]:
    """Attention that patches receive in block ``index``, whose input is ``tokens``.

    Models that classify from the class token are asked for that one row of attention. The others have no such row:
    there it is what all tokens pay a patch on average.
    """
    rotation = backbone.token_rope(rope, index)
    if backbone.reads_class:
        return backbone.class_row(index, tokens, rotation).softmax(dim=-1)[..., backbone.prefix :]
    q, k, _ = backbone.project(index, tokens, rotation)
    scale, heads = q.shape[-1] ** -0.5, range(q.shape[2])
    # one head at a time, so that memory stays bounded
    each = [(q[:, :, h] * scale @ k[:, :, h].transpose(1, 2)).softmax(dim=-1).mean(dim=1) for h in heads]
    return torch.stack(each, dim=1)[..., backbone.prefix :]
