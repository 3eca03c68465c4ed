"""Fixed mode: one gather puts the patches in order of life, then every block runs on a prefix. Static shapes."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ...backbones import Backbone
from ...config import Restore
from ..merging import initial_sizes, key_bias, merge
from ..plan import Plan
from ..similarity import take, token_index
from .restore import Dropped, dropped_patches, restored

__all__ = ["Taps", "reorder", "run_fixed"]

Taps = dict[int, Tensor]
"""Tokens after some blocks, by block index: the keys are the requested blocks, a run fills in the values."""


def run_fixed(
    backbone: Backbone,
    tokens: Float[Tensor, "batch tokens dim"],
    rope: Tensor | None,
    plan: Plan,
    keep_dropped: bool,
    taps: Taps | None = None,
    restore: Restore = "last",
) -> Float[Tensor, "batch tokens_out dim"]:
    """Blocks ``start`` to the end, on fewer and fewer patches.

    Returns the prefix tokens, then patches in the plan's order: the kept ones, or with ``keep_dropped`` all of them,
    dropped ones as ``restore`` says. ``taps`` (with ``keep_dropped``) gets all tokens after each block that it names.
    """
    taps = {} if taps is None else taps
    prefix, start, kept = backbone.prefix, plan.schedule.start, plan.schedule.kept
    all_needed = keep_dropped or plan.merge_targets is not None
    x, rope = reorder(tokens, rope, plan.order if all_needed else plan.order[:, : kept[start]], prefix)
    size = bias = places = None
    if plan.merge_targets is not None:
        size, places = initial_sizes(x.shape[:2], x), prefix + plan.merge_targets.rank
    drops: list[Dropped] = []
    for index in range(start, backbone.depth):
        before, n = x.shape[1] - prefix, kept[index]
        if n < before:
            last, target = x[:, prefix + n :], None
            if size is not None and places is not None and plan.merge_targets is not None:
                target = places[:, n:before]
                x, size = merge(x, size, target, plan.merge_targets.weight[:, n:before])
                bias = key_bias(size).to(x.dtype)
            else:
                x = x[:, : prefix + n].contiguous()  # once per drop point: a strided slice slows blocks by up to 25 %
            if keep_dropped:
                drops.append(dropped_patches(restore, last, x, target))
            rope = None if rope is None else rope[..., :n, :]
        x = backbone.block(index, x, backbone.rope_of(rope, index), bias)
        if index in taps:
            taps[index] = restored(x, drops)
    return taps[index] if index in taps else restored(x, drops)


def reorder(tokens: Tensor, rope: Tensor | None, order: Tensor, prefix: int) -> tuple[Tensor, Tensor | None]:
    """The one gather: prefix tokens, then the patches of ``order``; rotary tables are gathered with their patches."""
    x = take(tokens, token_index(order, prefix))
    if rope is not None:
        index = order[None, :, None, :, None].expand(rope.shape[0], -1, rope.shape[2], -1, rope.shape[-1])
        rope = rope.expand(-1, order.shape[0], -1, -1, -1).gather(3, index)
    return x, rope
