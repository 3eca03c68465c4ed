"""transformers' Vision Transformer layers: running one with another attention function, and reading its projections.

As `timm_blocks.py` does for timm. All supported layers are pre-norm: attention, then an MLP, each with a residual; they
differ in the names of their modules. `check_layer` compares `run_layer` with the layer itself when a model is wrapped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from . import attention
from .attached import attachments, gathered, is_plain_linear, original, without_hooks
from .attention import Attend, Projected, check_same, class_logits, identity_prefix, sdpa
from .skeleton import linear_layers, randomised, skeleton

__all__ = [
    "LAYERS",
    "call_layer",
    "check_layer",
    "check_openable",
    "class_of",
    "class_row",
    "layer_flops",
    "project",
    "rotary_table",
    "run_layer",
]


@dataclass(frozen=True)
class Layer:
    """Names of the modules inside a layer.

    Attributes:
        norm1, attention, norm2, mlp: in the order of the forward pass.
        out: the projection after attention, inside the attention module.
        after_attention, after_mlp: modules applied to the output of a branch.
    """

    norm1: str
    attention: str
    out: str
    after_attention: tuple[str, ...]
    norm2: str
    mlp: str
    after_mlp: tuple[str, ...]


_VIT = Layer("layernorm_before", "attention", "o_proj", ("dropout",), "layernorm_after", "mlp", ("dropout",))
_DINO = Layer(
    "norm1", "attention", "o_proj", ("layer_scale1", "drop_path"), "norm2", "mlp", ("layer_scale2", "drop_path")
)
_CLIP = Layer("layer_norm1", "self_attn", "out_proj", (), "layer_norm2", "mlp", ())

LAYERS = {
    "ViTLayer": _VIT,
    "DeiTLayer": _VIT,
    "ViTMAELayer": _VIT,
    "Dinov2Layer": _DINO,
    "Dinov2WithRegistersLayer": _DINO,
    "DINOv3ViTLayer": _DINO,
    "CLIPEncoderLayer": _CLIP,
    "SiglipEncoderLayer": _CLIP,
    "Idefics2EncoderLayer": _CLIP,
    "Idefics3EncoderLayer": _CLIP,
    "SmolVLMEncoderLayer": _CLIP,
}
"""By the name of the layer's class."""


def class_of(layer: nn.Module) -> type[nn.Module]:
    """The class of transformers that ``layer`` is an instance of; other libraries (FSDP) make subclasses of it."""
    return next(kind for kind in type(original(layer)).__mro__ if kind.__name__ in LAYERS)


def _names(layer: nn.Module) -> Layer:
    return LAYERS[class_of(layer).__name__]


def call_layer(layer: Any, x: Tensor, rope: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """The output of ``layer`` for tokens ``x``; ``rope`` (batch or 1, heads or 1, patches, 2 * head_dim)."""
    if rope is None:
        return layer(x, bias)
    sin, cos = rope.chunk(2, dim=-1)
    return layer(x, attention_mask=bias, position_embeddings=(cos, sin))


def rotary_table(cos: Tensor, sin: Tensor) -> Tensor:
    """`Embedded.rope` from transformers' tables (patches, head_dim)."""
    return torch.cat((sin, cos), dim=-1)[None, None, None]


def run_layer(layer: nn.Module, x: Tensor, attend: Attend, rope: Tensor | None = None) -> Tensor:
    """The output of ``layer`` for ``x`` (..., tokens, dim), with ``attend`` as its attention.

    ``rope`` is (..., tokens, 1 or heads, 2 * head_dim) and covers *all* tokens, see `Backbone.token_rope`.
    """
    names, at = _names(layer), layer.get_submodule
    attn = at(names.attention)
    y = attend(*_projected(attn, at(names.norm1)(x), rope, nn.Module.__call__)).flatten(-2)
    y = attn.get_submodule(names.out)(y)
    for name in names.after_attention:
        y = at(name)(y)
    x = y + x
    y = at(names.mlp)(at(names.norm2)(x))
    for name in names.after_mlp:
        y = at(name)(y)
    return y + x


def project(layer: nn.Module, x: Tensor, rope: Tensor | None = None) -> Projected:
    """Queries, keys and values that ``layer`` computes for ``x``. Hooks on the layer's modules do not fire."""
    layer = original(layer)
    names = _names(layer)
    with gathered(layer):
        y = without_hooks(layer.get_submodule(names.norm1), x)
        return _projected(layer.get_submodule(names.attention), y, rope, without_hooks)


def class_row(layer: nn.Module, x: Tensor, rope: Tensor | None = None) -> Tensor:
    """The class token's attention logits (batch, heads, tokens) in ``layer``. Hooks do not fire.

    Keys are not computed (see `class_logits`) without rotations, for plain linear layers.
    """
    layer = original(layer)
    names = _names(layer)
    attn: Any = layer.get_submodule(names.attention)
    if rope is not None or not (is_plain_linear(attn.q_proj) and is_plain_linear(attn.k_proj)):
        q, k, _ = project(layer, x, rope)
        return attention.class_row(q, k)
    with gathered(layer):
        y = without_hooks(layer.get_submodule(names.norm1), x)
        q = without_hooks(attn.q_proj, y[:, 0]).unflatten(-1, (-1, attn.head_dim))
        return class_logits(q, attn.k_proj.weight, y)


def _projected(attn: Any, y: Tensor, rope: Tensor | None, call: Any) -> Projected:
    q, k, v = (call(layer, y).unflatten(-1, (-1, attn.head_dim)) for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
    if rope is not None:
        q, k = _rotated(q, rope), _rotated(k, rope)
    return Projected(q, k, v)


def _rotated(x: Tensor, rope: Tensor) -> Tensor:
    """``x`` (..., tokens, heads, head_dim), rotated in pairs of channels half a head apart."""
    sin, cos = rope.to(x.dtype).chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def layer_flops(layer: nn.Module) -> tuple[int, int]:
    """(a, c): ``layer`` costs ``a * n + c * n**2`` FLOPs on n tokens, counted as in `timm_blocks.block_flops`."""
    layer = original(layer)
    linear = sum(2 * m.in_features * m.out_features for m in linear_layers(layer))
    attn: Any = layer.get_submodule(_names(layer).attention)
    return linear, 4 * attn.q_proj.out_features


def check_openable(layer: nn.Module, index: int) -> None:
    """Raise UnsupportedModelError if an attachment of ``layer`` or of its attention would have no effect."""
    inner = original(layer)
    for name, module in (("", layer), (f".{_names(inner).attention}", inner.get_submodule(_names(inner).attention))):
        if attached := attachments(module):
            raise UnsupportedModelError(
                f"the modules inside layer {index} are called one by one in adaptive mode and for images of different "
                f"sizes, so {attached} on layer {index}{name} would have no effect; remove it, attach it to a module "
                "inside (q_proj, mlp, ...), or use fixed mode with images of one size, which calls whole layers"
            )


@torch.no_grad()
def check_layer(layer: nn.Module, dim: int, prefix: int, rotary: bool) -> None:
    """Raise UnsupportedModelError unless `run_layer` gives the same output as the layer itself.

    The check runs on a copy of the layer with random weights and without attachments.
    """
    copy = randomised(skeleton(layer))
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, prefix + 5, dim, generator=draw)
    rope = of_all = None
    if rotary:
        width: Any = copy.get_submodule(_names(copy).attention).head_dim
        angle = torch.randn(1, 1, 5, width // 2, generator=draw).tile(2)
        rope = torch.cat((angle.sin(), angle.cos()), -1)
        of_all = identity_prefix(rope, prefix).transpose(-3, -2)
    expected, got = call_layer(copy, x, rope), run_layer(copy, x, sdpa, of_all)
    check_same(layer, "transformers", x, expected, got)
