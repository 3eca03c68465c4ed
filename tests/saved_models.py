"""Small models of transformers and open_clip with lively weights, in folders as the libraries save them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from families import liven
from safetensors.torch import save_file
from torch import Tensor, nn

SHAPE = {
    "hidden_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 48,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 99,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NAMES = ("tench", "dog", "house", "tree", "car", "boat", "lamp", "hat", "cup", "shoe")
ARCH = "ViT-small-test"


def lively(model: Any) -> Any:
    """The model in eval mode, with random values in all parameters, and strong LayerScale."""
    liven(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lambda1" in name:
                parameter.copy_(0.5 + 0.1 * torch.randn_like(parameter))
    return model.eval()


def classifier(**settings: Any) -> nn.Module:
    """A ViT of transformers with ten named classes."""
    import transformers

    names = dict(enumerate(NAMES))
    config = transformers.ViTConfig(
        **{**SHAPE, "id2label": names, "label2id": {n: i for i, n in names.items()}} | settings
    )
    return lively(transformers.ViTForImageClassification(config))


def processor(name: str = "ViT", **settings: Any) -> Any:
    """An image processor of transformers for images of 48 pixels."""
    import transformers

    size = {"shortest_edge": 48} if name in ("CLIP", "Bit") else {"height": 48, "width": 48}
    crop = {"crop_size": {"height": 48, "width": 48}} if name in ("CLIP", "Bit", "DeiT") else {}
    return getattr(transformers, f"{name}ImageProcessor")(**{"size": size, **crop, **settings})


def saved(folder: Path, model: Any, of_photos: Any = None, **options: Any) -> Path:
    """Save a model, and an image processor unless ``of_photos`` is False, into ``folder``."""
    model.save_pretrained(folder, **options)
    if of_photos is not False:
        (of_photos or processor()).save_pretrained(folder)
    return folder


def edited(folder: Path, **settings: Any) -> Path:
    """Change entries of ``config.json``; None removes one."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    return folder


def open_clip_config(trunk: str | None = None, **vision: Any) -> dict[str, Any]:
    """The settings of a small model of open_clip; ``trunk`` is the timm model of its image tower."""
    tower: dict[str, Any] = {"image_size": 48, "patch_size": 8, "width": 48, "layers": 5, "head_width": 16}
    if trunk:
        tower = {"image_size": 160, "timm_model_name": trunk, "timm_pool": "token", "timm_proj": None}
    return {
        "embed_dim": 24,
        "vision_cfg": tower | vision,
        "text_cfg": {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1},
    }


def register_open_clip(folder: Path, **settings: Any) -> str:
    """Make the small model known to open_clip under the name `ARCH`, which is returned."""
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{ARCH}.json"
    path.write_text(json.dumps(open_clip_config(**settings)))
    open_clip.add_model_config(path)
    return ARCH


def open_clip_weights(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Save the weights of a model of open_clip to ``path``."""
    weights = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(weights, path)
    return weights
