"""EViT: Liang et al., Not All Patches are What You Need (ICLR 2022, arXiv 2202.07800).

Inside three blocks, between attention and MLP, the patches with the highest class-token attention are kept. The others
are fused into one token: their mean, weighted by that attention. Later blocks treat the fused token like any patch. The
paper calls the fusion a weighted average, so here the weights sum to one.

The paper reads the class token's row from the attention matrix. Here that row is computed beside fused attention: the
numbers are the same, and the run is faster. The paper's training (30 epochs or more) is not done.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ...backbones import Backbone, sdpa
from ...backbones.timm_branches import attention_branch, branch_cost, check_branches, mlp_branch
from .base import (
    Baseline,
    Images,
    Method,
    bisect,
    check_class_token,
    check_no_rope,
    class_attention,
    dense_flops,
    reduction_blocks,
    take,
)

__all__ = ["EVIT", "EViT", "fuse"]


def fuse(
    patches: Float[Tensor, "batch patches dim"], attention: Float[Tensor, "batch patches"], keep: int
) -> Float[Tensor, "batch keep+1 dim"]:
    """The ``keep`` patches with the highest attention, in its order, then the attention-weighted mean of the others."""
    order = attention.argsort(dim=1, descending=True)
    patches, weight = take(patches, order), attention.gather(1, order)[:, keep:]
    weight = weight / weight.sum(dim=1, keepdim=True)
    return torch.cat((patches[:, :keep], weight[:, None] @ patches[:, keep:]), dim=1)


class EViT(Baseline):
    """Keeps ``ceil(rate * patches)`` of the patches at each of three blocks."""

    def __init__(self, backbone: Backbone, rate: float) -> None:
        check_class_token(backbone, "EViT")
        check_branches(backbone, "EViT")
        super().__init__(backbone, f"keep rate {rate:.3f} in blocks {reduction_blocks(backbone.depth)}")
        self.rate = rate
        self.at = frozenset(reduction_blocks(backbone.depth))

    def keep(self, patches: int) -> int:
        """Number of patches kept of ``patches``; all of them if fusing would not reduce the number of tokens."""
        kept = math.ceil(self.rate * patches)
        return kept if kept < patches - 1 else patches

    def forward(self, images: Images) -> Tensor:
        """Logits."""
        embedded = self.backbone.embed(images)
        check_no_rope(embedded.rope, "EViT")
        x = embedded.tokens
        for index in range(self.backbone.depth):
            reduces = (
                index in self.at and self.keep(x.shape[1] - self.backbone.prefix) < x.shape[1] - self.backbone.prefix
            )
            x = self.reducing_block(index, x) if reduces else self.backbone.block(index, x)
        return self.backbone.classify(self.backbone.norm(x))

    def reducing_block(self, index: int, x: Tensor) -> Tensor:
        """One block that drops tokens between attention and MLP."""
        bb, scores = self.backbone, []

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores.append(class_attention(q, k, bb.prefix))
            return sdpa(q, k, v)

        x = x + attention_branch(bb, index, x, attend)
        attention = scores[0].to(x.dtype)
        kept = fuse(x[:, bb.prefix :], attention, self.keep(attention.shape[1]))
        x = torch.cat((x[:, : bb.prefix], kept), dim=1)
        return x + mlp_branch(bb, index, x)

    def flops(self, images: Images) -> float:
        """FLOPs per image."""
        bb = self.backbone
        rows, cols = bb.grid_of(images)
        n, total = bb.prefix + rows * cols, float(self.outer_flops(images))
        for index in range(bb.depth):
            cost, after = branch_cost(bb, index), n
            total += (cost.project + cost.out) * n + cost.pair * n**2
            if index in self.at and (kept := self.keep(n - bb.prefix)) < n - bb.prefix:
                fused = 2 * bb.dim * (n - bb.prefix - kept)
                total += cost.pair // 2 * n + fused  # the class token's row, and the weighted mean
                after = bb.prefix + kept + 1
            total += cost.mlp * after
            n = after
        return total


def _build(backbone: Backbone, target: float, images: Images) -> Baseline:
    flops = target * dense_flops(backbone, images)
    return EViT(backbone, bisect(lambda rate: EViT(backbone, rate).flops(images), flops, 0.02, 1.0))


EVIT = Method("evit", "EViT", "arXiv 2202.07800 (ICLR 2022)", "nothing (off the shelf; the paper trains)", _build)
