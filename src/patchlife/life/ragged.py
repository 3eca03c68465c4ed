"""Adaptive mode: each image keeps its own number of patches, and none is padded.

The tokens of all images lie in one packed row, image after image. Everything but attention works on tokens one
by one, so norms, linears and MLPs run on the packed row as they are; attention runs per image on its own piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..backbones import Attend, Backbone, sdpa
from .fixed import reorder
from .plan import Plan

__all__ = ["Stage", "run_ragged", "stages"]


@dataclass(frozen=True)
class Stage:
    """A run of blocks that the same tokens pass through.

    Attributes:
        blocks: block indices.
        tokens: where the packed tokens lie in the (batch * tokens) rows of the full, ordered layout.
        offsets: where each image's piece begins in the packed row, and the end: batch + 1 numbers.
    """

    blocks: range
    tokens: Int[Tensor, "packed"]
    offsets: tuple[int, ...]


def stages(plan: Plan, prefix: int) -> list[Stage]:
    """The packed layout of every stage, from one look at the plan's counts (the only host sync of a run)."""
    counts = plan.survivors().cpu()
    batch, depth = counts.shape
    width = prefix + plan.order.shape[1]
    start = plan.schedule.start
    changes = [b for b in range(start + 1, depth) if not torch.equal(counts[:, b], counts[:, b - 1])]
    result = []
    for first, end in pairwise([start, *changes, depth]):
        lengths = counts[:, first] + prefix
        ends = lengths.cumsum(0)
        image = torch.arange(batch).repeat_interleave(lengths)
        place = torch.arange(int(ends[-1])) - (ends - lengths)[image]  # within its image
        index = (image * width + place).to(plan.order.device)
        result.append(Stage(range(first, end), index, (0, *ends.tolist())))
    return result


def run_ragged(
    backbone: Backbone, tokens: Float[Tensor, "batch tokens dim"], rope: Tensor | None, plan: Plan
) -> Float[Tensor, "batch tokens dim"]:
    """Blocks ``start`` to the end, each image on its own survivors.

    Returns all tokens in the plan's order, the dead at their last state.
    """
    ordered, rope = reorder(tokens, rope, plan.order, backbone.prefix)
    rows = ordered.flatten(0, 1)
    for stage in stages(plan, backbone.prefix):
        x = rows[stage.tokens]
        attend = _per_image(stage.offsets)
        table = None
        for index in stage.blocks:
            if rope is not None and (
                table is None or rope.shape[0] > 1
            ):  # some models rotate each block differently
                table = backbone.token_rope(rope, index).flatten(0, 1)[stage.tokens]
            x = backbone.block_with(index, x, attend, table)
        rows.index_copy_(0, stage.tokens, x)
    return rows.unflatten(0, ordered.shape[:2])


def _per_image(offsets: tuple[int, ...]) -> Attend:
    """Fused attention on each image's own piece of the packed tokens."""
    pieces = [slice(a, b) for a, b in pairwise(offsets)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([sdpa(q[None, p], k[None, p], v[None, p])[0] for p in pieces])

    return attend
