"""From the names of transformers' weights to the names that all libraries share, which are timm's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["shared_names"]

_CORE_NAMES = (  # (regular expression, replacement), applied in this order
    (r"^(layers|encoder\.layers?|model\.layer)\.", "blocks."),
    (r"(layernorm_before|layer_norm1)", "norm1"),
    (r"(layernorm_after|layer_norm2)", "norm2"),
    (r"^(blocks\.\d+)\.(attention|self_attn)\.", r"\1.attn."),
    (r"attn\.(q|k|v)_proj\.", r"attn.qkv."),
    (r"attn\.(o_proj|out_proj)\.", "attn.proj."),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    (r"mlp\.(gate_proj|up_proj)\.", "mlp.fc1."),
    (r"mlp\.down_proj\.", "mlp.fc2."),
    (r"^embeddings\.patch_embeddings?(\.projection)?\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings?(\.weight)?$", "pos_embed"),
    (r"^embeddings\.(cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(layernorm|post_layernorm)\.", "norm."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.in_proj_", "attn_pool.in_proj_"),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
)
_HEAD_NAMES = {
    "classifier": "head",
    "cls_classifier": "head",
    "distillation_classifier": "head_dist",
    "visual_projection": "head",
}
_UNUSED = re.compile(r"(^|\.)mask_token$")  # read only where patches are masked, in pre-training
_PARTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # in the order in which they form a weight


def shared_names(weights: Mapping[str, Any], core: str) -> dict[str, list[Any]]:
    """As `Backbone.shared_names`; q, k and v are parts of one weight, as are the halves of a gated MLP.

    ``core`` is the name of the core inside the model; empty for a core itself.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, weight in weights.items():
        if not _UNUSED.search(name):
            shared = _shared_name(name, f"{core}." if core else "")
            found.setdefault(shared, {})[name] = _shaped(shared, weight)
    return {name: [parts[own] for own in sorted(parts, key=_part)] for name, parts in found.items()}


def _shared_name(name: str, core: str) -> str:
    outer, _, rest = name.partition(".")
    if core and not name.startswith(core) and outer in _HEAD_NAMES:
        return f"{_HEAD_NAMES[outer]}.{rest}"
    name = name.removeprefix(core)
    for pattern, replacement in _CORE_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _shaped(name: str, weight: Any) -> Any:
    """A weight in timm's shape: a table of positions and a class token have a batch dimension there."""
    if isinstance(weight, Tensor):
        if name == "pos_embed" and weight.ndim == 2:
            return weight[None]
        if name == "cls_token" and weight.ndim == 1:
            return weight[None, None]
    return weight


def _part(name: str) -> int:
    """Place of a part in its weight, by the part's name in transformers."""
    return next((place for place, part in enumerate(_PARTS) if f".{part}." in name), 0)
