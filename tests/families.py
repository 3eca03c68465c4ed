"""A small model with random weights for every family that patchlife supports, built by timm.

Each model keeps the special parts of its family (prefix tokens, rotations, norms, pooling, block type) and is small
otherwise. Freshly initialised models hide bugs: with LayerScale near zero blocks have no effect, norms are the
identity, class tokens and classifiers are zero. So `liven` gives all parameters random values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import timm
import torch
from timm.layers import Attention
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn
from versions import needs_timm, older_timm

SMALL = {"depth": 5, "embed_dim": 48, "num_heads": 3, "num_classes": 10, "patch_size": 8, "img_size": 48}
START = 2  # start block in most tests, of five blocks


class GatedAttention(Attention):
    """timm's attention with its output gate. No ViT that is registered in timm uses the gate."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, gated=True, **kwargs)


@dataclass(frozen=True)
class Family:
    """A timm model and the arguments that make it small.

    Attributes:
        entry: name of the timm model.
        overrides: arguments in addition to `SMALL`.
        images: (height, width) of the test images.
        make: function that builds the model; timm's factory unless it lacks a needed argument.
        since: (version, feature): the first timm version that can build the model, if the oldest supported one cannot,
            and the feature that it needs.
    """

    entry: str
    overrides: dict[str, Any] = field(default_factory=dict)
    images: tuple[int, int] = (48, 48)
    make: Callable[..., nn.Module] = timm.create_model
    since: tuple[str, str] | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments that differ from the full-size model."""
        return {**SMALL, **self.overrides}


def _eva(_: str, **arguments: Any) -> nn.Module:
    return Eva(**arguments)


_MROPE = {
    "use_rot_pos_emb": True,
    "use_abs_pos_emb": False,
    "attn_type": "rope",
    "rope_type": "mrope",
    "rope_mrope_section": (0, 4, 4),
    "global_pool": "token",
}
_DYNAMIC = {"dynamic_img_size": True}
OTHER_SIZE = (40, 56)  # different from the size of all models here, and not square

FAMILIES = {
    "vit": Family("vit_tiny_patch16_224"),
    "deit": Family("deit_tiny_patch16_224"),
    "deit-distilled": Family("deit_tiny_distilled_patch16_224"),
    "deit3": Family("deit3_small_patch16_224"),
    "dinov2": Family("vit_small_patch14_dinov2"),
    "dinov2-registers": Family("vit_small_patch14_reg4_dinov2"),
    "dinov2-swiglu": Family("vit_giant_patch14_dinov2"),
    "clip": Family("vit_base_patch16_clip_224"),
    "clip-quickgelu": Family("vit_base_patch16_clip_quickgelu_224"),
    "siglip": Family("vit_base_patch16_siglip_224"),
    "siglip-gap": Family("vit_base_patch16_siglip_gap_224"),
    "map-registers": Family("vit_so150m_patch16_reg4_map_256"),
    "map-with-prefix": Family("test_vit3"),
    "gap": Family("vit_medium_patch16_gap_240"),
    "gap-registers": Family("vit_little_patch16_reg4_gap_256"),
    "class-and-gap": Family("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "avgmax": Family("vit_tiny_patch16_224", {"global_pool": "avgmax"}),
    "refined-pool": Family("vit_tiny_patch16_224", {"global_pool": "prr"}, since=("1.0.26", "pooling by prr")),
    "unpooled": Family("vit_tiny_patch16_224", {"global_pool": ""}),
    "no-classifier": Family("vit_tiny_patch16_224", {"num_classes": 0}),
    "qk-norm": Family("vit_tiny_patch16_224", {"qk_norm": True, "in_chans": 1}),
    "gated": Family("vit_tiny_patch16_224", {"attn_layer": GatedAttention}, since=("1.0.28", "gated attention")),
    "aimv2": Family("aimv2_large_patch14_224"),
    "beit3": Family("beit3_base_patch16_224"),
    "parallel-scaling": Family(
        "vit_base_patch16_xp_224", since=("1.0.25", "the MLP's bias in its place in parallel-scaling blocks")
    ),
    "parallel-scaling-gap": Family("vit_pwee_patch16_reg1_gap_256"),
    "parallel-scaling-fused": Family(
        "vit_tiny_patch16_224",
        {"block_fn": partial(ParallelScalingBlock, fuse_out_proj=True)},
        since=("1.0.23", "a fused output projection"),
    ),
    "parallel-things": Family("vit_small_patch16_18x2_224"),
    "residual-post-norm": Family("vit_base_patch16_rpn_224"),
    "eva": Family("eva_giant_patch14_224"),
    "eva02": Family("eva02_tiny_patch14_224"),
    "eva02-sub-norm": Family("eva02_base_patch14_224"),
    "eva02-clip": Family("eva02_base_patch16_clip_224"),
    "eva02-post-norm": Family("eva02_enormous_patch14_clip_224", {"mlp_ratio": 4, "use_rot_pos_emb": True}),
    "rope-gap": Family("vit_medium_patch16_rope_reg1_gap_256"),
    "rope": Family("vit_small_patch16_rope_224"),
    "rope-mixed": Family("vit_small_patch16_rope_mixed_224"),
    "rope-mixed-positions": Family("vit_base_patch16_rope_mixed_ape_224"),
    "rope-multimodal": Family("eva", _MROPE, make=_eva, since=("1.0.31", "RoPE in sections")),
    "perception-encoder": Family("vit_pe_core_tiny_patch16_384", {"attn_pool_num_heads": 3}),
    "perception-spatial": Family("vit_pe_spatial_tiny_patch16_512"),
    "dinov3": Family("vit_small_patch16_dinov3", {"global_pool": "token"}),
    "dinov3-average": Family("vit_small_patch16_dinov3_qkvb"),
    "grouped-queries": Family(
        "vit_base_patch16_sapiens2", {"num_kv_heads": (3, 1, 1, 1, 3)}, since=("1.0.30", "vit_base_patch16_sapiens2")
    ),
    "not-square": Family("vit_tiny_patch16_224", {"img_size": (32, 56)}, (32, 56)),
    "not-square-patches": Family("deit3_small_patch16_224", {"patch_size": (8, 6)}),
    "not-square-rope": Family("eva02_tiny_patch14_224", {"img_size": (56, 32)}, (56, 32)),
    "dynamic": Family("vit_tiny_patch16_224", _DYNAMIC, OTHER_SIZE),
    "dynamic-padded": Family("vit_tiny_patch16_224", {**_DYNAMIC, "dynamic_img_pad": True}, (43, 50)),
    "dynamic-distilled": Family("deit_tiny_distilled_patch16_224", _DYNAMIC, OTHER_SIZE),
    "dynamic-registers": Family("vit_small_patch14_reg4_dinov2", _DYNAMIC, OTHER_SIZE),
    "dynamic-siglip": Family("vit_base_patch16_siglip_224", _DYNAMIC, OTHER_SIZE),
    "dynamic-eva02": Family("eva02_tiny_patch14_224", _DYNAMIC, OTHER_SIZE),
    "dynamic-rope-mixed": Family("vit_small_patch16_rope_mixed_224", _DYNAMIC, OTHER_SIZE),
    "dynamic-dinov3": Family("vit_small_patch16_dinov3", {}, OTHER_SIZE),
}

PRESENT = tuple(name for name, family in FAMILIES.items() if not (family.since and older_timm(family.since[0])))
"""Names of the families that the installed timm can build. `built` skips the tests of the others."""

FEW = ("vit", "deit-distilled", "siglip", "gap-registers", "parallel-things", "dinov3", "rope-mixed")
"""Names of a few families that cover all kinds of prefix, pooling, rotation and residual; for slow checks."""


@cache
def built(name: str) -> nn.Module:
    """The small model of a family, with `liven`'s weights, in eval mode. Shared by all tests: do not change it.

    Skips the calling test if the installed timm cannot build the model.
    """
    family = FAMILIES[name]
    if family.since:
        needs_timm(*family.since)
    return liven(family.make(family.entry, **family.arguments)).eval()


def fresh(name: str) -> nn.Module:
    """A copy of `built` that tests may change."""
    return copy.deepcopy(built(name))


def cast(name: str, dtype: torch.dtype) -> nn.Module:
    """A copy of `built` in another precision."""
    if name in ("rope-mixed", "rope-mixed-positions"):
        needs_timm("1.0.31", "mixed RoPE in other precisions than float32")
    return fresh(name).to(dtype)


def photos(name: str, count: int = 3, seed: int = 0) -> Tensor:
    """Random images for the model of a family. Their contrasts differ, so that the lives of their patches differ."""
    generator = torch.Generator().manual_seed(seed)
    channels = FAMILIES[name].arguments.get("in_chans", 3)
    images = torch.randn(count, channels, *FAMILIES[name].images, generator=generator)
    return images * torch.linspace(0.3, 1.5, count)[:, None, None, None]


@torch.no_grad()
def liven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give all parameters random values that have an effect on the output. Returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        noise = torch.randn(parameter.shape, generator=generator)
        if last.startswith("gamma"):  # LayerScale
            parameter.copy_(0.5 + 0.1 * noise)
        elif last == "weight" and parameter.ndim == 1:  # norms
            parameter.copy_(1 + 0.2 * noise)
        elif last == "weight":
            parameter.copy_(1.2 * noise / parameter[0].numel() ** 0.5)
        elif not name.startswith("rope."):  # biases, positions, prefix tokens, a pooling query
            parameter.copy_(0.3 * noise)
    return model
