"""From the names of open_clip's weights to the names that all libraries share, which are timm's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["shared_names"]

_NAMES = (  # (regular expression, replacement), applied in this order
    (r"^conv1\.", "patch_embed.proj."),
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^ln_pre\.", "norm_pre."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.attn\.ln_(q|k)\.", r".attn.\1_norm."),
    (r"\.attn\.ln_inner\.", ".attn.norm."),
    (r"^(blocks\.\d+)\.ln_([12])\.", r"\1.norm\2."),
    (r"^(blocks\.\d+)\.ls_([12])\.", r"\1.ls\2."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.ln\.", ".mlp.norm."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^ln_post\.", "norm."),
    (r"^proj$", "head.weight"),
)


def shared_names(weights: Mapping[str, Any]) -> dict[str, list[Any]]:
    """As `Backbone.shared_names`: each weight in one part and in timm's shape; ``proj`` is the head."""
    return {_shared(name): [_shaped(name, weight)] for name, weight in weights.items()}


def _shared(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _shaped(name: str, weight: Any) -> Any:
    """A view of a weight in timm's shape: positions and class token have a batch dimension, a head is transposed."""
    if isinstance(weight, Tensor):
        if name == "class_embedding":
            return weight[None, None]
        if name == "positional_embedding":
            return weight[None]
        if name == "proj":
            return weight.T
    return weight
