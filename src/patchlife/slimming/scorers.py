"""Scorers: modules that read the tokens entering the start block once and score every patch.

Scores are on any scale; a higher score means a longer life. `plan.py` turns scores into lives. The cosines of
similarity embeddings choose the kept patch that a dropped one is merged into (`merging.py`).
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..backbones import Backbone
from .coverage import coverage_gain
from .similarity import comparable, subspace, unit

__all__ = ["QUERIES", "AttentionScorer", "Scorer", "Scores", "attention_received"]

_WHOLE_TOKENS = 512
"""Up to this number of patches similarities are those of whole tokens; they cost little there."""
_WIDTH = 48
"""Dimensions of the similarity embeddings above it."""
QUERIES = 256
"""Number of tokens, evenly spaced, whose attention stands for that of all."""


class Scores(NamedTuple):
    """What a scorer returns for a batch.

    Attributes:
        score: a higher score means a longer life.
        embedding: similarity embeddings, vectors of unit length.
    """

    score: Float[Tensor, "batch patches"]
    embedding: Float[Tensor, "batch patches embedding_dim"]


class Scorer(nn.Module):
    """Base class of scorers; write `forward`, and `settings` if the constructor takes arguments.

    Attributes:
        kind: the name of the class in saved adapters.
        gives_shares: whether scores are shares of an image, as coverage gains are: an image of more patches gives each
            of them less. Then the thresholds of adaptive mode also serve images of about as many patches as those that
            they were calibrated on.
        starts: the start blocks that the scorer was fitted for; None if it does not know them, or scores at any block.
    """

    kind: ClassVar[str]
    gives_shares: ClassVar[bool] = False
    starts: tuple[int, ...] | None = None

    def settings(self) -> dict[str, Any]:
        """Constructor arguments, as JSON values, that build this scorer again; its weights are saved separately."""
        return {}

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        rope: Tensor | None,
        backbone: Backbone,
        start: int,
    ) -> Scores:
        """Score the patches of ``tokens``, the input of block ``start`` of ``backbone``."""
        raise NotImplementedError


class AttentionScorer(Scorer):
    """The training-free scorer: the coverage gain of the attention that a patch receives in the start block.

    Importance is the attention received, mean over the heads; embeddings are the normalised tokens, of large images in
    few dimensions. See `coverage.py`.
    """

    kind = "attention-coverage-2"  # change it whenever scores change: calibrations hold thresholds on scores
    gives_shares = True

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        rope: Tensor | None,
        backbone: Backbone,
        start: int,
    ) -> Scores:
        """Score the patches of ``tokens``, the input of block ``start`` of ``backbone``."""
        received = attention_received(tokens, rope, backbone, start).sum(dim=1, dtype=torch.float32)
        embedding = unit(comparable(tokens[:, backbone.prefix :]))
        if embedding.shape[1] > _WHOLE_TOKENS:
            embedding = unit(subspace(embedding, _WIDTH))
        return Scores(coverage_gain(received / received.sum(dim=1, keepdim=True), embedding), embedding)


def attention_received(
    tokens: Float[Tensor, "batch tokens dim"], rope: Tensor | None, backbone: Backbone, index: int
) -> Float[Tensor, "batch heads patches"]:
    """Attention that patches receive in block ``index``, whose input is ``tokens``.

    In models that classify from the class token it is that token's row of the attention matrix; in others, the mean
    over the rows of all tokens, of which at most `QUERIES` evenly spaced ones are computed.
    """
    rotation = backbone.token_rope(rope, index)
    if backbone.reads_class:
        return backbone.class_row(index, tokens, rotation).softmax(dim=-1)[..., backbone.prefix :]
    q, k, _ = backbone.project(index, tokens, rotation)
    q, heads = q[:, :: -(-q.shape[1] // QUERIES)] * q.shape[-1] ** -0.5, range(q.shape[2])
    # one head at a time, to bound the memory
    each = [(q[:, :, h] @ k[:, :, h].transpose(1, 2)).softmax(dim=-1).mean(dim=1) for h in heads]
    return torch.stack(each, dim=1)[..., backbone.prefix :]
