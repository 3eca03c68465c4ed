"""A small model with random weights for every class of transformers that patchlife supports.

Together the families have all special parts of these models: eager and fused attention, gated MLPs, register tokens,
layer scale, dropout and stochastic depth, projections without bias, models without pooler or pooling head, images that
are not square. Dropout has an effect in training mode only.
"""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from families import START, liven
from torch import Tensor, nn
from versions import needs_transformers

from patchlife import LifeConfig, SlimModel, wrap

T: Any = pytest.importorskip("transformers", reason="the extra patchlife[transformers] is not installed")

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "patch_size": 8,
    "image_size": 48,
}
BUDGET = 0.65  # every family can reach it with block `START` as start block
OTHER_SIZE = (40, 56)  # different from the size of all models here, and not square

VARIANTS = {
    f"{mode}{', merge' if merge else ''}": {"mode": mode, "merge": merge}
    for mode in ("fixed", "adaptive")
    for merge in (False, True)
}


@dataclass(frozen=True)
class Family:
    """A class of models and the settings that make a small one.

    Attributes:
        kind: name of the class.
        config: name of the class of its settings.
        settings: in addition to `SIZES`.
        images: (height, width) of the test images.
        attention: the attention implementation.
        make: arguments of the class in addition to its settings.
    """

    kind: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    images: tuple[int, int] = (48, 48)
    attention: str = "sdpa"
    make: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The model, with transformers' own initial weights."""
        settings = {**SIZES, "attn_implementation": self.attention, **self.settings}
        if self.config in ("CLIPConfig", "SiglipConfig"):
            text = {"bos_token_id": 0, "eos_token_id": 1, "hidden_size": 24, "num_attention_heads": 2, "vocab_size": 40}
            text |= {"num_hidden_layers": 2, "intermediate_size": 48, "projection_dim": 24}
            labels = settings.pop("num_labels", 2)
            settings = {
                "vision_config": {**settings, "projection_dim": 24},
                "text_config": text,
                "projection_dim": 24,
                "num_labels": labels,
            }
            settings["attn_implementation"] = settings["vision_config"].pop("attn_implementation")
        config = getattr(T, self.config)(**settings)
        if self.kind.endswith("Backbone"):
            return T.AutoBackbone.from_config(config)
        if self.kind.endswith("VisionTransformer"):
            module = importlib.import_module(getattr(T, self.config).__module__.replace("configuration", "modeling"))
            return getattr(module, self.kind)(config)
        return getattr(T, self.kind)(config, **self.make)


_DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}
_DROP_PATH = {"drop_path_rate": 0.3, **_DROPOUT}
_EAGER = {"attention": "eager"}
_DINOV3 = {"num_register_tokens": 4, "layerscale_value": 0.5}
_LABELS = {"num_labels": 10}

FAMILIES = {
    "vit": Family("ViTModel", "ViTConfig", _DROPOUT),
    "vit-no-pooler": Family(
        "ViTModel",
        "ViTConfig",
        {"qkv_bias": False},
        **_EAGER,
        make={"add_pooling_layer": False, "use_mask_token": True},
    ),
    "vit-classifier": Family("ViTForImageClassification", "ViTConfig", {**_LABELS, **_DROPOUT}),
    "vit-not-square": Family(
        "ViTForImageClassification", "ViTConfig", {**_LABELS, "image_size": (32, 56)}, (32, 56), **_EAGER
    ),
    "vit-grey": Family("ViTForImageClassification", "ViTConfig", {**_LABELS, "num_channels": 1}),
    "deit": Family("DeiTModel", "DeiTConfig", _DROPOUT, **_EAGER),
    "deit-classifier": Family("DeiTForImageClassification", "DeiTConfig", {**_LABELS, "qkv_bias": False}),
    "deit-teacher": Family("DeiTForImageClassificationWithTeacher", "DeiTConfig", _LABELS),
    "dinov2": Family("Dinov2Model", "Dinov2Config", _DROP_PATH),
    "dinov2-swiglu": Family("Dinov2Model", "Dinov2Config", {"use_swiglu_ffn": True}, **_EAGER),
    "dinov2-classifier": Family("Dinov2ForImageClassification", "Dinov2Config", {**_LABELS, **_DROP_PATH}),
    "dinov2-backbone": Family("Dinov2Backbone", "Dinov2Config", {"out_indices": [2, 4, 5]}),
    "dinov2-backbone-tokens": Family(
        "Dinov2Backbone",
        "Dinov2Config",
        {"out_indices": [0, 3], "reshape_hidden_states": False, "apply_layernorm": False},
    ),
    "registers": Family("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {"use_swiglu_ffn": True}),
    "registers-classifier": Family(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", {**_LABELS, **_DROP_PATH}, **_EAGER
    ),
    "registers-backbone": Family("Dinov2WithRegistersBackbone", "Dinov2WithRegistersConfig", {"out_indices": [2, 5]}),
    "dinov3": Family("DINOv3ViTModel", "DINOv3ViTConfig", {**_DINOV3, "drop_path_rate": 0.3, "pos_embed_jitter": 1.2}),
    "dinov3-gated": Family("DINOv3ViTModel", "DINOv3ViTConfig", {**_DINOV3, "use_gated_mlp": True}, **_EAGER),
    "dinov3-not-square": Family("DINOv3ViTModel", "DINOv3ViTConfig", {**_DINOV3, "image_size": (32, 56)}, (32, 56)),
    "dinov3-backbone": Family("DINOv3ViTBackbone", "DINOv3ViTConfig", {**_DINOV3, "out_indices": [2, 5]}),
    "clip": Family("CLIPVisionModel", "CLIPVisionConfig", {"attention_dropout": 0.2}),
    "clip-projection": Family(
        "CLIPVisionModelWithProjection", "CLIPVisionConfig", {"projection_dim": 24, "hidden_act": "gelu"}, **_EAGER
    ),
    "clip-classifier": Family("CLIPForImageClassification", "CLIPConfig", _LABELS),
    "siglip": Family("SiglipVisionModel", "SiglipVisionConfig", {"attention_dropout": 0.2}),
    "siglip-no-head": Family("SiglipVisionModel", "SiglipVisionConfig", {"vision_use_head": False}, **_EAGER),
    "siglip-classifier": Family("SiglipForImageClassification", "SiglipConfig", _LABELS),
    "mae": Family("ViTMAEModel", "ViTMAEConfig", {"mask_ratio": 0.0, **_DROPOUT}),
    "idefics2": Family("Idefics2VisionTransformer", "Idefics2VisionConfig"),
    "idefics3": Family("Idefics3VisionTransformer", "Idefics3VisionConfig", {"attention_dropout": 0.2}),
    "smolvlm": Family("SmolVLMVisionTransformer", "SmolVLMVisionConfig"),
}

FEW = ("vit-classifier", "deit-teacher", "registers-classifier", "dinov3", "clip-projection", "siglip")
"""Names of a few families that cover all kinds of prefix tokens, output, rotation and layer; for slow checks."""

CLASSIFIERS = tuple(name for name, family in FAMILIES.items() if "num_labels" in family.settings)

ANY_SIZE = tuple(name for name in FAMILIES if name != "vit-not-square")
"""Names of the families that take images of other sizes than their own."""


@cache
def built(name: str) -> nn.Module:
    """The small model of a family with random weights, in eval mode. Shared by all tests: do not change it."""
    if name in ("idefics2", "idefics3", "smolvlm"):
        needs_transformers("5.24.0", "counting the FLOPs of Idefics encoders")
    model = liven(FAMILIES[name].build())
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("lambda1"):  # layer scale
                parameter.add_(0.5)
    return model.eval()


def fresh(name: str) -> nn.Module:
    """A copy of `built` that tests may change."""
    return copy.deepcopy(built(name))


def photos(name: str, count: int = 3, seed: int = 0, size: tuple[int, int] | None = None) -> Tensor:
    """Random images for the model of a family. Their contrasts differ, so that the lives of their patches differ."""
    family, generator = FAMILIES[name], torch.Generator().manual_seed(seed)
    channels = family.settings.get("num_channels", 3)
    images = torch.randn(count, channels, *(size or family.images), generator=generator)
    return images * torch.linspace(0.3, 1.5, count)[:, None, None, None]


def arguments(name: str, images: Tensor, **more: Any) -> dict[str, Any]:
    """Arguments of the model's forward: with interpolated positions for other sizes, and patches in grid order."""
    found: dict[str, Any] = {"pixel_values": images, **more}
    kind = FAMILIES[name].kind
    if images.shape[-2:] != FAMILIES[name].images and not kind.startswith(("Dinov2", "DINOv3", "Idefics", "SmolVLM")):
        found["interpolate_pos_encoding"] = True
    if kind.startswith("ViTMAE"):
        patches = (images.shape[-2] // 8) * (images.shape[-1] // 8)
        found["noise"] = torch.arange(patches, dtype=torch.float32).expand(len(images), -1)
    return found


def slim(name: str, variant: str = "fixed", model: nn.Module | None = None, **settings: Any) -> SlimModel:
    """A family's small model, slimmed from block `START`; adaptive mode is calibrated on eight images.

    Dropped patches have their last state, as in the slow reference.
    """
    config = LifeConfig(**{"budget": BUDGET, "start": START, "restore": "last", **VARIANTS[variant], **settings})
    slimmed = wrap(built(name) if model is None else model, config)
    if config.mode == "adaptive":
        slimmed.calibrate([photos(name, 8, seed=1).to(slimmed.backbone.dtype)])
    return slimmed


def tensors(outputs: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor inside the outputs of a model, by its place such as ``hidden_states.2``."""
    if isinstance(outputs, Tensor):
        return {path: outputs}
    items = outputs.items() if hasattr(outputs, "items") else enumerate(outputs) if outputs is not None else ()
    return {key: t for name, part in items for key, t in tensors(part, f"{path}.{name}".strip(".")).items()}


def main_output(outputs: Any) -> Tensor | None:
    """Logits or embedding among a model's outputs; None for a model that gives neither."""
    found = (getattr(outputs, name, None) for name in ("logits", "image_embeds", "pooler_output"))
    return next((tensor for tensor in found if tensor is not None), None)
