"""Counting the FLOPs of a model's parts for the cost model, on a copy of the backbone without weights."""

from __future__ import annotations

import torch

from ..backbones import Backbone, Embedded
from ..flop_counter import counted
from .scorers import Scorer, Scores
from .similarity import windows

__all__ = ["count_parts"]


def count_parts(backbone: Backbone, scorer: Scorer, start: int, image_size: tuple[int, int], merge: bool) -> tuple:
    """The fields of `Cost` for images of this size (height, width), counted on a copy without weights.

    ``merge``: dropped patches are merged. They are compared with kept ones only; in windows with all patches.
    """
    skeleton = backbone.skeleton()
    embedded = skeleton.embed(skeleton.blank(image_size))
    decision, scores = _counted_scorer(backbone, skeleton, scorer, start, embedded)
    patches, embedding_dim = scores.embedding.shape[1:]
    cut, pair = windows(patches), 2 * embedding_dim
    if merge and len(cut) > 1:
        decision += sum(pair * (w.stop - w.start) ** 2 for w in cut)
    blocks = tuple(backbone.block_flops(i) for i in range(backbone.depth))
    outer = sum(backbone.outer_flops(image_size))
    return patches, backbone.prefix, outer, decision, blocks, pair if merge and len(cut) == 1 else 0


def _counted_scorer(
    backbone: Backbone, skeleton: Backbone, scorer: Scorer, start: int, embedded: Embedded
) -> tuple[int, Scores]:
    """(FLOPs, output) of the scorer, on the meta device; on real zeros for a scorer that needs values."""
    with torch.no_grad():
        try:
            return counted(skeleton.of(scorer), embedded.tokens, embedded.rope, skeleton, start)
        except Exception:
            tokens = torch.zeros(embedded.tokens.shape, device=backbone.device, dtype=backbone.dtype)
            rope = None if embedded.rope is None else torch.zeros(embedded.rope.shape, device=backbone.device)
            return counted(scorer, tokens, rope, backbone, start)
