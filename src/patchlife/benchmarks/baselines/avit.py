"""A-ViT: Yin et al., Adaptive Tokens for Efficient Vision Transformer (CVPR 2022, arXiv 2112.07658).

After each block, the sigmoid of a token's first channel is its halting score; when the sum over the blocks reaches 1,
the token halts. The classifier reads the mean of the class token's states, weighted by its halting scores. The paper
trains the model with halting (100 epochs); without training only the speed is meaningful.

The paper's public code masks halted tokens. Here they are removed: the tokens of all images are packed in one sequence,
as in our adaptive mode, and when a class token halts, all tokens of its image are removed.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from ...backbones import Attend, Backbone, sdpa
from ...errors import UnsupportedModelError
from .base import Baseline, Images, Method, bisect, check_class_token, check_no_rope, dense_flops

__all__ = ["AVIT", "AViT"]

STEEPNESS = 5.0  # the paper's gamma
SLACK = 0.01  # the paper's epsilon: a sum of 0.99 counts as done


class AViT(Baseline):
    """Halting score ``sigmoid(5 * first channel + shift)``: the larger ``shift``, the earlier tokens halt."""

    def __init__(self, backbone: Backbone, shift: float) -> None:
        check_class_token(backbone, "A-ViT")
        if backbone.prefix != 1:
            raise UnsupportedModelError(f"A-ViT reads one class token; this model has {backbone.prefix} prefix tokens")
        super().__init__(backbone, f"shift {shift:.2f}")
        self.shift = shift

    def forward(self, images: Images) -> Tensor:
        """Logits."""
        return self.run(images)[0]

    def run(self, images: Images) -> tuple[Tensor, list[list[int]]]:
        """(logits, number of tokens of each image that entered each block)."""
        bb = self.backbone
        embedded = bb.embed(images)
        check_no_rope(embedded.rope, "A-ViT")
        batch, tokens, _ = embedded.tokens.shape
        x = embedded.tokens.flatten(0, 1)
        image = torch.arange(batch, device=x.device).repeat_interleave(tokens)
        is_class = torch.arange(len(x), device=x.device) % tokens == 0
        done = torch.zeros(len(x), device=x.device)
        mean, entered = x.new_zeros(batch, x.shape[1]), []
        for index in range(bb.depth):
            entered.append(torch.bincount(image, minlength=batch).tolist())  # lengths differ, so the host needs them
            x = bb.block_with(index, x, _per_image(entered[-1]))
            score = self.halting(x) if index < bb.depth - 1 else torch.ones_like(done)
            halts = done + score >= 1 - SLACK
            weight = torch.where(halts, 1 - done, score)[is_class].to(x.dtype)
            mean = mean.index_add(0, image[is_class], weight[:, None] * x[is_class])
            finished = torch.ones(batch, dtype=torch.bool, device=x.device)
            finished[image[is_class]] = halts[is_class]
            stays = ~halts & ~finished[image]
            x, image, is_class, done = x[stays], image[stays], is_class[stays], (done + score)[stays]
            if not len(x):
                break
        return bb.classify(bb.norm(mean[:, None])), entered

    def halting(self, x: Float[Tensor, "packed dim"]) -> Float[Tensor, "packed"]:
        """Halting score of each token after a block."""
        return torch.sigmoid(STEEPNESS * x[:, 0].float() + self.shift)

    def flops(self, images: Images) -> float:
        """FLOPs per image, mean over ``images``."""
        with torch.no_grad():
            entered = self.run(images)[1]
        total = 0.0
        for index, counts in enumerate(entered):
            a, c = self.backbone.block_flops(index)
            total += sum(a * n + c * n**2 for n in counts)
        return total / len(images) + self.outer_flops(images)


def _per_image(counts: list[int]) -> Attend:
    """Fused attention within each image's part of the packed tokens; finished images have none."""
    ends = [0, *torch.tensor(counts).cumsum(0).tolist()]
    pieces = [slice(a, b) for a, b in pairwise(ends) if b > a]
    return lambda q, k, v: torch.cat([sdpa(q[None, p], k[None, p], v[None, p])[0] for p in pieces])


def _build(backbone: Backbone, target: float, images: Images) -> Baseline:
    flops = target * dense_flops(backbone, images)
    negative_shift = bisect(lambda knob: AViT(backbone, -knob).flops(images), flops, -60.0, 60.0, steps=14)
    return AViT(backbone, -negative_shift)


AVIT = Method(
    "a-vit",
    "A-ViT",
    "arXiv 2112.07658 (CVPR 2022)",
    "nothing: untrained halting scores, for speed only",
    _build,
    trained=False,
    shapes="dynamic",
)
