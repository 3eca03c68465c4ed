"""The life regressor: the learned scorer, for one start block or for several."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..backbones import Backbone
from ..config.checks import check_wholes
from ..errors import ConfigError
from .coverage import coverage_gain
from .scorers import Scorer, Scores
from .similarity import unit

__all__ = ["LifeRegressor", "LifeRegressors"]


class LifeRegressor(Scorer):
    """A small network on the tokens that enter the start block, with two outputs for each patch.

    Both are regressed from what the dense model does later: the patch's share of importance (how much the later blocks
    read from it), and a similarity embedding whose cosines are those of the patches a few blocks later. The score is
    the coverage gain of that importance (`coverage.py`); merge targets follow from the embeddings.

    Args:
        dim: token width of the backbone.
        prefix: number of prefix tokens; their mean is a further input for every patch.
        width: hidden units.
        embedding_dim: width of the similarity embeddings.
    """

    kind = "life-regressor"
    gives_shares = True

    def __init__(self, dim: int, prefix: int, width: int = 96, embedding_dim: int = 48) -> None:
        super().__init__()
        self.dim, self.prefix, self.width, self.embedding_dim = dim, prefix, width, embedding_dim
        self.norm = nn.LayerNorm(dim)
        self.patch = nn.Linear(dim, width)
        self.context = nn.Linear(dim, width)
        self.importance = nn.Linear(width, 1)
        self.similarity = nn.Linear(width, embedding_dim)
        self.similarity_skip = nn.Linear(dim, embedding_dim, bias=False)

    def settings(self) -> dict[str, Any]:
        """Constructor arguments that build this scorer again."""
        return {"dim": self.dim, "prefix": self.prefix, "width": self.width, "embedding_dim": self.embedding_dim}

    def regress(self, tokens: Float[Tensor, "batch tokens dim"]) -> tuple[Tensor, Tensor]:
        """(logits of importance (batch, patches), embeddings of unit length (batch, patches, embedding_dim))."""
        x = self.norm(tokens)
        patches = x[:, self.prefix :].contiguous()  # once: a linear layer copies a strided input each time
        context = x[:, : self.prefix] if self.prefix else patches
        # contiguous: torch 2.9 rounds the product of a strided batch by how the weights are aligned in memory
        context = context.contiguous() if self.prefix == 1 else context.mean(dim=1, keepdim=True)
        hidden = F.gelu(self.patch(patches) + self.context(context))
        embedding = self.similarity(hidden) + self.similarity_skip(patches)
        return self.importance(hidden).squeeze(-1), unit(embedding)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"], rope: Tensor | None, backbone: Backbone, start: int
    ) -> Scores:
        """Score the patches of ``tokens``, the input of block ``start`` of ``backbone``."""
        logits, embedding = self.regress(tokens.to(self.norm.weight.dtype))
        importance = logits.float().softmax(dim=1)
        return Scores(coverage_gain(importance, embedding), embedding)


class LifeRegressors(Scorer):
    """A `LifeRegressor` for each of several start blocks: low budgets start earlier than high ones.

    Attributes:
        starts: the start blocks, rising.

    Args:
        dim: token width of the backbone.
        prefix: number of prefix tokens.
        starts: the start blocks.
        width: hidden units of each. embedding_dim: width of the similarity embeddings.
    """

    kind = "life-regressors"
    gives_shares = True

    def __init__(self, dim: int, prefix: int, starts: Iterable[int], width: int = 96, embedding_dim: int = 48) -> None:
        super().__init__()
        self.starts: tuple[int, ...] = tuple(sorted(set(check_wholes(starts, "starts"))))
        if not self.starts or self.starts[0] < 1:
            raise ConfigError(f"starts must be blocks from 1 on, got {self.starts}")
        each = {str(start): LifeRegressor(dim, prefix, width, embedding_dim) for start in self.starts}
        self.regressors = nn.ModuleDict(each)

    def settings(self) -> dict[str, Any]:
        """Constructor arguments that build this scorer again."""
        first = self.at(self.starts[0]).settings()
        return {**first, "starts": list(self.starts)}

    def at(self, start: int) -> LifeRegressor:
        """The scorer of a start block. Raises ConfigError if there is none."""
        if start not in self.starts:
            fitted = ", ".join(map(str, self.starts))
            raise ConfigError(f"this scorer was fitted for the start blocks {fitted}, got start block {start}")
        return cast(LifeRegressor, self.regressors[str(start)])

    def only(self, starts: Iterable[int]) -> LifeRegressors:
        """The scorers of these start blocks only, which are not copied."""
        settings = self.at(self.starts[0]).settings()
        chosen = LifeRegressors(**{**settings, "starts": starts})
        chosen.regressors = nn.ModuleDict({str(start): self.at(start) for start in chosen.starts})
        return chosen.train(self.training)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"], rope: Tensor | None, backbone: Backbone, start: int
    ) -> Scores:
        """Score the patches of ``tokens``, the input of block ``start`` of ``backbone``."""
        return self.at(start)(tokens, rope, backbone, start)
