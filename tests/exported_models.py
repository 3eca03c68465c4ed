"""A small model to export, images for it, and both with the file that was made of it."""

from __future__ import annotations

from dataclasses import dataclass

import families
import timm
import torch
from torch import Tensor

import patchlife
from patchlife.export import Exported
from patchlife.runtime import Engine
from patchlife.slimming.regressor import LifeRegressor

SMALL = {"depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": 7, "patch_size": 8, "img_size": 48}


@dataclass(frozen=True)
class Shipped:
    """A model and a file made of it."""

    model: patchlife.SlimModel
    exported: Exported
    engine: Engine


def small(head: bool = True, **settings) -> patchlife.SlimModel:
    """A lively ViT of three blocks with a learned head (of random weights), slimmed from its second block on."""
    vit = families.liven(timm.create_model("vit_tiny_patch16_224", **SMALL)).eval()
    torch.manual_seed(0)
    config = patchlife.LifeConfig(**{"budget": 0.7, "start": 1, "drops": (1, 2), **settings})
    return patchlife.wrap(vit, config, LifeRegressor(24, 1, 16, 8) if head else None).eval()


def images(count: int, seed: int = 5) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 48, 48, generator=draw)
