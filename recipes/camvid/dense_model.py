"""The dense model: timm's ViT-Tiny at 352 x 480 pixels and a small convolutional head on four of its blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from camvid import CLASSES, INPUT
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

BLOCKS = (2, 5, 8, 11)  # the head reads the normed patch features behind these
DETAIL = 4  # the head answers on a grid this many times finer than the patches


class Head(nn.Module):
    """A 3 x 3 convolution, a norm, GELU and a 1 x 1 convolution that gives DETAIL x DETAIL answers for each patch."""

    def __init__(self, width: int = 192, blocks: int = len(BLOCKS), hidden: int = 128):
        super().__init__()
        self.mix = nn.Conv2d(width * blocks, hidden, 3, padding=1)
        self.norm = nn.GroupNorm(1, hidden)
        self.answer = nn.Conv2d(hidden, len(CLASSES) * DETAIL**2, 1)

    def forward(self, maps: list[Float[Tensor, "batch width rows columns"]]) -> Float[Tensor, "batch classes h w"]:
        hidden = F.gelu(self.norm(self.mix(torch.cat(maps, dim=1))))
        return F.pixel_shuffle(self.answer(hidden), DETAIL)  # h, w: DETAIL x rows, columns


def maps_of(
    backbone: Any, images: Float[Tensor, "batch 3 height width"], blocks: tuple[int, ...] = BLOCKS
) -> list[Float[Tensor, "batch width rows columns"]]:
    """What the head reads, from a timm model or from a slimmed one: both have timm's `forward_intermediates`."""
    maps: list[Tensor] = backbone.forward_intermediates(
        images, indices=list(blocks), norm=True, intermediates_only=True
    )
    return maps


def pretrained(weights: Path) -> nn.Module:
    """The shared ViT-Tiny with its positions interpolated to 22 x 30 patches; other sizes are interpolated from those.

    `weights` is the safetensors file of timm's vit_tiny_patch16_224.
    """
    model = backbone()
    state = load_file(weights)
    for name in ("head.weight", "head.bias"):
        state.pop(name)
    state["pos_embed"] = timm.layers.resample_abs_pos_embed(
        state["pos_embed"], [side // 16 for side in INPUT], num_prefix_tokens=1
    )
    model.load_state_dict(state, strict=True)
    return model


def backbone() -> nn.Module:
    """timm's ViT-Tiny without a classifier, with positions for 22 x 30 patches that fit themselves to other sizes."""
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=INPUT, dynamic_img_size=True)


def save(file: Path, backbone: nn.Module, head: nn.Module) -> None:
    """Write both state dicts into one safetensors file; a reader never sees a half-written one."""
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    state |= {f"head.{name}": value for name, value in head.state_dict().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in state.items()}, partial)
    partial.replace(file)


def load(file: Path) -> tuple[nn.Module, Head]:
    """Backbone and head of a file that `save` wrote, in eval mode."""
    state = load_file(file)
    model, head = backbone(), Head()
    for module, prefix in ((model, "backbone."), (head, "head.")):
        module.load_state_dict({name[len(prefix) :]: v for name, v in state.items() if name.startswith(prefix)})
    return model.eval(), head.eval()
