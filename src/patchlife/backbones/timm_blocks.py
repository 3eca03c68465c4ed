"""timm's transformer blocks: running a block with another attention function, and reading its projections.

Fixed mode calls a block as a module. Two parts of the method need more. Adaptive mode computes attention per image
inside a batch of packed tokens: `run_block` calls the modules inside the block in the block's order, and the caller
supplies the attention function. The scorer reads queries and keys before the block runs: `project` and `class_row`
apply the block's projections through `attached.without_hooks`. `check_block` compares `run_block` with the block
itself when a model is wrapped, so that a block that changed in a timm release is refused instead of computing
something else.

Blocks have the type `Any`, because the attributes used here are private to timm.

Tokens come before heads everywhere: ``q`` is ``(..., tokens, heads, head_dim)``, with or without a batch dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from ..errors import UnsupportedModelError
from . import attention
from .attached import attachments, gathered, is_plain_linear, original, without_hooks
from .attention import Attend, Projected, check_same, class_logits, identity_prefix, sdpa
from .skeleton import linear_layers, randomised, skeleton

__all__ = [
    "BLOCK_TYPES",
    "block_flops",
    "check_block",
    "check_openable",
    "class_row",
    "head_dim",
    "project",
    "run_block",
]

Call = Callable[[nn.Module, Tensor], Tensor]
"""A function that applies a module: a plain call, or a call without hooks."""

ATTENTION_TYPES = (Attention, EvaAttention, AttentionRope)


def run_block(block: Any, x: Tensor, attend: Attend, rope: Tensor | None = None) -> Tensor:
    """The output of ``block`` for ``x`` (..., tokens, dim), with ``attend`` as its attention.

    ``rope`` is (..., tokens, 1 or heads, 2 * head_dim) and covers *all* tokens. The rows of prefix tokens hold the
    identity rotation (see `Backbone.token_rope`).
    """
    return _RUNNERS[type_before_parametrizations(block)](block, x, attend, rope)


def check_openable(block: Any, index: int, opened: bool) -> None:
    """Raise UnsupportedModelError if an attachment of ``block`` or of its attention would have no effect.

    `run_block` (``opened``) calls neither the block itself nor its attention module, only the modules inside. In
    timm, a block with parallel attentions that gets a bias does not call the attention modules either.
    """
    inside = getattr(block, "_modules", {})
    if not opened and "attns" not in inside:
        return
    not_called = [("", block), ("attn", inside.get("attn"))] if opened else []
    for name, module in [*not_called, *_parallel_attentions(inside.get("attns"), opened)]:
        attached = attachments(module) if module is not None else ""
        if opened and "_hf_hook" in block.__dict__ and block._parameters:
            attached = "weight offloading"
        if attached:
            where = f"blocks.{index}" + (f".{name}" if name else "")
            whole = "use fixed mode with images of one size, which calls whole blocks"
            remedy = whole if opened else "switch merging off (merge=False)"
            raise UnsupportedModelError(
                f"the modules inside {where} are called one by one, so {attached} on {where} would have no effect; "
                f"remove it, attach it to a module inside (qkv, proj, mlp, norm1, ...), or {remedy}"
            )


def _parallel_attentions(attentions: Any, opened: bool) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of parallel attentions that are not called themselves."""
    for index, branch in enumerate(attentions if attentions is not None else ()):
        yield f"attns.{index}", branch
        if opened:
            yield f"attns.{index}.attn", branch.attn


def project(block: Any, x: Tensor, rope: Tensor | None = None) -> Projected:
    """Queries, keys and values that ``block`` computes for ``x`` (of parallel attentions, the first one's).

    Hooks on the block's modules do not fire.
    """
    block = original(block)
    with gathered(block):
        if isinstance(block, ParallelScalingBlock):
            y = without_hooks(block.in_proj, without_hooks(block.in_norm, x))
            return _split_parallel(block, y, without_hooks)[1]
        attn, y = _attention_input(block, x)
        return _project(attn, y, rope, without_hooks)


def class_row(block: Any, x: Tensor, rope: Tensor | None = None) -> Float[Tensor, "batch heads tokens"]:
    """The attention logits of the class token's query in ``block``. Hooks on the block's modules do not fire.

    Keys are not computed (see `class_logits`) without rotations and key norms, for plain linear layers.
    """
    block = original(block)
    if rope is not None or isinstance(block, ParallelScalingBlock) or not _can_skip_keys(block):
        q, k, _ = project(block, x, rope)
        return attention.class_row(q, k)
    with gathered(block):
        attn, y = _attention_input(block, x)
        (w_q, b_q), w_k = _query_and_key_weights(attn)
        q = without_hooks(attn.q_norm, F.linear(y[:, 0], w_q, b_q).unflatten(-1, (attn.num_heads, -1)))
        return class_logits(q, w_k, y)


def _can_skip_keys(block: Any) -> bool:
    """Whether `class_row` may multiply the query with the key weights instead of computing the keys."""
    attn: Any = block.attns[0].attn if isinstance(block, ParallelThingsBlock) else block.attn
    layers = [attn.qkv] if attn.qkv is not None else [attn.q_proj, attn.k_proj]
    return (
        type(attn.k_norm) is nn.Identity
        and _kv_heads(attn) == attn.num_heads
        and all(is_plain_linear(layer) for layer in layers)
    )


def _attention_input(block: Any, x: Tensor) -> tuple[Any, Tensor]:
    """(the block's first attention module, its input for ``x``)."""
    kind = type_before_parametrizations(block)
    if kind is ParallelThingsBlock:
        return block.attns[0].attn, without_hooks(block.attns[0].norm, x)
    if kind in (ResPostBlock, EvaBlockPostNorm):
        return block.attn, x
    return block.attn, without_hooks(block.norm1, x)


def head_dim(attn: Any) -> int:
    """Width of one head. Some timm releases have no ``head_dim``; there it follows from ``scale``."""
    return getattr(attn, "head_dim", None) or round(attn.scale**-2)


def _call(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def _kv_heads(attn: Any) -> int:
    return getattr(attn, "num_kv_heads", attn.num_heads)


def _qkv_bias(attn: Any) -> Tensor | None:
    if getattr(attn, "q_bias", None) is not None:  # EVA stores the biases separately; its key bias is zero
        return torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    return attn.qkv.bias


def _query_and_key_weights(attn: Any) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
    """((weight, bias) of the projection to queries, weight of that to keys)."""
    if attn.qkv is None:
        return (attn.q_proj.weight, attn.q_proj.bias), attn.k_proj.weight
    weight, bias = attn.qkv.weight, _qkv_bias(attn)
    width = len(weight) // 3
    return (weight[:width], None if bias is None else bias[:width]), weight[width : 2 * width]


def _project(attn: Any, y: Tensor, rope: Tensor | None, call: Call = _call) -> Projected:
    heads = attn.num_heads
    if attn.qkv is not None:
        q, k, v = _qkv(attn, y, call).unflatten(-1, (3, heads, -1)).unbind(-3)
    else:
        q = call(attn.q_proj, y).unflatten(-1, (heads, -1))
        k, v = (call(proj, y).unflatten(-1, (_kv_heads(attn), -1)) for proj in (attn.k_proj, attn.v_proj))
    q, k = call(attn.q_norm, q), call(attn.k_norm, k)
    if rope is not None:
        half = getattr(attn, "rotate_half", False)
        q = apply_rot_embed_cat(q, rope, half=half).type_as(v)
        k = apply_rot_embed_cat(k, rope, half=half).type_as(v)
    if k.shape[-2] != heads:  # grouped-query attention
        k = k.repeat_interleave(heads // k.shape[-2], dim=-2)
        v = v.repeat_interleave(heads // v.shape[-2], dim=-2)
    return Projected(q, k, v)


def _qkv(attn: Any, y: Tensor, call: Call) -> Tensor:
    """Concatenated queries, keys and values, computed by the same call of the layer as in timm."""
    if getattr(attn, "q_bias", None) is None:
        return call(attn.qkv, y)
    bias: Any = _qkv_bias(attn)
    if attn.qkv_bias_separate:
        return call(attn.qkv, y) + bias
    return F.linear(y, attn.qkv.weight, bias)  # as in timm: EVA's qkv layer is not called


def _attention(attn: Any, y: Tensor, attend: Attend, rope: Tensor | None) -> Tensor:
    out = attn.norm(attend(*_project(attn, y, rope)).flatten(-2))
    if getattr(attn, "gate", None) is not None:
        out = out * attn.gate(y).sigmoid()
    return attn.proj_drop(attn.proj(out))


def _run_block(b: Any, x: Tensor, attend: Attend, rope: Tensor | None) -> Tensor:
    x = x + b.drop_path1(b.ls1(_attention(b.attn, b.norm1(x), attend, rope)))
    return x + b.drop_path2(b.ls2(b.mlp(b.norm2(x))))


def _run_eva(b: Any, x: Tensor, attend: Attend, rope: Tensor | None) -> Tensor:
    y = _attention(b.attn, b.norm1(x), attend, rope)
    x = x + b.drop_path1(y if b.gamma_1 is None else b.gamma_1 * y)
    y = b.mlp(b.norm2(x))
    return x + b.drop_path2(y if b.gamma_2 is None else b.gamma_2 * y)


def _run_post_norm(b: Any, x: Tensor, attend: Attend, rope: Tensor | None) -> Tensor:
    x = x + b.drop_path1(b.norm1(_attention(b.attn, x, attend, rope)))
    return x + b.drop_path2(b.norm2(b.mlp(x)))


def _run_parallel_things(b: Any, x: Tensor, attend: Attend, rope: Tensor | None) -> Tensor:
    x = x + sum(a.drop_path(a.ls(_attention(a.attn, a.norm(x), attend, rope))) for a in b.attns)
    return x + sum(ffn(x) for ffn in b.ffns)


def _split_parallel(b: Any, y: Tensor, call: Call = _call) -> tuple[Tensor, Projected]:
    hidden, *qkv = torch.split(y, b.in_split, dim=-1)
    q, k, v = (t.unflatten(-1, (b.num_heads, b.head_dim)) for t in qkv)
    return hidden, Projected(call(b.q_norm, q), call(b.k_norm, k), v)


def _run_parallel_scaling(b: Any, x: Tensor, attend: Attend, rope: Tensor | None) -> Tensor:
    hidden, qkv = _split_parallel(b, b.in_proj(b.in_norm(x)))
    if b.mlp_bias is not None:
        hidden = hidden + b.mlp_bias
    hidden = b.mlp_drop(b.mlp_act(hidden))
    attended = attend(*qkv).flatten(-2)
    if getattr(b, "out_proj", None) is not None:
        y = b.out_proj(torch.cat((attended, hidden), dim=-1))
    else:
        y = b.attn_out_proj(attended) + b.mlp_out_proj(hidden)
    return x + b.drop_path(b.ls(y))


_RUNNERS: dict[type, Callable[..., Tensor]] = {
    Block: _run_block,
    EvaBlock: _run_eva,
    EvaBlockPostNorm: _run_post_norm,
    ResPostBlock: _run_post_norm,
    ParallelThingsBlock: _run_parallel_things,
    ParallelScalingBlock: _run_parallel_scaling,
}
BLOCK_TYPES = tuple(_RUNNERS)


def block_flops(block: Any) -> tuple[int, int]:
    """(a, c): ``block`` costs ``a * n + c * n**2`` FLOPs on n tokens.

    Counted as torch's FlopCounterMode counts: matrix products only, two operations per multiply-add. A linear layer is
    counted by its size: a quantised layer like a float one, a layer with LoRA as if LoRA were merged.
    """
    linear = sum(2 * m.in_features * m.out_features for m in linear_layers(block))
    attentions = [m for m in block.modules() if isinstance(m, (*ATTENTION_TYPES, ParallelScalingBlock))]
    return linear, sum(4 * a.num_heads * head_dim(a) for a in attentions)


@torch.no_grad()
def check_block(block: Any, dim: int, prefix: int, rope_width: int | None) -> None:
    """Raise UnsupportedModelError unless `run_block` gives the same output as the block itself.

    The check runs on a copy of the block with random weights and without attachments.

    Args:
        block: a block of timm. dim: token width. prefix: number of prefix tokens.
        rope_width: last dimension of the rotation tables; None for blocks without rotary positions.
    """
    attentions = [m for m in block.modules() if isinstance(m, ATTENTION_TYPES)]
    if type_before_parametrizations(block) not in _RUNNERS or not (
        attentions or isinstance(block, ParallelScalingBlock)
    ):
        raise UnsupportedModelError(
            f"expected blocks of {', '.join(t.__name__ for t in BLOCK_TYPES)} with standard attention, got "
            f"{type(block).__name__} with {type(getattr(block, 'attn', block)).__name__}"
        )
    copy = randomised(skeleton(block))
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, prefix + 5, dim, generator=draw)
    rope, rope_of_all = {}, None
    if rope_width is not None:
        angle = torch.randn(5, rope_width // 2, generator=draw)
        rope["rope"] = torch.cat((angle.sin(), angle.cos()), -1)
        rope_of_all = identity_prefix(rope["rope"], prefix).unsqueeze(-2)
    expected, got = copy(x, **rope), run_block(copy, x, sdpa, rope_of_all)
    check_same(block, "timm", x, expected, got)
