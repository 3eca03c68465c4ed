"""A differentiable end of life: a fixed run whose values are those of `run_fixed`, and whose gradient reaches the head.

Patches really are dropped, so a step costs what the slimmed model costs. What is differentiable is the edge. Each
patch has a gate, a sigmoid of how far its score lies from the border between the living and the dying. Forwards a gate
is exactly 1 for those who live and 0 for those who die; backwards it has the sigmoid's slope, so

* a survivor is asked how much it would be missed: its gate is its weight as a key and in the mean it shares with its
  heritage;
* a dying patch is asked how much it harms its heir: what is left over by its gate is what it bequeaths;
* the choice of an heir has the slope of a softmax over similarities, and the share that it takes over is a cosine, so
  kin vectors learn too.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ...backbones import Backbone
from ..merging import Heirs, key_bias, one_each
from ..plan import Plan
from .fixed import reorder

__all__ = ["run_gated"]

_GATE_WIDTH = 0.5  # of a gate's edge, in mean scores of an image
_HEIR_WIDTH = 0.1  # of the choice of an heir, in cosines


def run_gated(
    backbone: Backbone,
    tokens: Float[Tensor, "batch tokens dim"],
    rope: Tensor | None,
    plan: Plan,
    kin: Float[Tensor, "batch patches kin_dim"],
    keep_dead: bool,
) -> Float[Tensor, "batch tokens_out dim"]:
    """Blocks ``start`` to the end, as `run_fixed`.

    ``plan`` and ``kin`` (unit rows, grid order) come from one opinion of the head whose gradient is kept.
    """
    prefix, start, survivors = backbone.prefix, plan.schedule.start, plan.schedule.survivors
    x, rope = reorder(tokens, rope, plan.order, prefix)
    score = plan.score.gather(1, plan.order)
    kin = kin.gather(1, plan.order[:, :, None].expand_as(kin))
    size = one_each(score.shape, x)
    tails = []
    for index in range(start, backbone.depth):
        before, n = x.shape[1] - prefix, survivors[index]
        if n < before:
            if keep_dead:
                tails.append(x[:, prefix + n :])
            slope = _slope(_gate(score[:, :before], n))
            heirs = None if plan.heirs is None else plan.heirs.of(n, before)
            takes = None if heirs is None else _takes(kin, heirs, n)
            patches, size = _end_lives(x[:, prefix:], size, slope, takes, n)
            x = torch.cat((x[:, :prefix], patches), dim=1)
            rope = None if rope is None else rope[..., :n, :]
        x = backbone.block(index, x, backbone.rope_of(rope, index), key_bias(size, prefix).to(x.dtype))
    return torch.cat((x, *reversed(tails)), dim=1) if tails else x


def _gate(score: Float[Tensor, "batch patches"], survivors: int) -> Float[Tensor, "batch patches"]:
    """How surely each patch outlives a drop, in (0, 1); ``score`` is in falling order."""
    border = score[:, survivors - 1 : survivors + 1].mean(dim=1, keepdim=True).detach()
    width = _GATE_WIDTH * score.mean(dim=1, keepdim=True).detach().clamp(min=torch.finfo(score.dtype).tiny)
    return ((score - border) / width).sigmoid()


def _slope(x: Tensor) -> Tensor:
    """Exactly 0, with the gradient of ``x``."""
    return x - x.detach()


def _takes(
    kin: Float[Tensor, "batch patches kin_dim"], heirs: Heirs, survivors: int
) -> Float[Tensor, "batch survivors dying"]:
    """Who takes how much: its share or 0 forwards, a softmax over the survivors backwards."""
    dying = kin[:, survivors : survivors + heirs.rank.shape[1]]
    soft = (kin[:, :survivors] @ dying.transpose(1, 2) / _HEIR_WIDTH).softmax(dim=1)
    hard = heirs.rank[:, None, :] == torch.arange(survivors, device=soft.device)[:, None]
    return (hard.to(soft.dtype) + _slope(soft)) * heirs.share[:, None, :]


def _end_lives(
    patches: Float[Tensor, "batch before dim"],
    size: Float[Tensor, "batch before"],
    slope: Float[Tensor, "batch before"],
    takes: Float[Tensor, "batch survivors dying"] | None,
    n: int,
) -> tuple[Float[Tensor, "batch survivors dim"], Float[Tensor, "batch survivors"]]:
    """Survivors and their sizes; ``slope`` is 0 with the gates' gradients."""
    alive = size[:, :n] * (1 + slope[:, :n])
    if takes is None:
        return patches[:, :n], alive
    left = takes * (size[:, n:] * (1 - slope[:, n:]))[:, None]
    grown = alive + left.sum(dim=2)
    exact = patches.to(size.dtype)
    mean = exact[:, :n] * (alive / grown)[..., None] + (left / grown[..., None]) @ exact[:, n:]
    return mean.to(patches.dtype), grown
