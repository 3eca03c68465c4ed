"""open_clip's transformer blocks: running one with another attention function, and reading its projections.

As `timm_blocks.py` does for timm. ``ResidualAttentionBlock`` holds torch's ``nn.MultiheadAttention``, and
``CustomResidualAttentionBlock`` holds open_clip's ``Attention``. Both keep the projections to queries, keys and values
as a parameter of the attention, ``in_proj_weight``, not as a layer. nn.MultiheadAttention also reads the weight of its
``out_proj`` without calling that layer, and so does this file. `check_block` compares `run_block` with the block itself
when a model is wrapped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip.transformer import Attention, CustomResidualAttentionBlock, ResidualAttentionBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UnsupportedModelError
from . import attention
from .attached import attachments, compute_weights, gathered, original, without_hooks
from .attention import Attend, Projected, check_same, class_logits, sdpa
from .skeleton import linear_layers, randomised, skeleton

__all__ = [
    "BLOCK_TYPES",
    "block_flops",
    "call_block",
    "check_attention",
    "check_block",
    "check_openable",
    "class_row",
    "project",
    "run_block",
]

BLOCK_TYPES = (ResidualAttentionBlock, CustomResidualAttentionBlock)

Call = Callable[[nn.Module, Tensor], Tensor]
"""A function that applies a module: a plain call, or a call without hooks."""


def call_block(block: Any, x: Tensor, bias: Tensor | None, checkpointed: bool) -> Float[Tensor, "batch tokens dim"]:
    """The output of ``block``, called as a module. ``bias`` is added to the attention logits, see `Backbone.block`."""
    mask = bias
    if bias is not None and isinstance(original(block).attn, nn.MultiheadAttention):
        # nn.MultiheadAttention takes no other shape than (batch * heads, queries, keys)
        mask = bias.expand(x.shape[0], original(block).attn.num_heads, x.shape[1], x.shape[1]).flatten(0, 1)
    sequence_first = not getattr(original(block).attn, "batch_first", True)
    x = x.transpose(0, 1) if sequence_first else x
    if checkpointed and torch.is_grad_enabled():
        y: Any = checkpoint(block, x, attn_mask=mask, use_reentrant=False)
    else:
        y = block(x, attn_mask=mask)
    return y.transpose(0, 1) if sequence_first else y


def run_block(block: Any, x: Tensor, attend: Attend) -> Float[Tensor, "*batch tokens dim"]:
    """The output of ``block`` for ``x`` (..., tokens, dim), with ``attend`` as its attention."""
    attn = block.attn
    y = attend(*_projected(attn, block.ln_1(x), _call))
    if isinstance(attn, nn.MultiheadAttention):
        y = F.linear(y.flatten(-2), attn.out_proj.weight, attn.out_proj.bias)
    else:
        y = y if attn.head_scale is None else y * attn.head_scale.squeeze(-1)
        y = block.ln_attn(attn.out_drop(attn.out_proj(attn.ln_inner(y.flatten(-2)))))
    x = x + block.ls_1(y)
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def project(block: Any, x: Tensor) -> Projected:
    """Queries, keys and values that ``block`` computes for ``x``. Hooks on the block's modules do not fire."""
    block = original(block)
    with gathered(block):
        compute_weights(block.attn)
        return _projected(block.attn, without_hooks(block.ln_1, x), without_hooks)


def class_row(block: Any, x: Tensor) -> Float[Tensor, "batch heads tokens"]:
    """The class token's attention logits in ``block``. Hooks do not fire.

    Keys are not computed (see `class_logits`) where they are not normalised.
    """
    block = original(block)
    attn = block.attn
    if type(getattr(attn, "ln_k", nn.Identity())) is not nn.Identity:
        q, k, _ = project(block, x)
        return attention.class_row(q, k)
    with gathered(block):
        compute_weights(attn)
        y = without_hooks(block.ln_1, x)
        w_q, w_k, _ = attn.in_proj_weight.chunk(3)
        b_q = None if attn.in_proj_bias is None else attn.in_proj_bias.chunk(3)[0]
        return class_logits(F.linear(y[:, 0], w_q, b_q).unflatten(-1, (attn.num_heads, -1)), w_k, y)


def _call(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def _projected(attn: Any, y: Tensor, call: Call) -> Projected:
    both = F.linear(y, attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = both.unflatten(-1, (3, attn.num_heads, -1)).unbind(-3)
    if isinstance(attn, Attention):
        q, k = call(attn.ln_q, q), call(attn.ln_k, k)
    return Projected(q, k, v)


def block_flops(block: Any) -> tuple[int, int]:
    """(a, c): ``block`` costs ``a * n + c * n**2`` FLOPs on n tokens, counted as in `timm_blocks.block_flops`."""
    block = original(block)
    linear = sum(2 * m.in_features * m.out_features for m in linear_layers(block))
    dim = block.attn.out_proj.in_features
    return linear + 2 * 3 * dim * dim, 4 * dim


# ---- refusals


def check_attention(block: Any, index: int) -> None:
    """Raise UnsupportedModelError unless queries and keys can be read from the attention of ``block``."""
    attn, name = original(block).attn, f"transformer.resblocks.{index}.attn"
    if not isinstance(attn, nn.MultiheadAttention | Attention):
        raise UnsupportedModelError(
            f"expected nn.MultiheadAttention or open_clip's Attention as {name}, got "
            f"{type(attn).__module__}.{type(attn).__name__}; if an adapter replaced it, merge the adapter first (peft: "
            "merge_and_unload), or attach it to mlp.c_fc and mlp.c_proj only"
        )
    if getattr(attn, "logit_scale", None) is not None:
        raise UnsupportedModelError(f"{name} uses scaled_cosine_attn; its logits are not products of queries and keys")
    if hasattr(original(block), "ln_1_kv") or getattr(attn, "bias_k", None) is not None:
        raise UnsupportedModelError(f"{name} has keys that do not come from the tokens of its block")


def check_openable(block: Any, index: int) -> None:
    """Raise UnsupportedModelError if an attachment of ``block`` or of its attention would have no effect."""
    attn = original(block).attn
    for name, module in (("", block), (".attn", attn)):
        attached = attachments(module)
        if "_hf_hook" in module.__dict__ and module._parameters:
            attached = "weight offloading"
        if attached:
            where = f"transformer.resblocks.{index}{name}"
            raise UnsupportedModelError(
                f"the modules inside {where} are used one by one in adaptive mode, so {attached} on {where} would have "
                "no effect; remove it, attach it to a module inside (mlp.c_fc, ln_1, ...), or use fixed mode, which "
                "calls whole blocks"
            )


@torch.no_grad()
def check_block(block: Any, dim: int) -> None:
    """Raise UnsupportedModelError unless `run_block` gives the same output as the block itself.

    The check runs on a copy of the block with random weights and without attachments, with a bias on the logits.
    """
    copy = randomised(skeleton(block))
    draw = torch.Generator().manual_seed(0)
    x, bias = torch.randn(2, 6, dim, generator=draw), torch.randn(2, 1, 1, 6, generator=draw)
    expected = call_block(copy, x, bias, checkpointed=False)
    got = run_block(copy, x, lambda q, k, v: sdpa(q, k, v, bias))
    check_same(block, "open_clip", x, expected, got)
