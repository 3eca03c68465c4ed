"""The differentiable run: the values of `run_fixed`, with gradients that reach the scorer.

Patches are really dropped, so a training step costs what the slimmed model costs. Each patch has a gate: a sigmoid of
the distance of its score from the score at which patches are dropped. In the forward pass a gate is exactly 1 for kept
patches and 0 for dropped ones; in the backward pass it has the slope of the sigmoid, a straight-through estimator.
Gradients come from three places:

* the gate of a kept patch weights its token, as an attention key and in the mean with what is merged into it;
* one minus the gate of a dropped patch is the weight with which it is merged into its target;
* the choice of a target has the slope of a softmax over cosines, in merging and where a dropped patch is restored from
  its target, and a merge weight is a cosine: embeddings learn too.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ...backbones import Backbone
from ...config import Restore
from ..merging import MergeTargets, initial_sizes, key_bias, without_autocast
from ..plan import Plan
from .fixed import Taps, reorder
from .restore import Dropped, dropped_patches, restored

__all__ = ["run_gated"]

_GATE_WIDTH = 0.5  # of the sigmoid, in mean scores of an image
_TARGET_WIDTH = 0.1  # of the softmax over merge targets, in cosines


def run_gated(
    backbone: Backbone,
    tokens: Float[Tensor, "batch tokens dim"],
    rope: Tensor | None,
    plan: Plan,
    embedding: Float[Tensor, "batch patches embedding_dim"],
    keep_dropped: bool,
    taps: Taps | None = None,
    restore: Restore = "last",
) -> Float[Tensor, "batch tokens_out dim"]:
    """Blocks ``start`` to the end, as `run_fixed`, ``taps`` and ``restore`` too.

    ``plan`` and ``embedding`` (unit length, grid order) come from one call of the scorer, whose graph is kept.
    """
    taps = {} if taps is None else taps
    prefix, start, kept = backbone.prefix, plan.schedule.start, plan.schedule.kept
    x, rope = reorder(tokens, rope, plan.order, prefix)
    score = plan.score.gather(1, plan.order)
    embedding = embedding.gather(1, plan.order[:, :, None].expand_as(embedding))
    size = initial_sizes(x.shape[:2], x)
    drops: list[Dropped] = []
    for index in range(start, backbone.depth):
        before, n = x.shape[1] - prefix, kept[index]
        if n < before:
            last, target, choice, weights = x[:, prefix + n :], None, None, None
            if plan.merge_targets is not None:
                targets = plan.merge_targets.of(n, before)
                target, choice = prefix + targets.rank, _slope(_choice(embedding[:, :before], n))
                weights = _soft_weights(choice, targets)
            slope = _slope(_gate(score[:, :before], n))
            patches, patch_size = _gated_merge(x[:, prefix:], size[:, prefix:], slope, weights, n)
            x, size = torch.cat((x[:, :prefix], patches), 1), torch.cat((size[:, :prefix], patch_size), 1)
            if keep_dropped:
                drops.append(dropped_patches(restore, last, x, target, choice))
            rope = None if rope is None else rope[..., :n, :]
        x = backbone.block(index, x, backbone.rope_of(rope, index), key_bias(size).to(x.dtype))
        if index in taps:
            taps[index] = restored(x, drops)
    return taps[index] if index in taps else restored(x, drops)


def _gate(score: Float[Tensor, "batch patches"], kept: int) -> Float[Tensor, "batch patches"]:
    """How far each patch is on the kept side of a drop point, in (0, 1); ``score`` is in falling order."""
    border = score[:, kept - 1 : kept + 1].mean(dim=1, keepdim=True).detach()
    width = _GATE_WIDTH * score.mean(dim=1, keepdim=True).detach().clamp(min=torch.finfo(score.dtype).tiny)
    return ((score - border) / width).sigmoid()


def _slope(x: Tensor) -> Tensor:
    """Exactly 0, with the gradient of ``x``."""
    return x - x.detach()


def _choice(embedding: Float[Tensor, "batch before embedding_dim"], kept: int) -> Float[Tensor, "batch kept dropped"]:
    """A softmax over the kept patches for each dropped one, by cosine: how likely each is its merge target."""
    return (embedding[:, :kept] @ embedding[:, kept:].transpose(1, 2) / _TARGET_WIDTH).softmax(dim=1)


def _soft_weights(
    choice: Float[Tensor, "batch kept dropped"], targets: MergeTargets
) -> Float[Tensor, "batch kept dropped"]:
    """How much each kept patch takes of each dropped one: the merge weight or 0, with the slope of ``choice``."""
    hard = targets.rank[:, None, :] == torch.arange(choice.shape[1], device=choice.device)[:, None]
    return (hard.to(choice.dtype) + choice) * targets.weight[:, None, :]


def _gated_merge(
    patches: Float[Tensor, "batch before dim"],
    size: Float[Tensor, "batch before"],
    slope: Float[Tensor, "batch before"],
    weights: Float[Tensor, "batch kept dropped"] | None,
    kept: int,
) -> tuple[Float[Tensor, "batch kept dim"], Float[Tensor, "batch kept"]]:
    """(kept patches, their sizes), as `merge`; ``slope`` is 0 with the gradients of the gates."""
    own = size[:, :kept] * (1 + slope[:, :kept])
    if weights is None:
        return patches[:, :kept], own
    received = weights * (size[:, kept:] * (1 - slope[:, kept:]))[:, None]
    new_size = own + received.sum(dim=2)
    exact = patches.to(size.dtype)
    with without_autocast(exact):
        mean = exact[:, :kept] * (own / new_size)[..., None] + (received / new_size[..., None]) @ exact[:, kept:]
    return mean.to(patches.dtype), new_size
