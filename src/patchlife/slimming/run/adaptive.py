"""Adaptive mode: each image keeps its own number of patches, and none is padded.

The tokens of all images lie in one packed row, image after image. Everything but attention works on tokens one
by one, so norms, linears and MLPs run on the packed row as they are; attention runs per image (see `packed.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...backbones import Backbone
from ..merging import log_size, one_each
from ..plan import Plan
from .fixed import Taps, reorder
from .packed import packed_attention

__all__ = ["RunStage", "Stage", "run_ragged", "run_stage", "stages"]


@dataclass(frozen=True)
class Stage:
    """A run of blocks that the same tokens pass through.

    Tokens are named by their place among the (batch * tokens) rows of the full, ordered layout.

    Attributes:
        blocks: block indices.
        tokens: who takes part, image after image.
        offsets: where each image's piece begins in the packed row, and the end: batch + 1 numbers; and one more
            where the row is filled up.
        dying: patches that took part in the stage before and no longer do. heirs: who inherits from each.
        shares: how much of each its heir takes over.
    """

    blocks: range
    tokens: Int[Tensor, "packed"]
    offsets: tuple[int, ...]
    dying: Int[Tensor, "dying"]
    heirs: Int[Tensor, "dying"]
    shares: Float[Tensor, "dying"]


RunStage = Callable[[Backbone, Stage, Tensor, Tensor | None, list[Tensor]], Tensor]
"""How a stage's blocks run: as `run_stage`."""


def stages(
    plan: Plan, prefix: int, length_of: Callable[[int], int] | None = None, ends: Iterable[int] = ()
) -> list[Stage]:
    """The packed layout of every stage, from one look at the plan's counts (the only host sync of a run).

    A stage ends where counts change, and after each block of ``ends``.

    With ``length_of`` a packed row of n tokens is filled up to ``length_of(n)`` by copies of a spare token, which lies
    behind the full layout, belongs to no image, and makes a piece of its own.
    """
    counts = plan.survivors().cpu()
    batch, patches = plan.order.shape
    width = prefix + patches
    device, start = plan.order.device, plan.schedule.start
    changes = [
        b for b in range(start + 1, counts.shape[1]) if b - 1 in ends or not torch.equal(counts[:, b], counts[:, b - 1])
    ]
    before = torch.full((batch,), patches)
    result = []
    for first, end in pairwise([start, *changes, counts.shape[1]]):
        after = counts[:, first]
        taking_part = _rows(torch.zeros(batch, dtype=torch.long), prefix + after, width).to(device)
        dying = _rows(prefix + after, prefix + before, width).to(device)
        heirs, shares = dying, torch.ones(len(dying), device=device)
        if plan.heirs is not None:
            image, rank = dying // width, dying % width - prefix
            heirs = image * width + prefix + plan.heirs.rank[image, rank]
            shares = plan.heirs.share[image, rank]
        offsets = (0, *(prefix + after).cumsum(0).tolist())
        if length_of is not None:
            spare = taking_part.new_full((length_of(offsets[-1]) - offsets[-1],), batch * width)
            taking_part, offsets = torch.cat((taking_part, spare)), (*offsets, offsets[-1] + len(spare))
        result.append(Stage(range(first, end), taking_part, offsets, dying, heirs, shares))
        before = after
    return result


def _rows(first: Int[Tensor, "batch"], end: Int[Tensor, "batch"], width: int) -> Int[Tensor, "packed"]:
    """Places ``first`` to ``end`` of each image, in a layout of ``width`` places per image."""
    lengths = end - first
    image = torch.arange(len(lengths)).repeat_interleave(lengths)
    within = torch.arange(len(image)) - (lengths.cumsum(0) - lengths)[image]
    return image * width + first[image] + within


def run_stage(backbone: Backbone, stage: Stage, x: Tensor, bias: Tensor | None, tables: list[Tensor]) -> Tensor:
    """A stage's blocks on its packed row ``x`` (packed, dim); ``bias`` (packed) is added to the logits of each key.

    ``tables`` are the rotations of its tokens: none, one for all blocks, or one for each.
    """
    attend = packed_attention(stage.offsets, bias, x)
    for place, index in enumerate(stage.blocks):
        x = backbone.block_with(index, x, attend, tables[place % len(tables)] if tables else None)
    return x


def run_ragged(
    backbone: Backbone,
    tokens: Float[Tensor, "batch tokens dim"],
    rope: Tensor | None,
    plan: Plan,
    run: RunStage = run_stage,
    length_of: Callable[[int], int] | None = None,
    taps: Taps | None = None,
) -> Float[Tensor, "batch tokens dim"]:
    """Blocks ``start`` to the end, each image on its own survivors.

    ``run`` and ``length_of`` (see `stages`) are for those who compile the blocks. Returns all tokens in the plan's
    order, the dead at their last state; so does ``taps`` after each block that it names. Gradients flow through it.
    """
    taps = {} if taps is None else taps
    ordered, rope = reorder(tokens, rope, plan.order, backbone.prefix)
    rows = ordered.flatten(0, 1)
    if length_of is not None:
        rows = torch.cat((rows, torch.zeros_like(rows[:1])))
    size = None if plan.heirs is None else one_each(rows.shape[:1], rows)
    for stage in stages(plan, backbone.prefix, length_of, taps):
        if size is not None and len(stage.dying):
            rows, size = _inherit(rows, size, stage)
        x = rows[stage.tokens]
        bias = None if size is None else log_size(size[stage.tokens]).to(x.dtype)
        rows = _put(rows, stage.tokens, run(backbone, stage, x, bias, _rotations(backbone, rope, stage)))
        if stage.blocks[-1] in taps:
            taps[stage.blocks[-1]] = rows[: ordered.shape[:2].numel()].unflatten(0, ordered.shape[:2]).clone()
    return rows[: ordered.shape[:2].numel()].unflatten(0, ordered.shape[:2])


def _put(rows: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """``rows`` with other ``values`` at some places; the same memory where no gradient needs the earlier ones."""
    return rows.index_copy(0, places, values) if torch.is_grad_enabled() else rows.index_copy_(0, places, values)


def _rotations(backbone: Backbone, rope: Tensor | None, stage: Stage) -> list[Tensor]:
    """The stage's tokens' rotary tables: some models rotate each block differently, most all alike, others none."""
    tables = []
    for index in stage.blocks if rope is not None and rope.shape[0] > 1 else stage.blocks[:1]:
        table = backbone.token_rope(rope, index)
        if table is not None:
            rows = table.flatten(0, 1)
            tables.append(rows[stage.tokens.clamp(max=len(rows) - 1)])  # a spare token may turn as it likes
    return tables


def _inherit(
    rows: Float[Tensor, "all dim"], size: Float[Tensor, "all"], stage: Stage
) -> tuple[Float[Tensor, "all dim"], Float[Tensor, "all"]]:
    """(rows, sizes) after the dying were averaged into their heirs; the dead keep their own last state.

    In float32 at least, weights first, as `heirs.inherit` does. A weight of 1 changes no digit of a row.
    """
    left = size[stage.dying] * stage.shares.to(size.dtype)
    grown = size.index_add(0, stage.heirs, left)
    heirs = stage.heirs
    exact = rows.to(size.dtype)
    mean = exact * (size / grown)[:, None]
    mean = mean.index_add(0, heirs, exact[stage.dying] * (left / grown[heirs])[:, None])
    return mean.to(rows.dtype), grown
