"""Training targets of an image from one forward pass of the dense model. No labels are needed.

Those of dense prediction are in `dense_targets.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..backbones import Backbone
from ..slimming import SlimModel
from ..slimming.scorers import attention_received

__all__ = [
    "Targets",
    "at_start",
    "block_importance",
    "compute_targets",
    "image_token",
    "middle_block",
    "target_starts",
]


class Targets(NamedTuple):
    """Targets of a batch, computed by the dense model.

    Attributes:
        tokens: the input of the start block, which is the input of the scorer. Of several start blocks, one after the
            other along the tokens; so are importance and embedding along the patches (see `at_start`).
        importance: how much the later blocks read from each patch; for dense prediction, how wrong its answers or
            features are if they skip it. Sums to 1 over an image.
        embedding: the patches that enter the middle block, minus their mean. Patches that are similar there can be
            merged at the start block; the similarity at the start block itself predicts this poorly. For dense
            prediction, the change of the patches from the start block on, with a head also their answers.
        output: logits of the dense model; for a model without a classifier its embedding. Empty for dense prediction.
        patches: the patches after the last norm, in grid order; without patches (batch, 0, dim) unless requested. For
            dense prediction, of several blocks if several are distilled, one block after the other.
        image_tokens: the `image_token` after each block from the start block on; without blocks (batch, 0, dim) unless
            requested.
    """

    tokens: Float[Tensor, "batch tokens dim"]
    importance: Float[Tensor, "batch patches"]
    embedding: Float[Tensor, "batch patches dim"]
    output: Float[Tensor, "batch *tokens classes_or_dim"]
    patches: Float[Tensor, "batch patches_or_0 all_dim"]
    image_tokens: Float[Tensor, "batch blocks_or_0 dim"]

    def to(self, device: torch.device) -> Targets:
        """The same targets on ``device``."""
        return Targets(*(values.to(device) for values in self))

    def at_start(self, start: int, starts: Sequence[int]) -> Targets:
        """The targets of one of several start blocks."""
        if len(starts) == 1:
            return self
        own = {name: at_start(getattr(self, name), start, starts) for name in ("tokens", "importance", "embedding")}
        return self._replace(**own, image_tokens=self.image_tokens[:, start - starts[0] :])


def at_start(values: Float[Tensor, "batch all *dim"], start: int, starts: Sequence[int]) -> Tensor:
    """The part of ``start`` of values of several start blocks, one after the other along the second dimension."""
    return values.chunk(len(starts), dim=1)[tuple(starts).index(start)]


def target_starts(model: SlimModel) -> tuple[int, ...]:
    """The start blocks that the targets for ``model`` are of, rising: those of its scorer."""
    return getattr(model.scorer, "starts", None) or model.starts


def middle_block(start: int, depth: int) -> int:
    """Index of the block at whose input patches are compared: a third of the way from ``start`` to the end.

    Other blocks are compared in recipes/NOTES.md.
    """
    return min(depth - 1, start + max(1, (depth - start) // 3))


@torch.no_grad()
def compute_targets(
    backbone: Backbone,
    images: Float[Tensor, "batch channels height width"],
    start: int | Sequence[int],
    patches: bool = False,
    image_tokens: bool = False,
) -> Targets:
    """The targets of ``images``, from one forward pass of the dense model ``backbone``.

    Args:
        backbone: the dense model.
        images: its input.
        start: the start block, or several of them, rising.
        patches: with the patches after the last norm, which only stage 2 of a model without a classifier needs.
        image_tokens: with the image tokens, which only ``token_weight`` needs.
    """
    starts = [start] if isinstance(start, int) else list(start)
    middles = [middle_block(each, backbone.depth) for each in starts]
    x, rope, *_ = backbone.embed(images)
    tokens, embeddings, importances, tokens_after = [], [], [], []
    for index in range(backbone.depth):
        tokens += [x] * (index in starts)
        embeddings += [x[:, backbone.prefix :]] * middles.count(index)
        if index >= starts[0]:
            importances.append(block_importance(x, rope, backbone, index))
        x = backbone.block(index, x, backbone.rope_of(rope, index))
        if index >= starts[0] and image_tokens:
            tokens_after.append(image_token(backbone, x))
    final = backbone.norm(x)
    return Targets(
        torch.cat(tokens, dim=1),
        torch.cat([torch.stack(importances[each - starts[0] :]).mean(dim=0) for each in starts], dim=1),
        torch.cat([embedding - embedding.mean(dim=1, keepdim=True) for embedding in embeddings], dim=1),
        backbone.classify(final),
        final[:, backbone.prefix :] if patches else final[:, :0],
        torch.stack(tokens_after, dim=1) if tokens_after else final[:, :0],
    )


def image_token(backbone: Backbone, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
    """The token that stands for the whole image: the class token, or the mean of all patches if it is not read."""
    return x[:, 0] if backbone.reads_class else x[:, backbone.prefix :].mean(dim=1)


def block_importance(
    x: Float[Tensor, "batch tokens dim"], rope: Tensor | None, backbone: Backbone, index: int
) -> Float[Tensor, "batch patches"]:
    """How much block ``index`` reads from each patch: attention x value norm, summed over heads; sums to 1."""
    norms = backbone.project(index, x, None).v[:, backbone.prefix :].norm(dim=-1).transpose(1, 2)
    read = (attention_received(x, rope, backbone, index) * norms).float().sum(dim=1)
    return read / read.sum(dim=1, keepdim=True)
