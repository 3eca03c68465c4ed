"""The small backbone of the baseline tests, and a plain computation of attention to compare with."""

from __future__ import annotations

import torch
from families import built, photos
from torch import Tensor

from patchlife.backbones import Backbone, adapt

IMAGES = 4


def backbone(name: str = "vit") -> Backbone:
    return adapt(built(name))


def images(name: str = "vit") -> Tensor:
    return photos(name, IMAGES)


def attention_maps(vit: torch.nn.Module, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax attention (batch, heads, queries, keys), values (batch, heads, keys, head_dim)) of block ``index``."""
    attn, y = vit.blocks[index].attn, vit.blocks[index].norm1(x)
    q, k, v = attn.qkv(y).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1), v
