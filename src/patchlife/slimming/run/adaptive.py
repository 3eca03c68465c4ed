"""Packed runs: each image has its own number of patches, without padding, and keeps its own number of them.

The tokens of all images are concatenated into one packed sequence. Norms, linear layers and MLPs work on single tokens,
so they run on the packed sequence; attention runs image by image (`packed.py`). Adaptive mode runs so, and images of
different sizes in either mode (`mixed.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ...backbones import Backbone
from ...config import Restore
from ..merging import initial_sizes, log_size, merge_rows
from ..plan import Plan
from .fixed import Taps, reorder
from .packed import packed_attention
from .restore import DroppedRows, dropped_rows, restored_rows

__all__ = ["RunStage", "Stage", "rotations", "run_adaptive", "run_packed", "run_stage", "split_rows", "stages"]


@dataclass(frozen=True)
class Stage:
    """Consecutive blocks that the same tokens enter.

    Tokens are given as row numbers of the full layout: all tokens, image after image, prefix tokens first, then patches
    in the plan's order.

    Attributes:
        blocks: block indices.
        tokens: rows that enter these blocks, image after image.
        offsets: where each image begins in the packed sequence, and the end: images + 1 numbers, and one more where the
            sequence is filled up. begins: the same numbers on the device of the tokens.
        dropped: rows that entered the stage before and do not enter this one.
        targets: the row that each of them is merged into. weights: its merge weight.
    """

    blocks: range
    tokens: Int[Tensor, "packed"]
    offsets: tuple[int, ...]
    begins: Int[Tensor, "images_and_more"]
    dropped: Int[Tensor, "dropped"]
    targets: Int[Tensor, "dropped"]
    weights: Float[Tensor, "dropped"]


RunStage = Callable[[Backbone, Stage, Tensor, Tensor | None, list[Tensor]], Tensor]
"""How a stage's blocks run: as `run_stage`."""


def stages(
    plans: Sequence[Plan], prefix: int, length_of: Callable[[int], int] | None = None, ends: Iterable[int] = ()
) -> list[Stage]:
    """The packed layout of every stage, from the counts of the plans.

    The device is waited for twice: when the counts are read, and when the layout of all stages is copied to it.

    Each plan is of images of one size; their images follow each other. A stage ends where counts change, and after each
    block of ``ends``.

    With ``length_of`` a packed sequence of n tokens is filled up to ``length_of(n)`` with copies of a spare row, the
    last one of the layout, which belongs to no image and attends to itself only.
    """
    counts = torch.cat([plan.kept() for plan in plans]).cpu()
    patches = torch.cat([counts.new_full((len(plan.order),), plan.order.shape[1]) for plan in plans])
    width = prefix + patches  # rows of each image
    first = width.cumsum(0) - width  # the row at which it begins
    device, start = plans[0].order.device, plans[0].schedule.start
    merging = _merge_rows(plans, prefix)
    changes = [
        b for b in range(start + 1, counts.shape[1]) if b - 1 in ends or not torch.equal(counts[:, b], counts[:, b - 1])
    ]
    before = patches
    layouts = []
    for block, end in pairwise([start, *changes, counts.shape[1]]):
        after = counts[:, block]
        present, dropped = _rows(first, prefix + after), _rows(first + prefix + after, before - after)
        offsets = (0, *(prefix + after).cumsum(0).tolist())
        if length_of is not None:
            spare = present.new_full((length_of(offsets[-1]) - offsets[-1],), int(width.sum()))
            present, offsets = torch.cat((present, spare)), (*offsets, offsets[-1] + len(spare))
        layouts.append((range(block, end), offsets, (present, torch.tensor(offsets), dropped)))
        before = after
    moved = iter(_moved([tensor for _, _, tensors in layouts for tensor in tensors], device))
    result = []
    for blocks, offsets, _ in layouts:
        present, begins, dropped = next(moved), next(moved), next(moved)
        targets, weights = dropped, torch.ones(len(dropped), device=device)
        if merging is not None:
            targets, weights = merging[0][dropped], merging[1][dropped]
        result.append(Stage(blocks, present, offsets, begins, dropped, targets, weights))
    return result


def _moved(tensors: Sequence[Int[Tensor, "_"]], device: torch.device) -> Sequence[Int[Tensor, "_"]]:
    """``tensors`` of the CPU on ``device``, in one copy: each copy waits for all work of the device."""
    if device.type == "cpu":
        return tensors
    return torch.cat(list(tensors)).to(device).split([len(tensor) for tensor in tensors])


def _rows(first: Int[Tensor, "images"], lengths: Int[Tensor, "images"]) -> Int[Tensor, "packed"]:
    """``lengths`` rows of each image, from its row ``first`` on."""
    image = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    within = torch.arange(len(image), device=lengths.device) - (lengths.cumsum(0) - lengths)[image]
    return first[image] + within


def _merge_rows(plans: Sequence[Plan], prefix: int) -> tuple[Int[Tensor, "all"], Float[Tensor, "all"]] | None:
    """(the row that each row is merged into when it is dropped, its merge weight); None without merging."""
    if all(plan.merge_targets is None for plan in plans):
        return None
    targets, weights, first = [], [], 0
    for plan in plans:
        batch, patches = plan.order.shape
        width, device = prefix + patches, plan.order.device
        begin = first + width * torch.arange(batch, device=device)[:, None]
        own = torch.arange(width, device=device).expand(batch, -1)
        weight = torch.ones(batch, width, device=device)
        if plan.merge_targets is not None:
            own = torch.cat((own[:, :prefix], prefix + plan.merge_targets.rank), dim=1)
            weight = F.pad(plan.merge_targets.weight, (prefix, 0), value=1.0)
        targets.append((begin + own).flatten())
        weights.append(weight.flatten())
        first += batch * width
    return torch.cat(targets), torch.cat(weights)


def run_stage(backbone: Backbone, stage: Stage, x: Tensor, bias: Tensor | None, tables: list[Tensor]) -> Tensor:
    """A stage's blocks on its packed sequence ``x`` (packed, dim); ``bias`` (packed) is added to each key's logits.

    ``tables`` are the rotary tables of its tokens: none, one for all blocks, or one for each.
    """
    attend = packed_attention(stage.offsets, bias, x, stage.begins)
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
    """`run_packed` for images of one size."""
    return run_packed(backbone, [tokens], [rope], [plan], run, length_of, taps, restore)[0]


def run_packed(
    backbone: Backbone,
    tokens: Sequence[Float[Tensor, "batch tokens dim"]],
    ropes: Sequence[Tensor | None],
    plans: Sequence[Plan],
    run: RunStage = run_stage,
    length_of: Callable[[int], int] | None = None,
    taps: Taps | None = None,
    restore: Restore = "last",
) -> list[Float[Tensor, "batch tokens dim"]]:
    """Blocks ``start`` to the end, each image on its own number of patches.

    ``tokens``, ``ropes`` and ``plans`` have one entry for each image size. Returns all tokens in the plan's order for
    each size, dropped patches as ``restore`` says; ``taps``, for one size only, gets the same after each block that it
    names. Gradients flow through it. ``run`` and ``length_of`` (see `stages`) are for compiled blocks.
    """
    taps = {} if taps is None else taps
    pairs = [reorder(x, r, plan.order, backbone.prefix) for x, r, plan in zip(tokens, ropes, plans, strict=True)]
    ordered, ropes = [x for x, _ in pairs], [rope for _, rope in pairs]
    rows = _joined([x.flatten(0, 1) for x in ordered])
    if length_of is not None:
        rows = torch.cat((rows, torch.zeros_like(rows[:1])))
    size = None if all(plan.merge_targets is None for plan in plans) else initial_sizes(rows.shape[:1], rows)
    drops: list[DroppedRows] = []

    def all_tokens() -> list[Tensor]:
        return split_rows(restored_rows(rows, drops) if drops else rows, ordered)

    for stage in stages(plans, backbone.prefix, length_of, taps):
        if size is not None and len(stage.dropped):
            rows, size = _merge(rows, size, stage)
            if restore != "last":  # which the rows hold anyway
                drops.append(dropped_rows(restore, rows, stage.dropped, stage.targets))
        x = rows[stage.tokens]
        bias = None if size is None else log_size(size[stage.tokens]).to(x.dtype)
        rows = _put(rows, stage.tokens, run(backbone, stage, x, bias, rotations(backbone, ropes, stage)))
        if stage.blocks[-1] in taps:
            taps[stage.blocks[-1]] = all_tokens()[0] if drops else all_tokens()[0].clone()
    return all_tokens()


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def split_rows(
    rows: Float[Tensor, "all dim"], like: Sequence[Float[Tensor, "batch tokens dim"]]
) -> list[Float[Tensor, "batch tokens dim"]]:
    """The rows of the layout as one tensor for each image size, of the shapes of ``like``; without the spare row."""
    lengths = [x.shape[0] * x.shape[1] for x in like]
    parts = rows[: sum(lengths)].split(lengths)
    return [part.unflatten(0, x.shape[:2]) for part, x in zip(parts, like, strict=True)]


def _put(rows: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """``rows`` with new ``values`` at ``places``; in place where no gradient needs the old ones."""
    return rows.index_copy(0, places, values) if torch.is_grad_enabled() else rows.index_copy_(0, places, values)


def rotations(backbone: Backbone, ropes: Sequence[Tensor | None], stage: Stage) -> list[Tensor]:
    """Rotary tables of the stage's tokens: one for each block that has its own, one for all, or none.

    ``ropes`` are the tables of each image size, with an entry for each image.
    """
    tables = []
    known = ropes[0]
    for index in stage.blocks if known is not None and known.shape[0] > 1 else stage.blocks[:1]:
        parts = [backbone.token_rope(rope, index) for rope in ropes]
        found = [part.flatten(0, 1) for part in parts if part is not None]
        if found:
            rows = _joined(found)
            tables.append(rows[stage.tokens.clamp(max=len(rows) - 1)])  # the rotation of the spare row does not matter
    return tables


def _merge(
    rows: Float[Tensor, "all dim"], size: Float[Tensor, "all"], stage: Stage
) -> tuple[Float[Tensor, "all dim"], Float[Tensor, "all"]]:
    """(rows, sizes) after the dropped patches were merged into their targets; dropped rows keep their last state.

    In float32 at least.
    """
    moved, exact = size[stage.dropped] * stage.weights.to(size.dtype), rows.to(size.dtype)
    mean, new_size = merge_rows(exact, size, exact[stage.dropped], moved, stage.targets)
    return mean.to(rows.dtype), new_size
