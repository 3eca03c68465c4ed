"""MaMe: Huo and Li, Matrix-Based Token Merging (CVPR 2026 Findings; arXiv 2604.13432).

Published, in the abstract and in the authors' description: tokens are merged without training and without parameters
in the first 8 blocks of a ViT, by matrix products and element-wise operations only, without sorting, top-k or
clustering; a similarity threshold tau decides, so the number of tokens left depends on the image. We had these
statements, but not the formulas of the paper.

The rest is our reading. Patches are split alternately into sources and destinations, as in ToMe. The weights of a
source are the excess of its cosine similarities to the destinations over tau, or zero below it, normalised to sum to
one. (The similarities themselves above tau were worse on ViT-Tiny, and keys instead of tokens were too.) A source with
no destination above tau stays. A destination becomes the mean of itself and what it receives, weighted by size;
attention adds the log of each key's size to its logits. Merging is between attention and MLP, and similarity is of the
tokens. In other depths than 12 the first two thirds of the blocks merge. tau is solved on the sample images, because
the FLOPs depend on them.

Images keep different numbers of tokens. The tokens of a batch are packed in one sequence, as in our adaptive mode, so
no FLOPs are spent on padding; attention and merging run image by image. For speed this is not what the authors do.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ...backbones import Attend, Backbone, sdpa
from ...backbones.timm_branches import attention_branch, branch_cost, check_branches, mlp_branch
from .base import Baseline, Images, Method, bisect, check_class_token, check_no_rope, dense_flops

__all__ = ["MAME", "MaMe", "assignment", "merge_by_matrix"]


def assignment(
    sources: Float[Tensor, "sources dim"], destinations: Float[Tensor, "destinations dim"], threshold: float
) -> Float[Tensor, "sources destinations"]:
    """The merging matrix: rows sum to one, or are zero for sources that stay."""
    similarity = F.normalize(sources, dim=-1) @ F.normalize(destinations, dim=-1).T
    weight = (similarity - threshold).clamp(min=0)
    total = weight.sum(dim=1, keepdim=True)
    return weight / torch.where(total > 0, total, 1)


def merge_by_matrix(
    patches: Float[Tensor, "patches dim"], size: Float[Tensor, "patches"], threshold: float
) -> tuple[Float[Tensor, "fewer dim"], Float[Tensor, "fewer"]]:
    """(patches, sizes) of one image after merging: first the sources that stay, then the destinations."""
    matrix = assignment(patches[::2], patches[1::2], threshold)
    both = torch.cat((patches * size[:, None], size[:, None]), dim=1)
    destinations = both[1::2] + matrix.T @ both[::2]
    stays = (matrix == 0).all(dim=1)
    both = torch.cat((both[::2][stays], destinations))
    return both[:, :-1] / both[:, -1:], both[:, -1]


class MaMe(Baseline):
    """Merges patches whose cosine similarity is above ``threshold`` in the first two thirds of the blocks."""

    def __init__(self, backbone: Backbone, threshold: float) -> None:
        check_class_token(backbone, "MaMe")
        check_branches(backbone, "MaMe")
        self.merging_blocks = max(1, 2 * backbone.depth // 3)
        super().__init__(backbone, f"threshold {threshold:.4f} in the first {self.merging_blocks} blocks")
        self.threshold = threshold

    def forward(self, images: Images) -> Tensor:
        """Logits."""
        return self.run(images)[0]

    def run(self, images: Images) -> tuple[Tensor, list[list[int]]]:
        """(logits, number of tokens of each image that entered each block and that left the last one)."""
        bb = self.backbone
        embedded = bb.embed(images)
        check_no_rope(embedded.rope, "MaMe")
        batch, tokens, _ = embedded.tokens.shape
        x, counts = embedded.tokens.flatten(0, 1), [[tokens] * batch]
        size = x.new_ones(len(x))  # prefix tokens have size 1
        for index in range(bb.depth):
            x, size, after = self.block(index, x, size, counts[-1])
            counts.append(after)
        parts = x.split(counts[-1])
        return torch.cat([bb.classify(bb.norm(part[None])) for part in parts]), counts

    def block(self, index: int, x: Tensor, size: Tensor, counts: list[int]) -> tuple[Tensor, Tensor, list[int]]:
        """(tokens, sizes, number of tokens of each image) after a block, which merges between attention and MLP."""
        bb = self.backbone
        x = x + attention_branch(bb, index, x, _per_image(counts, size))
        if index < self.merging_blocks:
            parts = [self.merged(*image) for image in zip(x.split(counts), size.split(counts), strict=True)]
            x, size = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            counts = [len(tokens) for tokens, _ in parts]
        return x + mlp_branch(bb, index, x), size, counts

    def merged(self, tokens: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens, sizes) of one image after merging; prefix tokens take no part."""
        prefix = self.backbone.prefix
        patches, merged_size = merge_by_matrix(tokens[prefix:], size[prefix:], self.threshold)
        return torch.cat((tokens[:prefix], patches)), torch.cat((size[:prefix], merged_size))

    def flops(self, images: Images) -> float:
        """FLOPs per image, mean over ``images``."""
        with torch.no_grad():
            counts = self.run(images)[1]
        bb, total = self.backbone, 0.0
        for index, (before, after) in enumerate(pairwise(counts)):
            cost = branch_cost(bb, index)
            for n, left in zip(before, after, strict=True):
                total += (cost.project + cost.out) * n + cost.pair * n**2 + cost.mlp * left
                if index < self.merging_blocks:
                    pairs = (n - bb.prefix + 1) // 2 * ((n - bb.prefix) // 2)
                    total += 2 * (2 * bb.dim + 1) * pairs  # similarities; the product with the matrix, sizes included
        return self.outer_flops(images) + total / len(images)


def _per_image(counts: list[int], size: Tensor) -> Attend:
    """Attention inside each image of a packed sequence, proportional to the sizes of the keys."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        images = zip(*(t.split(counts) for t in (q, k, v, size.log().to(q.dtype))), strict=True)
        return torch.cat([sdpa(q[None], k[None], v[None], bias[None, None, None])[0] for q, k, v, bias in images])

    return attend


def _build(backbone: Backbone, target: float, images: Images) -> Baseline:
    flops = target * dense_flops(backbone, images)
    threshold = bisect(lambda t: MaMe(backbone, t).flops(images), flops, 0.0, 1.0, steps=14)
    return MaMe(backbone, threshold)


MAME = Method(
    "mame", "MaMe (our reading)", "arXiv 2604.13432 (CVPR 2026 Findings)", "nothing to train", _build, shapes="dynamic"
)
