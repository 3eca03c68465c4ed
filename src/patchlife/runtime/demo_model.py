"""The demo model: a small Vision Transformer and photos that are part of this Python package."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import load_file
from torch import nn

from ..errors import CheckpointError
from ..io.files import sha256_of

__all__ = ["DEMO", "demo_backbone", "demo_folder"]

DEMO = "demo"
"""The MODEL argument that selects it."""


def demo_folder() -> Path:
    """The folder of the demo model and its photos."""
    return Path(str(files("patchlife") / "assets" / "demo"))


def demo_backbone(any_size: bool = False) -> nn.Module:
    """The demo Vision Transformer in eval mode; with ``any_size`` it takes images of any size.

    Raises CheckpointError if its files are missing or damaged.
    """
    folder = demo_folder()
    try:
        model_card = json.loads((folder / "model.json").read_text("utf-8"))
        weights = folder / model_card["weights"]["file"]
        intact = sha256_of(weights) == model_card["weights"]["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the demo's model in {folder} is incomplete ({error}); reinstall patchlife") from None
    if not intact:
        raise CheckpointError(f"{weights} is damaged: its sha256 is not the one in model.json; reinstall patchlife")
    vit: Any = timm.models.VisionTransformer(**model_card["architecture"], dynamic_img_size=any_size)
    vit.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    preprocessing = {**model_card["input"], "input_size": model_card["input"]["size"]}
    vit.pretrained_cfg = {"architecture": DEMO, "label_names": model_card["classes"], **preprocessing}
    return vit.eval()
