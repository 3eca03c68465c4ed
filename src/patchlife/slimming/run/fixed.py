"""Fixed mode: put the patches in order once, then every block runs on a prefix of them. Static shapes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ...backbones import Backbone
from ..merging import inherit, key_bias, one_each
from ..plan import Plan

__all__ = ["Taps", "reorder", "run_fixed"]

Taps = dict[int, Tensor]
"""Tokens after some blocks, by the blocks' index: keys are wishes, values are filled in by a run."""


def run_fixed(
    backbone: Backbone,
    tokens: Float[Tensor, "batch tokens dim"],
    rope: Tensor | None,
    plan: Plan,
    keep_dead: bool,
    taps: Taps | None = None,
) -> Float[Tensor, "batch tokens_out dim"]:
    """Blocks ``start`` to the end on ever fewer patches.

    Returns the prefix tokens, then the patches in the plan's order: the survivors only, or all of them, the dead
    at their last state, if ``keep_dead``. ``taps`` (with ``keep_dead``) is filled in: all tokens after each block
    that it names, in the plan's order.
    """
    taps = {} if taps is None else taps
    prefix, start, survivors = backbone.prefix, plan.schedule.start, plan.schedule.survivors
    everyone = keep_dead or plan.heirs is not None  # somebody still needs the dead
    x, rope = reorder(tokens, rope, plan.order if everyone else plan.order[:, : survivors[start]], prefix)
    size = one_each(plan.order.shape, x)
    bias, tails = None, []
    for index in range(start, backbone.depth):
        before, n = x.shape[1] - prefix, survivors[index]
        if n < before:
            if keep_dead:
                tails.append(x[:, prefix + n :])
            if plan.heirs is not None:
                patches, size = inherit(x[:, prefix:], size, plan.heirs.of(n, before))
                x = torch.cat((x[:, :prefix], patches), dim=1)
                bias = key_bias(size, prefix).to(x.dtype)
            else:
                x = x[:, : prefix + n].contiguous()  # once per drop: a strided slice slows blocks by up to 25 %
            rope = None if rope is None else rope[..., :n, :]
        x = backbone.block(index, x, backbone.rope_of(rope, index), bias)
        if index in taps:
            taps[index] = torch.cat((x, *reversed(tails)), dim=1)
    return torch.cat((x, *reversed(tails)), dim=1) if tails else x


def reorder(tokens: Tensor, rope: Tensor | None, order: Tensor, prefix: int) -> tuple[Tensor, Tensor | None]:
    """The one gather: prefix tokens, then the patches of ``order``; rotary tables go along with their patches."""
    image = torch.arange(order.shape[0], device=order.device)[:, None]
    front = torch.arange(prefix, device=order.device).expand(order.shape[0], -1)
    x = tokens[image, torch.cat((front, order + prefix), dim=1)]
    if rope is not None:
        index = order[None, :, None, :, None].expand(rope.shape[0], -1, rope.shape[2], -1, rope.shape[-1])
        rope = rope.expand(-1, order.shape[0], -1, -1, -1).gather(3, index)
    return x, rope
