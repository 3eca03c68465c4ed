"""The attention branch and the MLP branch of a timm block, separately.

Only baselines that remove tokens between the two branches use this module. The method runs whole
blocks (`timm_blocks.py`).
"""

from __future__ import annotations

from typing import NamedTuple

from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .attention import Attend
from .backbone import Backbone
from .timm import TimmBackbone
from .timm_blocks import _attention, block_flops, head_dim

__all__ = ["BranchCost", "attention_branch", "branch_cost", "check_branches", "mlp_branch"]


class BranchCost(NamedTuple):
    """FLOPs of a block's parts (two per multiply-add).

    Attributes:
        project: per token that is projected to query, key and value.
        pair: per pair of a query and a key.
        out: per output token of the attention. mlp: per token that enters the MLP.
        head_dim: width of a key in one head (not a cost).
    """

    project: int
    pair: int
    out: int
    mlp: int
    head_dim: int


def check_branches(backbone: Backbone, method: str, all_queries: bool = True) -> None:
    """Raise UnsupportedModelError unless attention and MLP run one after the other in every block.

    If a method computes attention for some queries only (``all_queries`` is False), blocks whose attention output is
    gated per token are refused as well. ``method`` is its name, for the error.
    """
    if not isinstance(backbone, TimmBackbone):
        raise UnsupportedModelError(
            f"{method} runs on timm's blocks only, got {type(backbone.model).__name__}; compare on a model of timm"
        )
    for block in backbone.model.blocks:
        if not isinstance(block, Block | EvaBlock | ResPostBlock | EvaBlockPostNorm):
            raise UnsupportedModelError(
                f"{method} removes tokens between attention and MLP; in a {type(block).__name__} both run in parallel"
            )
        if not all_queries and getattr(block.attn, "gate", None) is not None:
            raise UnsupportedModelError(
                f"{method} computes attention for some tokens only; this model's attention has a gate for every token"
            )


def attention_branch(backbone: Backbone, index: int, x: Tensor, attend: Attend, rope: Tensor | None = None) -> Tensor:
    """Output of the attention branch of block ``index``, before the residual sum, for the queries of ``attend``."""
    b = backbone.model.blocks[index]
    match b:
        case Block():
            return b.drop_path1(b.ls1(_attention(b.attn, b.norm1(x), attend, rope)))
        case ResPostBlock() | EvaBlockPostNorm():
            return b.drop_path1(b.norm1(_attention(b.attn, x, attend, rope)))
        case _:
            y = _attention(b.attn, b.norm1(x), attend, rope)
            return b.drop_path1(y if b.gamma_1 is None else b.gamma_1 * y)


def mlp_branch(backbone: Backbone, index: int, x: Tensor) -> Tensor:
    """Output of the MLP branch of block ``index``, before the residual sum."""
    b = backbone.model.blocks[index]
    match b:
        case Block():
            return b.drop_path2(b.ls2(b.mlp(b.norm2(x))))
        case ResPostBlock() | EvaBlockPostNorm():
            return b.drop_path2(b.norm2(b.mlp(x)))
        case _:
            y = b.mlp(b.norm2(x))
            return b.drop_path2(y if b.gamma_2 is None else b.gamma_2 * y)


def branch_cost(backbone: Backbone, index: int) -> BranchCost:
    """`BranchCost` of block ``index``."""
    block = backbone.model.blocks[index]
    total, pair = block_flops(block)
    out = 2 * block.attn.proj.weight.numel()
    attention = sum(2 * m.weight.numel() for m in block.attn.modules() if isinstance(m, nn.Linear))
    return BranchCost(attention - out, pair, out, total - attention, head_dim(block.attn))
