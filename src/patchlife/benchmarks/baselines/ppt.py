"""PPT: Wu et al., Token Pruning and Pooling for Efficient Vision Transformers (2023, arXiv 2310.01812).

Blocks that reduce tokens choose for each image, by the variance of the patches' scores, how to remove r patches between
attention and MLP. Where the variance is above a threshold, some patches clearly matter less, and the r patches with the
lowest scores are pruned. Otherwise the r most similar pairs are pooled, as in ToMe. Nothing is trained.

Published for DeiT-S off the shelf: r = 50 in blocks 3, 6 and 9, threshold 7e-5 (0.64 of the FLOPs). Pooling halves the
patches at most, so three blocks reach about 0.64 of the FLOPs without exceptions. For smaller targets every block
reduces, as in ToMe; the knob says which blocks do. The method "ppt" has the published threshold. `tuned` chooses one
for a model, by the KL divergence from the dense model on unlabelled images: the best one depends on the model.

Our reading, where we found no statement: the score is ATS's significance, the class token's attention times the norm of
the value, mean over the heads, summing to one; pooled tokens are size-weighted means and attention is proportional to
size, as in ToMe. The threshold is for 196 patches; scores fall with the number of patches, so for other grids it is
scaled by the square of their ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...backbones import Backbone, sdpa
from ...backbones.timm_branches import attention_branch, branch_cost, mlp_branch
from ...evaluation.agreement import kl_divergence
from .ats import significance
from .base import (
    Baseline,
    Images,
    MergingBaseline,
    Method,
    closest,
    dense_flops,
    reduction_blocks,
    size_bias,
    spread,
    take,
)
from .tome import match, merge_pairs

__all__ = ["PPT", "PrunePool", "prunes", "tuned"]

THRESHOLD = 7e-5
_TRIED = (2e-5, THRESHOLD, 2e-4, 5e-4, 1e-3, 2e-3)


def prunes(score: Float[Tensor, "batch patches"], threshold: float) -> Bool[Tensor, "batch"]:
    """Which images prune: those whose scores have a variance above ``threshold``."""
    return score.var(dim=1, correction=0) > threshold


class PrunePool(MergingBaseline):
    """Removes ``removed[l]`` patches in block l, or half of them if there are fewer than twice as many."""

    title = "PPT"

    def __init__(self, backbone: Backbone, removed: tuple[int, ...], threshold: float = THRESHOLD) -> None:
        blocks = tuple(block for block, count in enumerate(removed) if count)
        super().__init__(backbone, f"r {max(removed)} in blocks {blocks}, threshold {threshold:.1e}")
        self.removed, self.threshold = removed, threshold

    def block_for(self, patches: int) -> Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]:
        """`block`; the threshold is for 196 patches, and the variance of scores falls with the square of the number."""
        return partial(self.block, threshold=self.threshold * (196 / patches) ** 2)

    def block(self, index: int, x: Tensor, size: Tensor, threshold: float = THRESHOLD) -> tuple[Tensor, Tensor]:
        """One block that prunes or pools between attention and MLP."""
        bb, r = self.backbone, self.count(index, size.shape[1])
        seen: list[Tensor] = []
        bias = size_bias(size, bb.prefix) if any(self.removed[:index]) else None

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if r:
                logits = torch.einsum("bhd,bthd->bht", q[:, 0] * q.shape[-1] ** -0.5, k)
                logits = logits if bias is None else logits + bias[:, 0]
                score = significance(logits[..., bb.prefix :], v[:, bb.prefix :]) / k.shape[2]
                seen.extend((score, k[:, bb.prefix :].mean(dim=2)))
            return sdpa(q, k, v, bias)

        x = x + attention_branch(bb, index, x, attend)
        if r:
            patches, size = _reduced(x[:, bb.prefix :], size, seen[0], seen[1], r, threshold)
            x = torch.cat((x[:, : bb.prefix], patches), dim=1)
        return x + mlp_branch(bb, index, x), size

    def count(self, index: int, patches: int) -> int:
        """Number of ``patches`` that block ``index`` removes."""
        return min(self.removed[index], patches // 2)

    def flops(self, images: Images) -> float:
        """FLOPs per image; they do not depend on what is pruned and what is pooled."""
        bb = self.backbone
        rows, cols = bb.grid_of(images)
        n, total = rows * cols, float(self.outer_flops(images))
        for index in range(bb.depth):
            cost, tokens = branch_cost(bb, index), bb.prefix + n
            total += (cost.project + cost.out) * tokens + cost.pair * tokens**2
            if r := self.count(index, n):
                total += cost.pair // 2 * tokens + 2 * cost.head_dim * (n - n // 2) * (n // 2)  # scores, similarities
                n -= r
            total += cost.mlp * (bb.prefix + n)
        return total


def _reduced(
    patches: Tensor, size: Tensor, score: Tensor, key: Tensor, r: int, threshold: float
) -> tuple[Tensor, Tensor]:
    """(patches, sizes) after r patches of each image were pruned or pooled; both are computed, then chosen from."""
    best = score.argsort(dim=1, descending=True)[:, : patches.shape[1] - r]
    pooled, pooled_size = merge_pairs(patches, size, match(key, r))
    prune = prunes(score, threshold)[:, None]
    return (
        torch.where(prune[..., None], take(patches, best), pooled),
        torch.where(prune, size.gather(1, best), pooled_size),
    )


def _removed(backbone: Backbone, target: float, images: Images) -> tuple[int, ...]:
    """Patches to remove in each block, for a cost close to ``target``, a fraction of the dense model's."""
    rows, cols = backbone.grid_of(images)
    flops, depth, patches = target * dense_flops(backbone, images), backbone.depth, rows * cols
    at: tuple[int, ...] = reduction_blocks(depth)
    if PrunePool(backbone, spread(patches // 4 * len(at), at, depth)).flops(images) > flops:
        at = tuple(range(depth))

    def cost(negative: int) -> float:  # negative, because `closest` needs a cost that grows
        return PrunePool(backbone, spread(-negative, at, depth)).flops(images)

    removed = -closest(cost, flops, -len(at) * (patches // 2), 0)
    return spread(removed, at, depth)


def _build(backbone: Backbone, target: float, images: Images) -> Baseline:
    return PrunePool(backbone, _removed(backbone, target, images))


@torch.no_grad()
def tuned(backbone: Backbone, target: float, images: Images) -> PrunePool:
    """PPT at ``target`` of the dense FLOPs, with the best threshold of a few on ``images``, which need no labels."""
    removed, dense = _removed(backbone, target, images), backbone.output(images).float()

    def divergence(model: PrunePool) -> float:
        return kl_divergence(dense, model(images).float()).mean().item()

    return min((PrunePool(backbone, removed, threshold) for threshold in _TRIED), key=divergence)


PPT = Method("ppt", "PPT", "arXiv 2310.01812 (2023)", "nothing to train", _build)
