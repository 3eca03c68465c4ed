"""Models of transformers with the weights of timm's models. It does not use patchlife.

The names are written out here a second time, so that a wrong name in `patchlife.backbones` is found. `converted` itself
is checked by outputs: those of both models are equal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import families
import timm
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "image_size": 48,
    "patch_size": 8,
}
_FROM_TIMM = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^(cls_token)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.qkv\.", ".attention.{q k v}_proj."),
)
_VIT = (
    *_FROM_TIMM,
    (r"^dist_token$", "embeddings.distillation_token"),
    (r"^blocks\.", "layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"^norm\.", "layernorm."),
)
_DINOV2 = (
    *_FROM_TIMM,
    (r"^blocks\.", "encoder.layer."),
    (r"^norm\.", "layernorm."),
)
_SWIGLU = ((r"\.mlp\.fc1\.", ".mlp.{gate up}_proj."), (r"\.mlp\.fc2\.", ".mlp.down_proj."))
_SIGLIP = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^pos_embed$", "embeddings.position_embedding.weight"),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.qkv\.", ".self_attn.{q k v}_proj."),
    (r"\.attn\.proj\.", ".self_attn.out_proj."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"^norm\.", "post_layernorm."),
    (r"^attn_pool\.latent$", "head.probe"),
    (r"^attn_pool\.proj\.", "head.attention.out_proj."),
    (r"^attn_pool\.norm\.", "head.layernorm."),
    (r"^attn_pool\.mlp\.", "head.mlp."),
)
_CLIP = (
    *_SIGLIP,
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^norm_pre\.", "pre_layrnorm."),
)
_DINOV3 = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^reg_token$", "embeddings.register_tokens"),
    (r"^blocks\.", "model.layer."),
    (r"\.gamma_(\d)$", r".layer_scale\1.lambda1"),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.qkv\.", ".attention.{q k v}_proj."),
    (r"\.attn\.([qv])_bias$", r".attention.\1_proj.bias"),
    (r"\.mlp\.fc1_g\.", ".mlp.gate_proj."),
    (r"\.mlp\.fc1_x\.", ".mlp.up_proj."),
    (r"\.mlp\.fc1\.", ".mlp.up_proj."),
    (r"\.mlp\.fc2\.", ".mlp.down_proj."),
)


def _renamed(weights: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """Weights of timm under the names of transformers; "{q k v}" in a name stands for three weights."""
    result = {}
    for own, weight in weights.items():
        name = own
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        before, _, rest = name.partition("{")
        parts, _, after = rest.partition("}")
        names = [before + part + after for part in parts.split(" ")]
        result |= zip(names, weight.chunk(len(names)), strict=True)
    return result


def _to_siglip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One table of positions without a batch dimension, and one input projection of the pooling attention."""
    result = _renamed(weights, _SIGLIP)
    result["embeddings.position_embedding.weight"] = result["embeddings.position_embedding.weight"][0]
    for kind in ("weight", "bias"):
        q, kv = result.pop(f"attn_pool.q.{kind}", None), result.pop(f"attn_pool.kv.{kind}", None)
        if q is not None and kv is not None:
            result[f"head.attention.in_proj_{kind}"] = torch.cat((q, kv))
    return result


def _loaded(model: nn.Module, weights: Mapping[str, Tensor]) -> Any:
    """``model`` with ``weights``. Only the mask token of pre-training may be missing."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert all(name.endswith("mask_token") for name in missing), missing
    return model.eval()


def _inside(core: str, weights: Mapping[str, Tensor], heads: Mapping[str, str]) -> dict[str, Tensor]:
    """Names of a model with a core inside and classifiers beside it."""
    result = {}
    for name, weight in weights.items():
        head, _, kind = name.partition(".")
        result[f"{heads[head]}.{kind}" if head in heads else f"{core}.{name}"] = weight
    return result


def to_vit(vit: nn.Module, **settings: Any) -> Any:
    """``ViTForImageClassification`` with the weights of timm's ``vit``, or ``ViTModel`` if it has no classifier."""
    classes = vit.num_classes
    config = transformers.ViTConfig(**settings, layer_norm_eps=1e-6, num_labels=classes or 2)
    weights = _renamed(vit.state_dict(), _VIT)
    if not classes:
        return _loaded(transformers.ViTModel(config, add_pooling_layer=False), weights)
    return _loaded(transformers.ViTForImageClassification(config), _inside("vit", weights, {"head": "classifier"}))


def to_deit_distilled(vit: nn.Module, **settings: Any) -> Any:
    """``DeiTForImageClassificationWithTeacher``."""
    config = transformers.DeiTConfig(**settings, layer_norm_eps=1e-6, num_labels=vit.num_classes)
    heads = {"head": "cls_classifier", "head_dist": "distillation_classifier"}
    weights = _inside("deit", _renamed(vit.state_dict(), _VIT), heads)
    return _loaded(transformers.DeiTForImageClassificationWithTeacher(config), weights)


def to_dinov2(vit: nn.Module, **settings: Any) -> Any:
    """``Dinov2Model``."""
    swiglu = type(vit.blocks[0].mlp).__name__ == "GluMlp"
    config = transformers.Dinov2Config(**settings, use_swiglu_ffn=swiglu, layer_norm_eps=1e-6)
    return _loaded(transformers.Dinov2Model(config), _renamed(vit.state_dict(), _DINOV2 + swiglu * _SWIGLU))


def to_siglip(vit: nn.Module, **settings: Any) -> Any:
    """``SiglipVisionModel``."""
    config = transformers.SiglipVisionConfig(**settings, layer_norm_eps=1e-6, hidden_act="gelu")
    return _loaded(transformers.SiglipVisionModel(config), _to_siglip(vit.state_dict()))


def to_clip(vit: nn.Module, **settings: Any) -> Any:
    """``CLIPVisionModel``, whose class token and table of positions have no batch dimension."""
    weights = _renamed(vit.state_dict(), _CLIP)
    for name in ("embeddings.class_embedding", "embeddings.position_embedding.weight"):
        weights[name] = weights[name].squeeze(0)
    weights["embeddings.class_embedding"] = weights["embeddings.class_embedding"][0]
    config = transformers.CLIPVisionConfig(**settings, layer_norm_eps=1e-5, hidden_act="gelu")
    return _loaded(transformers.CLIPVisionModel(config), weights)


def to_siglip_classifier(vit: nn.Module, **settings: Any) -> Any:
    """``SiglipForImageClassification``, which classifies the mean of the patches."""
    vision = {**settings, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "vision_use_head": False}
    text = {"bos_token_id": 1, "eos_token_id": 2}  # transformers warns about its own defaults
    config = transformers.SiglipConfig(vision_config=vision, text_config=text, num_labels=vit.num_classes)
    model = transformers.SiglipForImageClassification(config)
    return _loaded(model, _inside("vision_model", _to_siglip(vit.state_dict()), {"head": "classifier"}))


def to_dinov3(vit: nn.Module, **settings: Any) -> Any:
    """``DINOv3ViTModel``."""
    gated = hasattr(vit.blocks[0].mlp, "fc1_g")
    config = transformers.DINOv3ViTConfig(
        **settings,
        num_register_tokens=4,
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
        query_bias=vit.blocks[0].attn.q_bias is not None,
        value_bias=vit.blocks[0].attn.q_bias is not None,
        layer_norm_eps=1e-5,
    )
    return _loaded(transformers.DINOv3ViTModel(config), _renamed(vit.state_dict(), _DINOV3))


_NO_CLASSES = {"num_classes": 0}
_TOKEN = {"num_classes": 0, "global_pool": "token"}
PAIRS = {
    "vit": ("vit_tiny_patch16_224", {}, to_vit),
    "vit-embedding": ("vit_tiny_patch16_224", _NO_CLASSES, to_vit),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", {}, to_deit_distilled),
    "dinov2": ("vit_small_patch14_dinov2", _NO_CLASSES, to_dinov2),
    "dinov2-swiglu": ("vit_giant_patch14_dinov2", {**_NO_CLASSES, "mlp_ratio": 256 / 48}, to_dinov2),
    "clip": ("vit_base_patch16_clip_224", _NO_CLASSES, to_clip),
    "siglip": ("vit_base_patch16_siglip_224", _NO_CLASSES, to_siglip),
    "siglip-classifier": ("vit_base_patch16_siglip_gap_224", {}, to_siglip_classifier),
    "dinov3": ("vit_small_patch16_dinov3_qkvb", _TOKEN, to_dinov3),
    "dinov3-without-bias": ("vit_small_patch16_dinov3", _TOKEN, to_dinov3),
    "dinov3-gated": ("vit_small_plus_patch16_dinov3", {**_TOKEN, "mlp_ratio": 4, "qkv_bias": True}, to_dinov3),
}
"""(timm name, arguments, conversion) of models that both libraries have."""


@cache
def pair(name: str) -> tuple[nn.Module, Any]:
    """(a small lively model of timm, the model of transformers with the same weights). Shared: do not change them."""
    entry, arguments, convert = PAIRS[name]
    vit = families.liven(timm.create_model(entry, **{**families.SMALL, **arguments})).eval()
    return vit, convert(vit, **SMALL)


def output(model: Any, images: Tensor) -> Tensor:
    """Logits, or the pooled embedding, of a model of timm or transformers."""
    found = model(images)
    if isinstance(found, Tensor):
        return found
    if hasattr(found, "logits"):
        return found.logits
    return found.last_hidden_state[:, 0] if found.pooler_output is None else found.pooler_output


def real_vit(shared: Path, classes: int = 1000) -> tuple[nn.Module, Any]:
    """The shared ViT-Tiny in both libraries; with 0 classes without its classifier."""
    weights = load_file(shared / "weights/vit_tiny_patch16_224.safetensors")
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=classes).eval()
    vit.load_state_dict({k: v for k, v in weights.items() if classes or not k.startswith("head.")})
    settings = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    return vit, to_vit(vit, **settings, image_size=224, patch_size=16)
