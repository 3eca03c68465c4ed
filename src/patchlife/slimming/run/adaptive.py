"""Adaptive mode: each image keeps its own number of patches, without padding.

The tokens of all images are concatenated into one packed sequence. Norms, linear layers and MLPs work on single tokens,
so they run on the packed sequence; attention runs image by image (`packed.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...backbones import Backbone
from ...config import Restore
from ..merging import initial_sizes, log_size
from ..plan import Plan
from .fixed import Taps, reorder
from .packed import packed_attention
from .restore import DroppedRows, dropped_rows, restored_rows

__all__ = ["RunStage", "Stage", "run_adaptive", "run_stage", "stages"]


@dataclass(frozen=True)
class Stage:
    """Consecutive blocks that the same tokens enter.

    Tokens are given as row numbers of the full layout (batch * tokens rows, patches in the plan's order).

    Attributes:
        blocks: block indices.
        tokens: rows that enter these blocks, image after image.
        offsets: where each image begins in the packed sequence, and the end: batch + 1 numbers, and one more where the
            sequence is filled up.
        dropped: rows that entered the stage before and do not enter this one.
        targets: the row that each of them is merged into. weights: its merge weight.
    """

    blocks: range
    tokens: Int[Tensor, "packed"]
    offsets: tuple[int, ...]
    dropped: Int[Tensor, "dropped"]
    targets: Int[Tensor, "dropped"]
    weights: Float[Tensor, "dropped"]


RunStage = Callable[[Backbone, Stage, Tensor, Tensor | None, list[Tensor]], Tensor]
"""How a stage's blocks run: as `run_stage`."""


def stages(
    plan: Plan, prefix: int, length_of: Callable[[int], int] | None = None, ends: Iterable[int] = ()
) -> list[Stage]:
    """The packed layout of every stage, from the plan's counts (read once: the only host sync of a run).

    A stage ends where counts change, and after each block of ``ends``.

    With ``length_of`` a packed sequence of n tokens is filled up to ``length_of(n)`` with copies of a spare row, the
    last one of the layout, which belongs to no image and attends to itself only.
    """
    counts = plan.kept().cpu()
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
        present = _rows(torch.zeros(batch, dtype=torch.long), prefix + after, width).to(device)
        dropped = _rows(prefix + after, prefix + before, width).to(device)
        targets, weights = dropped, torch.ones(len(dropped), device=device)
        if plan.merge_targets is not None:
            image, rank = dropped // width, dropped % width - prefix
            targets = image * width + prefix + plan.merge_targets.rank[image, rank]
            weights = plan.merge_targets.weight[image, rank]
        offsets = (0, *(prefix + after).cumsum(0).tolist())
        if length_of is not None:
            spare = present.new_full((length_of(offsets[-1]) - offsets[-1],), batch * width)
            present, offsets = torch.cat((present, spare)), (*offsets, offsets[-1] + len(spare))
        result.append(Stage(range(first, end), present, offsets, dropped, targets, weights))
        before = after
    return result


def _rows(first: Int[Tensor, "batch"], end: Int[Tensor, "batch"], width: int) -> Int[Tensor, "packed"]:
    """Rows ``first`` to ``end`` of each image, in a layout of ``width`` rows per image."""
    lengths = end - first
    image = torch.arange(len(lengths)).repeat_interleave(lengths)
    within = torch.arange(len(image)) - (lengths.cumsum(0) - lengths)[image]
    return image * width + first[image] + within


def run_stage(backbone: Backbone, stage: Stage, x: Tensor, bias: Tensor | None, tables: list[Tensor]) -> Tensor:
    """A stage's blocks on its packed sequence ``x`` (packed, dim); ``bias`` (packed) is added to each key's logits.

    ``tables`` are the rotary tables of its tokens: none, one for all blocks, or one for each.
    """
    attend = packed_attention(stage.offsets, bias, x)
    for place, index in enumerate(stage.blocks):
        x = backbone.block_with(index, x, attend, tables[place % len(tables)] if tables else None)
    return x


def run_adaptive(
    backbone: Backbone,
    tokens: Float[Tensor, "batch tokens dim"],
    rope: Tensor | None,
    plan: Plan,
    run: RunStage = run_stage,
    length_of: Callable[[int], int] | None = None,
    taps: Taps | None = None,
    restore: Restore = "last",
) -> Float[Tensor, "batch tokens dim"]:
    """Blocks ``start`` to the end, each image on its own number of patches.

    Returns all tokens in the plan's order, dropped patches as ``restore`` says; ``taps`` gets the same after each block
    that it names. Gradients flow through it. ``run`` and ``length_of`` (see `stages`) are for compiled blocks.
    """
    taps = {} if taps is None else taps
    ordered, rope = reorder(tokens, rope, plan.order, backbone.prefix)
    rows = ordered.flatten(0, 1)
    if length_of is not None:
        rows = torch.cat((rows, torch.zeros_like(rows[:1])))
    size = None if plan.merge_targets is None else initial_sizes(rows.shape[:1], rows)
    drops: list[DroppedRows] = []

    def all_tokens() -> Tensor:
        shown = restored_rows(rows, drops) if drops else rows
        return shown[: ordered.shape[:2].numel()].unflatten(0, ordered.shape[:2])

    for stage in stages(plan, backbone.prefix, length_of, taps):
        if size is not None and len(stage.dropped):
            rows, size = _merge(rows, size, stage)
            if restore != "last":  # which the rows hold anyway
                drops.append(dropped_rows(restore, rows, stage.dropped, stage.targets))
        x = rows[stage.tokens]
        bias = None if size is None else log_size(size[stage.tokens]).to(x.dtype)
        rows = _put(rows, stage.tokens, run(backbone, stage, x, bias, _rotations(backbone, rope, stage)))
        if stage.blocks[-1] in taps:
            taps[stage.blocks[-1]] = all_tokens() if drops else all_tokens().clone()
    return all_tokens()


def _put(rows: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """``rows`` with new ``values`` at ``places``; in place where no gradient needs the old ones."""
    return rows.index_copy(0, places, values) if torch.is_grad_enabled() else rows.index_copy_(0, places, values)


def _rotations(backbone: Backbone, rope: Tensor | None, stage: Stage) -> list[Tensor]:
    """Rotary tables of the stage's tokens: one for each block that has its own, one for all, or none."""
    tables = []
    for index in stage.blocks if rope is not None and rope.shape[0] > 1 else stage.blocks[:1]:
        table = backbone.token_rope(rope, index)
        if table is not None:
            rows = table.flatten(0, 1)
            tables.append(rows[stage.tokens.clamp(max=len(rows) - 1)])  # the rotation of the spare row does not matter
    return tables


def _merge(
    rows: Float[Tensor, "all dim"], size: Float[Tensor, "all"], stage: Stage
) -> tuple[Float[Tensor, "all dim"], Float[Tensor, "all"]]:
    """(rows, sizes) after the dropped patches were merged into their targets; dropped rows keep their last state.

    In float32 at least, weights first, as `merging.merge` does. A weight of 1 leaves a row as it is, to the bit.
    """
    moved = size[stage.dropped] * stage.weights.to(size.dtype)
    new_size = size.index_add(0, stage.targets, moved)
    exact = rows.to(size.dtype)
    mean = exact * (size / new_size)[:, None]
    mean = mean.index_add(0, stage.targets, exact[stage.dropped] * (moved / new_size[stage.targets])[:, None])
    return mean.to(rows.dtype), new_size
