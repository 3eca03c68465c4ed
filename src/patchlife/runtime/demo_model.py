"""The demo's model: a small Vision Transformer and photos that are part of this package."""

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
"""What the command line calls it."""


def demo_folder() -> Path:
    """The embedded model and its photos."""
    return Path(str(files("patchlife") / "assets" / "demo"))


def demo_backbone() -> nn.Module:
    """The embedded Vision Transformer, in eval mode; raises CheckpointError if it is not as it was shipped."""
    folder = demo_folder()
    try:
        metadata = json.loads((folder / "model.json").read_text("utf-8"))
        weights = folder / metadata["weights"]["file"]
        intact = sha256_of(weights) == metadata["weights"]["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the demo's model in {folder} is incomplete ({error}); reinstall patchlife") from None
    if not intact:
        raise CheckpointError(f"{weights} is damaged: its sha256 is not the one in model.json; reinstall patchlife")
    vit: Any = timm.models.VisionTransformer(**metadata["architecture"])
    vit.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    looks = {**metadata["input"], "input_size": metadata["input"]["size"]}
    vit.pretrained_cfg = {"architecture": DEMO, "label_names": metadata["classes"], **looks}
    return vit.eval()
