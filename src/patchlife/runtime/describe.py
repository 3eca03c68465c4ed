"""The description of a slimmed model that travels with its exported file."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from typing import Any

import torch

from ..backbones import pretrained_cfg
from ..data import Preprocess
from ..data.labels import Labels
from ..slimming import SlimModel, flops
from .metadata import Format, Metadata

__all__ = ["describe"]

_MAKERS = {
    "onnx": ("torch", "timm", "onnx", "onnxscript", "onnxruntime"),
    "openvino": ("torch", "timm", "onnx", "onnxscript", "openvino"),
    "torch": ("torch", "timm"),
}


def describe(
    model: SlimModel,
    kind: Format,
    labels: Labels | None = None,
    preprocess: Preprocess | None = None,
    lives: bool = True,
    precision: str = "fp32",
    integers: str = "",
) -> Metadata:
    """What a file of ``model`` says about itself; labels and preprocessing are the backbone's own if not given."""
    backbone = model.backbone
    vit: Any = backbone.vit
    schedule, spent = model.schedule(), flops(model)
    if preprocess is None and backbone.channels == 3:
        preprocess = replace(Preprocess.from_timm_cfg(pretrained_cfg(vit)), size=backbone.image_size)
    labels = labels or Labels(tuple(pretrained_cfg(vit).get("label_names") or ()))
    return Metadata(
        kind=kind,
        precision=precision,
        model=pretrained_cfg(vit).get("architecture") or type(vit).__name__,
        image_size=backbone.image_size,
        channels=backbone.channels,
        preprocess=preprocess.to_dict() if preprocess else None,
        labels=labels.names,
        label_ids=labels.ids,
        budget=spent.budget if model.config.kept else model.config.budget,
        config=model.config.to_dict(),
        start=schedule.start,
        kept=tuple(schedule.kept),
        grid=backbone.grid,
        flops=spent.slimmed,
        dense_flops=spent.dense,
        outputs=("logits", "life") if lives else ("logits",),
        integers=integers,
        versions={name: _version(name) for name in _MAKERS[kind]},
    )


def _version(package: str) -> str:
    if package == "torch":
        return str(torch.__version__)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
