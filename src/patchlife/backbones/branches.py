"""A timm block in two halves: attention, then MLP. Only baselines need it, who remove tokens in between.

`run_block` in `blocks.py` runs both; the method itself never comes in here.
"""

from __future__ import annotations

from typing import NamedTuple

from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .backbone import Backbone
from .blocks import Attend, _attention, block_flops, head_dim

__all__ = ["BranchCost", "attention_branch", "branch_cost", "check_branches", "mlp_branch"]


class BranchCost(NamedTuple):
    """What a block's parts cost, in FLOPs (two a multiply-add).

    Attributes:
        project: for each token that becomes query, key and value.
        pair: for each pair of a query and a key.
        out: for each token that attention puts out. mlp: for each token that enters the MLP.
        head_dim: no cost, but what a key is wide in one head.
    """

    project: int
    pair: int
    out: int
    mlp: int
    head_dim: int


def check_branches(backbone: Backbone, who: str, all_queries: bool = True) -> None:
    """Raise UnsupportedModelError unless attention and MLP of every block come one after the other.

    Where not ``all_queries`` get an answer, a gate on the attention's output would not know whose it is.
    """
    for block in backbone.vit.blocks:
        if not isinstance(block, Block | EvaBlock | ResPostBlock | EvaBlockPostNorm):
            raise UnsupportedModelError(
                f"{who} removes tokens between attention and MLP; in a {type(block).__name__} both run at once"
            )
        if not all_queries and getattr(block.attn, "gate", None) is not None:
            raise UnsupportedModelError(f"{who} asks with some tokens only; this model gates attention by all")


def attention_branch(backbone: Backbone, index: int, x: Tensor, attend: Attend, rope: Tensor | None = None) -> Tensor:
    """What block ``index``'s attention adds to ``x``, for the queries that ``attend`` answers: maybe not all."""
    b = backbone.vit.blocks[index]
    match b:
        case Block():
            return b.drop_path1(b.ls1(_attention(b.attn, b.norm1(x), attend, rope)))
        case ResPostBlock() | EvaBlockPostNorm():
            return b.drop_path1(b.norm1(_attention(b.attn, x, attend, rope)))
        case _:
            y = _attention(b.attn, b.norm1(x), attend, rope)
            return b.drop_path1(y if b.gamma_1 is None else b.gamma_1 * y)


def mlp_branch(backbone: Backbone, index: int, x: Tensor) -> Tensor:
    """What block ``index``'s MLP adds to ``x``."""
    b = backbone.vit.blocks[index]
    match b:
        case Block():
            return b.drop_path2(b.ls2(b.mlp(b.norm2(x))))
        case ResPostBlock() | EvaBlockPostNorm():
            return b.drop_path2(b.norm2(b.mlp(x)))
        case _:
            y = b.mlp(b.norm2(x))
            return b.drop_path2(y if b.gamma_2 is None else b.gamma_2 * y)


def branch_cost(backbone: Backbone, index: int) -> BranchCost:
    """What the halves of block ``index`` cost."""
    block = backbone.vit.blocks[index]
    total, pair = block_flops(block)
    out = 2 * block.attn.proj.weight.numel()
    attention = sum(2 * m.weight.numel() for m in block.attn.modules() if isinstance(m, nn.Linear))
    return BranchCost(attention - out, pair, out, total - attention, head_dim(block.attn))
