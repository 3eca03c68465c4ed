"""The classes of transformers' models that patchlife supports, and what differs between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["CORES", "HEADS", "REFUSED", "SUPPORTED", "Core", "Head", "class_name", "prefix_tokens"]


@dataclass(frozen=True)
class Core:
    """A class of core models.

    Attributes:
        layers, norm: names of the list of layers and of the norm after them.
        pool: from the core and its normalised tokens (batch, tokens, dim) to an embedding (batch, dim).
        kind: timm's class of the same models.
        reads_class: whether ``pool`` reads prefix tokens only.
        any_size: whether embeddings take any image size without ``interpolate_pos_encoding``.
        pools: whether the output is one vector per image; otherwise it is the tokens, in grid order.
        masked: whether the model takes a ``patch_attention_mask``, which tells padding from patches.
    """

    layers: str
    norm: str
    pool: Callable[[Any, Tensor], Tensor]
    kind: str = "VisionTransformer"
    reads_class: bool = True
    any_size: bool = False
    pools: bool = True
    masked: bool = False


@dataclass(frozen=True)
class Head:
    """A class of models with a core inside.

    Attributes:
        core: name of the core.
        output: from the model and the core's normalised tokens to logits or an embedding.
        reads_class: whether ``output`` reads prefix tokens only.
        pool: timm's name of the pooling.
        normed: whether the core's final norm is applied before ``output``.
        classifiers: names of the classifiers.
        gives_tokens: whether the model's outputs contain the core's tokens.
        pools_unread: whether the core's own pooling runs too, although ``output`` does not read its result.
    """

    core: str
    output: Callable[[Any, Any, Tensor], Tensor]
    reads_class: bool = True
    pool: str = "avg"
    normed: bool = True
    classifiers: tuple[str, ...] = ("classifier",)
    gives_tokens: bool = False
    pools_unread: bool = False


# ---- core models


def _first(_: Any, x: Tensor) -> Tensor:
    return x[:, 0]


def _vit_pooler(core: Any, x: Tensor) -> Tensor:
    return x[:, 0] if getattr(core, "pooler", None) is None else core.pooler(x)


def _all_tokens(_: Any, x: Tensor) -> Tensor:
    return x


def _siglip_head(core: Any, x: Tensor) -> Tensor:
    return core.head(x) if core.use_head else x.mean(dim=1)


_VIT = Core("layers", "layernorm", _vit_pooler)
_DINOV2 = Core("encoder.layer", "layernorm", _first, any_size=True)
_DINOV3 = Core("model.layer", "norm", _first, kind="Eva", any_size=True)
_IDEFICS = Core(
    "encoder.layers", "post_layernorm", _all_tokens, reads_class=False, any_size=True, pools=False, masked=True
)
CORES = {
    "ViTModel": _VIT,
    "DeiTModel": _VIT,
    "ViTMAEModel": _VIT,
    "Dinov2Model": _DINOV2,
    "Dinov2Backbone": _DINOV2,
    "Dinov2WithRegistersModel": _DINOV2,
    "Dinov2WithRegistersBackbone": _DINOV2,
    "DINOv3ViTModel": _DINOV3,
    "DINOv3ViTBackbone": _DINOV3,
    "CLIPVisionModel": Core("encoder.layers", "post_layernorm", _first),
    "SiglipVisionModel": Core("encoder.layers", "post_layernorm", _siglip_head, reads_class=False),
    "Idefics2VisionTransformer": _IDEFICS,
    "Idefics3VisionTransformer": _IDEFICS,
    "SmolVLMVisionTransformer": _IDEFICS,
}
"""By the name of the class."""


# ---- models with a core inside


def _class_logits(model: Any, _: Any, x: Tensor) -> Tensor:
    return model.classifier(x[:, 0])


def _teacher_logits(model: Any, _: Any, x: Tensor) -> Tensor:
    return (model.cls_classifier(x[:, 0]) + model.distillation_classifier(x[:, 1])) / 2


def _dinov2_logits(model: Any, core: Any, x: Tensor) -> Tensor:
    return model.classifier(torch.cat((x[:, 0], x[:, prefix_tokens(core) :].mean(dim=1)), dim=1))


def _mean_logits(model: Any, core: Any, x: Tensor) -> Tensor:
    return model.classifier(x[:, prefix_tokens(core) :].mean(dim=1))


def _projection(model: Any, _: Any, x: Tensor) -> Tensor:
    return model.visual_projection(x[:, 0])


HEADS = {
    "ViTForImageClassification": Head("vit", _class_logits),
    "DeiTForImageClassification": Head("deit", _class_logits),
    "DeiTForImageClassificationWithTeacher": Head(
        "deit", _teacher_logits, classifiers=("cls_classifier", "distillation_classifier")
    ),
    "Dinov2ForImageClassification": Head("dinov2", _dinov2_logits, reads_class=False, pool="class and avg"),
    "Dinov2WithRegistersForImageClassification": Head(
        "dinov2_with_registers", _dinov2_logits, reads_class=False, pool="class and avg"
    ),
    "CLIPVisionModelWithProjection": Head("vision_model", _projection, classifiers=(), gives_tokens=True),
    "CLIPForImageClassification": Head("vision_model", _mean_logits, reads_class=False, normed=False),
    "SiglipForImageClassification": Head("vision_model", _mean_logits, reads_class=False, pools_unread=True),
}
"""By the name of the class."""

SUPPORTED = ", ".join((*CORES, *HEADS))


# ---- models that are refused

_RELATIVE = "its relative position bias belongs to the full grid of patches"
_WINDOWS = "its blocks attend in windows of a full grid"
_CONVOLUTIONS = "it is a convolutional network without tokens"
REFUSED = {
    "Beit": _RELATIVE,
    "Data2VecVision": _RELATIVE,
    "Swin": f"{_WINDOWS} and merge patches between stages",
    "Hiera": "its blocks attend in windows and pool between stages",
    "Pvt": "its blocks shrink keys by convolutions over a full grid",
    "ConvNext": _CONVOLUTIONS,
    "DINOv3ConvNext": _CONVOLUTIONS,
    "ResNet": _CONVOLUTIONS,
    "Siglip2": "NaFlex batches are padded, with a mask and a size per image; use a SigLIP 2 checkpoint of a fixed size "
    "(model type siglip)",
    "Qwen": "its blocks attend in windows over patches of several images",
    "Glm": "its blocks attend over patches of several images",
    "Pixtral": "its batches are packed, with a mask per image",
    "VitDet": _WINDOWS,
    "Sam": f"{_WINDOWS}, with relative positions",
    "ViTMAEForPreTraining": "its decoder needs every patch; wrap the encoder: model.vit = patchlife.wrap(model.vit)",
}
"""Reasons, by the beginning of the name of the class."""


def class_name(model: Any, known: Mapping[str, Any]) -> str:
    """Name of the class of transformers that ``model`` is an instance of, if it is a known one; else empty."""
    return next((kind.__name__ for kind in type(model).__mro__ if kind.__name__ in known), "")


def prefix_tokens(core: Any) -> int:
    """Number of prefix tokens of a core model."""
    tokens = ("cls_token", "class_embedding", "distillation_token")
    single = sum(getattr(core.embeddings, name, None) is not None for name in tokens)
    registers = getattr(core.embeddings, "register_tokens", None)
    return single + (0 if registers is None else registers.shape[1])
