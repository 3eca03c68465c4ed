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

__all__ = ["AttentionRule", "LifeHead", "Opinion"]


class Opinion(NamedTuple):
    """What a head thinks of the patches of a batch."""

    score: Float[Tensor, "batch patches"]
    kin: Float[Tensor, "batch patches kin_dim"]


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
    """The training-free rule: attention that a patch receives in the start block, times the norm of its value.

    Models that classify from the class token are asked for that one row of attention. The others have no
    such row: there a patch is worth the attention that all tokens pay it on average. The score is what a patch adds
    to the coverage of the more important ones (`coverage.py`), patches resembling each other as their tokens do
    beside the image's mean token.
    """

    kind = "attention-rule"

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        rope: Tensor | None,
        backbone: Backbone,
        start: int,
    ) -> Opinion:
        """Judge the patches of ``tokens``, which are about to enter block ``start`` of ``backbone``."""
        rotation = backbone.token_rope(rope, start)
        if backbone.reads_class:
            logits, values = backbone.class_row(start, tokens, rotation)
            received = logits.softmax(dim=-1)
        else:
            q, k, values = backbone.project(start, tokens, rotation)
            received = _attention_received(q, k)
        norms = values.norm(dim=-1).transpose(1, 2)
        worth = (received * norms)[..., backbone.prefix :].float().sum(dim=1)  # of all heads
        patches = tokens[:, backbone.prefix :]
        kin = nn.functional.normalize(patches - patches.mean(dim=1, keepdim=True), dim=-1)
        return Opinion(added_coverage(worth / worth.sum(dim=1, keepdim=True), kin.float()), kin)


def _attention_received(
    q: Float[Tensor, "batch tokens heads dim"], k: Float[Tensor, "batch tokens heads dim"]
) -> Float[Tensor, "batch heads tokens"]:
    """Mean over the queries of softmax attention; one head at a time, so that memory stays bounded."""
    scale = q.shape[-1] ** -0.5
    return torch.stack(
        [(q[:, :, h] * scale @ k[:, :, h].transpose(1, 2)).softmax(dim=-1).mean(dim=1) for h in range(q.shape[2])],
        dim=1,
    )
