"""ATS: Fayyaz et al., Adaptive Token Sampling for Efficient Vision Transformers (ECCV 2022, arXiv 2111.15667).

Inside each block from a quarter of the depth on, a patch gets a significance: the class token's attention to it times
the norm of its value, per head, then summed. K evenly spaced points of the cumulative distribution select the patches
to keep; a patch selected twice is kept once, so an image keeps K patches or fewer. Only the kept patches are queries;
keys and values are all tokens that entered the block. Nothing is trained.

Images keep different numbers of patches, so a batch is padded to the largest number and padding is masked, as in the
paper.
"""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from ...backbones import Backbone, sdpa
from ...backbones.timm_branches import attention_branch, branch_cost, check_branches, mlp_branch
from .base import Baseline, Images, Method, check_class_token, check_no_rope, closest, dense_flops, take

__all__ = ["ATS", "AdaptiveSampling", "sample", "significance"]


def significance(
    class_logits: Float[Tensor, "batch heads patches"], value: Float[Tensor, "batch patches heads dim"]
) -> Float[Tensor, "batch patches"]:
    """Attention times value norm, normalised to sum to one per head, summed over the heads."""
    importance = class_logits.float().softmax(dim=-1) * value.float().norm(dim=-1).transpose(1, 2)
    return (importance / importance.sum(dim=-1, keepdim=True)).sum(dim=1)


def sample(
    score: Float[Tensor, "batch patches"], samples: int
) -> tuple[Int[Tensor, "batch kept"], Bool[Tensor, "batch kept"]]:
    """(kept patches in ascending order, mask of the entries that are not padding), padded to the largest number."""
    cumulative = score.cumsum(dim=1)
    points = (torch.arange(samples, device=score.device) + 0.5) / samples
    selected = torch.searchsorted(cumulative, points * cumulative[:, -1:]).clamp(max=score.shape[1] - 1)
    first = torch.ones_like(selected, dtype=torch.bool)
    first[:, 1:] = selected[:, 1:] != selected[:, :-1]
    counts = first.sum(dim=1)
    most = int(counts.max())
    column = torch.where(first, first.cumsum(dim=1) - 1, most)  # repeats go to a last column, which is cut off
    kept = torch.zeros_like(selected[:, :1]).repeat(1, most + 1).scatter(1, column, selected)[:, :most]
    return kept, torch.arange(most, device=score.device) < counts[:, None]


class AdaptiveSampling(Baseline):
    """Takes ``samples`` samples in every block from a quarter of the depth on."""

    def __init__(self, backbone: Backbone, samples: int) -> None:
        check_class_token(backbone, "ATS")
        check_branches(backbone, "ATS", all_queries=False)
        self.first = max(1, backbone.depth // 4)
        super().__init__(backbone, f"K {samples} in every block from {self.first} on")
        self.samples = samples

    def forward(self, images: Images) -> Tensor:
        """Logits."""
        return self.run(images)[0]

    def run(self, images: Images) -> tuple[Tensor, list[int]]:
        """(logits, number of tokens per image before block 0 and after each block, padding included)."""
        bb = self.backbone
        embedded = bb.embed(images)
        check_no_rope(embedded.rope, "ATS")
        x, real, widths = embedded.tokens, None, [embedded.tokens.shape[1]]
        for index in range(bb.depth):
            if index < self.first:
                x = bb.block(index, x)
            else:
                x, real = self.sampling_block(index, x, real)
            widths.append(x.shape[1])
        return bb.classify(bb.norm(x)), widths

    def sampling_block(self, index: int, x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """One block that returns fewer tokens; ``real`` (batch, tokens) marks tokens that are not padding."""
        bb = self.backbone
        kept_and_real: list[Tensor] = []
        mask = None if real is None else real[:, None, None]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            logits = torch.einsum("bhd,bthd->bht", q[:, 0] * q.shape[-1] ** -0.5, k)
            logits = logits if real is None else logits.masked_fill(~real[:, None], -torch.inf)
            kept, valid = sample(significance(logits[..., bb.prefix :], v[:, bb.prefix :]), self.samples)
            front = torch.arange(bb.prefix, device=q.device).expand(len(q), -1)
            index = torch.cat((front, kept + bb.prefix), dim=1)
            kept_and_real.extend((index, F.pad(valid, (bb.prefix, 0), value=True)))
            return sdpa(take(q.flatten(2), index).unflatten(2, q.shape[2:]), k, v, mask)

        branch = attention_branch(bb, index, x, attend)
        x = take(x, kept_and_real[0]) + branch
        return x + mlp_branch(bb, index, x), kept_and_real[1]

    def flops(self, images: Images) -> float:
        """FLOPs per image of ``images`` as one batch, padding included."""
        with torch.no_grad():
            widths = self.run(images)[1]
        total = float(self.outer_flops(images))
        for index, (n, after) in enumerate(itertools.pairwise(widths)):
            cost = branch_cost(self.backbone, index)
            row = cost.pair // 2 * n if index >= self.first else 0
            total += cost.project * n + row + cost.pair * n * after + (cost.out + cost.mlp) * after
        return total


def _build(backbone: Backbone, target: float, images: Images) -> Baseline:
    rows, cols = backbone.grid_of(images)
    flops = target * dense_flops(backbone, images)
    samples = closest(lambda k: AdaptiveSampling(backbone, k).flops(images), flops, 1, 4 * rows * cols)
    return AdaptiveSampling(backbone, samples)


ATS = Method("ats", "ATS", "arXiv 2111.15667 (ECCV 2022)", "nothing to train", _build, shapes="dynamic")
