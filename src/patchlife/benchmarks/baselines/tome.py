"""ToMe: Bolya et al., Token Merging: Your ViT but Faster (ICLR 2023, arXiv 2210.09461).

In every block, between attention and MLP, patches are split alternately into two sets. Each patch of the first set is
linked to the patch of the second set with the most similar key (mean over the heads), and the r most similar pairs are
merged into their size-weighted mean. Attention adds the log of each key's size to its logits, so a merged token counts
as often as the patches it replaces. Nothing is trained.

Prefix tokens are in neither set, so they are never merged. One r for all blocks changes the FLOPs in steps of about
3 %; to meet a target, the first blocks merge one pair more.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ...backbones import Backbone, sdpa
from ...backbones.timm_branches import attention_branch, branch_cost, mlp_branch
from .base import (
    Baseline,
    Images,
    MergingBaseline,
    Method,
    closest,
    dense_flops,
    size_bias,
    take,
)

__all__ = ["TOME", "Pairs", "ToMe", "match", "merge", "merge_pairs", "pairs_for"]


Pairs = tuple[Int[Tensor, "batch unmerged"], Int[Tensor, "batch r"], Int[Tensor, "batch r"]]
"""What `match` returns."""


def match(key: Float[Tensor, "batch patches dim"], r: int) -> Pairs:
    """(unmerged, merged, target): indices into the first set, the first set and the second set.

    The first set is patches 0, 2, 4 and so on, the second 1, 3, 5 and so on.
    """
    unit = F.normalize(key, dim=-1)
    similarity, partner = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(dim=2)
    closest_first = similarity.argsort(dim=1, descending=True)
    merged = closest_first[:, :r]
    unmerged = closest_first[:, r:].sort(dim=1).values
    return unmerged, merged, partner.gather(1, merged)


def merge(
    patches: Float[Tensor, "batch patches dim"], size: Float[Tensor, "batch patches"], key: Tensor, r: int
) -> tuple[Float[Tensor, "batch fewer dim"], Float[Tensor, "batch fewer"]]:
    """Merge the r most similar pairs into their size-weighted means; returns (patches, size), with sizes added."""
    return merge_pairs(patches, size, match(key, r))


def merge_pairs(
    patches: Float[Tensor, "batch patches dim"], size: Float[Tensor, "batch patches"], pairs: Pairs
) -> tuple[Float[Tensor, "batch fewer dim"], Float[Tensor, "batch fewer"]]:
    """`merge` for pairs that `match` found: first the unmerged patches of the first set, then the second set."""
    unmerged, merged, target = pairs
    weight = size[..., None]
    # weighted patches and sizes in one tensor: one gather and one scatter serve both
    both = torch.cat((patches * weight, weight), dim=2)
    first, second = both[:, ::2], both[:, 1::2]
    second = second.scatter_add(1, target[..., None].expand(-1, -1, both.shape[2]), take(first, merged))
    both = torch.cat((take(first, unmerged), second), dim=1)
    size = both[..., -1]
    return both[..., :-1] / size[..., None], size


class ToMe(MergingBaseline):
    """Merges ``pairs[l]`` pairs in block l, or all pairs if there are fewer."""

    title = "ToMe"

    def __init__(self, backbone: Backbone, pairs: tuple[int, ...]) -> None:
        more = sum(r > min(pairs) for r in pairs)
        super().__init__(backbone, f"r {min(pairs)}" + (f", {max(pairs)} in the first {more} blocks" if more else ""))
        self.pairs = pairs

    def block(self, index: int, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """One block with merging between attention and MLP."""
        bb, keys = self.backbone, []
        merged = any(self.pairs[:index])
        bias = size_bias(size, bb.prefix) if merged else None

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys.append(k)
            return sdpa(q, k, v, bias)

        x = x + attention_branch(bb, index, x, attend)
        r = min(self.pairs[index], size.shape[1] // 2)
        if r:
            patches, size = self.merged(x[:, bb.prefix :], size, match(keys[0][:, bb.prefix :].mean(dim=2), r))
            x = torch.cat((x[:, : bb.prefix], patches), dim=1)
        return x + mlp_branch(bb, index, x), size

    def merged(self, patches: Tensor, size: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """(patches, their sizes) after ``pairs`` were merged; un-merging keeps what it needs here."""
        return merge_pairs(patches, size, pairs)

    def flops(self, images: Images) -> float:
        """FLOPs per image."""
        bb = self.backbone
        rows, cols = bb.grid_of(images)
        n, total = rows * cols, float(self.outer_flops(images))
        for index in range(bb.depth):
            cost, tokens = branch_cost(bb, index), bb.prefix + n
            total += (cost.project + cost.out) * tokens + cost.pair * tokens**2
            r = min(self.pairs[index], n // 2)
            if r:
                total += 2 * cost.head_dim * (n - n // 2) * (n // 2)  # all similarities
                n -= r
            total += cost.mlp * (bb.prefix + n)
        return total


def _pairs(total: int, depth: int) -> tuple[int, ...]:
    """``total`` pairs spread over all blocks, the remainder in the first ones."""
    return tuple(total // depth + (block < total % depth) for block in range(depth))


def pairs_for(backbone: Backbone, target: float, images: Images) -> tuple[int, ...]:
    """Pairs to merge in each block, for a cost close to ``target``, a fraction of the dense model's."""
    flops, depth = target * dense_flops(backbone, images), backbone.depth
    rows, cols = backbone.grid_of(images)

    def cost(negative_pairs: int) -> float:  # negative, because `closest` needs a cost that grows
        return ToMe(backbone, _pairs(-negative_pairs, depth)).flops(images)

    return _pairs(-closest(cost, flops, -depth * (rows * cols // 2), 0), depth)


def _build(backbone: Backbone, target: float, images: Images) -> Baseline:
    return ToMe(backbone, pairs_for(backbone, target, images))


TOME = Method("tome", "ToMe", "arXiv 2210.09461 (ICLR 2023)", "nothing to train", _build)
