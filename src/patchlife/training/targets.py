"""What the frozen teacher says about an image's patches, from one ordinary forward pass. No labels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..backbones import Backbone
from ..slimming.scorers import attention_received

__all__ = ["Targets", "compute_targets", "middle_block"]


class Targets(NamedTuple):
    """A batch as the teacher sees it.

    Attributes:
        tokens: what enters the start block: the head's input.
        importance: how much the later blocks read from each patch; sums to 1 over an image.
        embedding: the patches as they enter the middle block, less their mean: whoever is alike there can be
            merged at the start block. Similarity at the start block itself is a poor guide to it.
        logits: the dense model's answer.
    """

    tokens: Float[Tensor, "batch tokens dim"]
    importance: Float[Tensor, "batch patches"]
    embedding: Float[Tensor, "batch patches dim"]
    logits: Float[Tensor, "batch classes"]


def middle_block(start: int, depth: int) -> int:
    """Where patches are compared: a third of the way from ``start`` to the end (measured in recipes/NOTES.md)."""
    return min(depth - 1, start + max(1, (depth - start) // 3))


@torch.no_grad()
def compute_targets(backbone: Backbone, images: Float[Tensor, "batch channels height width"], start: int) -> Targets:
    """One dense pass, with the targets gathered on the way."""
    middle = middle_block(start, backbone.depth)
    x, rope, *_ = backbone.embed(images)
    importances = []
    tokens = embedding = x
    for index in range(backbone.depth):
        if index == start:
            tokens = x
        if index == middle:
            embedding = x[:, backbone.prefix :]
        if index >= start:
            importances.append(_read(x, rope, backbone, index))
        x = backbone.block(index, x, backbone.rope_of(rope, index))
    importance = torch.stack(importances).mean(dim=0)
    return Targets(
        tokens,
        importance,
        embedding - embedding.mean(dim=1, keepdim=True),
        backbone.classify(backbone.norm(x)),
    )


def _read(
    x: Float[Tensor, "batch tokens dim"], rope: Tensor | None, backbone: Backbone, index: int
) -> Float[Tensor, "batch patches"]:
    """How much block ``index`` reads from each patch: attention x value norm, of all heads; sums to 1 over an image."""
    norms = backbone.project(index, x, None).v[:, backbone.prefix :].norm(dim=-1).transpose(1, 2)
    read = (attention_received(x, rope, backbone, index) * norms).float().sum(dim=1)
    return read / read.sum(dim=1, keepdim=True)
