"""A small model to export, images for it, and the model together with its exported file."""

from __future__ import annotations

from dataclasses import dataclass

import families
import pytest
import timm
import torch
from torch import Tensor

import patchlife
from patchlife.export import Exported
from patchlife.runtime import Engine
from patchlife.slimming.regressor import LifeRegressor

SMALL = {"depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": 7, "patch_size": 8, "img_size": 48}


@dataclass(frozen=True)
class ExportedModel:
    """A model, its exported file, and the engine that runs the file."""

    model: patchlife.SlimModel
    exported: Exported
    engine: Engine


def small(learned: bool = True, **settings) -> patchlife.SlimModel:
    """A ViT of three blocks, slimmed from its second block on; its scorer is a life regressor with random weights."""
    vit = families.liven(timm.create_model("vit_tiny_patch16_224", **SMALL)).eval()
    torch.manual_seed(0)
    config = patchlife.LifeConfig(**{"budget": 0.7, "start": 1, "drops": (1, 2), **settings})
    return patchlife.wrap(vit, config, LifeRegressor(24, 1, 16, 8) if learned else None).eval()


def small_of_transformers(name: str) -> patchlife.SlimModel:
    """A model of transformers as small as `small`: classifier, embedding (pools by attention) or rotary."""
    transformers = pytest.importorskip("transformers", reason="needs the extra patchlife[transformers]")
    kind, config = {
        "classifier": ("ViTForImageClassification", "ViTConfig"),
        "embedding": ("SiglipVisionModel", "SiglipVisionConfig"),
        "rotary": ("DINOv3ViTModel", "DINOv3ViTConfig"),
    }[name]
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    vit = getattr(transformers, kind)(getattr(transformers, config)(**sizes, image_size=48, patch_size=8))
    return patchlife.wrap(families.liven(vit).eval(), patchlife.LifeConfig(budget=0.7, start=1, drops=(1, 2)))


def images(count: int, seed: int = 5) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 48, 48, generator=draw)
