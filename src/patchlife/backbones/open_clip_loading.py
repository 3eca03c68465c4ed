"""Building the image tower of a model of open_clip, with its weights and preprocessing.

Only the tower is built, without the text model. Weights come from safetensors files.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, UnsupportedModelError, shortened
from ..extras import need
from .adapt import adapt
from .checkpoint import load_weights, read_weights

__all__ = ["build_open_clip", "check_open_clip_name", "split_file"]

_CONFIG = "open_clip_config.json"
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
_HUB, _FOLDER = "hf-hub:", "local-dir:"
_TIMM_CROP_MODES = {"shortest": "center", "squash": "squash"}


def split_file(name: str) -> tuple[str, str | None]:
    """(name of the architecture, path of its weights) of ARCH/FILE.safetensors; other names have no path."""
    architecture, _, weights = name.partition("/")
    if name.startswith((_HUB, _FOLDER)) or not weights.endswith(".safetensors"):
        return name, None
    return architecture, weights


def check_open_clip_name(name: str) -> str:
    """The name, with an absolute path if it holds one.

    Raises UnsupportedModelError for architectures and tags that open_clip does not have, CheckpointError for folders
    without a model.
    """
    open_clip = need("open_clip", f"open_clip:{name}")
    if name.startswith(_HUB):
        return name
    if name.startswith(_FOLDER):
        folder = Path(name.removeprefix(_FOLDER)).resolve()
        _hub_settings(folder, f"open_clip:{name}")
        return f"{_FOLDER}{folder}"
    architecture, slash, weights = name.partition("/")
    if open_clip.get_model_config(architecture) is None:
        near = difflib.get_close_matches(architecture, open_clip.list_models(), 5)
        hint = f"; did you mean one of {', '.join(near)}?" if near else ""
        raise UnsupportedModelError(f"open_clip has no model named {architecture!r}{hint}")
    if weights.endswith(".safetensors"):
        return f"{architecture}/{Path(weights).resolve()}"
    if slash and not open_clip.get_pretrained_cfg(architecture, weights):
        if "/" in weights or "." in weights:
            raise CheckpointError(
                f"open_clip:{name}: expected a .safetensors file after {architecture}/, got {weights}"
            )
        raise UnsupportedModelError(f"open_clip has no weights {weights!r} for {architecture}; {_tags(architecture)}")
    return name


def build_open_clip(name: str, checkpoint: str | Path | None, pretrained: bool, image_size: int | None) -> nn.Module:
    """The image tower of a model, in float32.

    Args:
        name: ARCH, ARCH/TAG, hf-hub:ORG/NAME or local-dir:FOLDER.
        checkpoint: safetensors file of the whole model, or of its image tower, for ARCH.
        pretrained: must be False for ARCH, whose weights need a tag.
        image_size: height and width in pixels; position embeddings are interpolated.

    Raises:
        UnsupportedModelError: the tower is not a Vision Transformer whose patches can be dropped.
        CheckpointError: the weights are missing, damaged, or of another model.
        ConfigError: ``pretrained`` without a tag.
        MissingExtraError: open_clip is not installed.
    """
    open_clip = need("open_clip", f"open_clip:{name}")
    if pretrained and "/" not in name:
        raise ConfigError(f"open_clip has several weights for {name}; give open_clip:{name}/TAG: {_tags(name)}")
    settings, preprocessing, own_file = _described(open_clip, name)
    vision = {**settings["vision_cfg"], "timm_model_pretrained": False}
    try:
        tower = open_clip.model._build_vision_tower(
            settings["embed_dim"], vision, preprocessing.pop("quick_gelu", settings.get("quick_gelu", False))
        )
    except (TypeError, RuntimeError, AssertionError) as error:
        raise UnsupportedModelError(f"open_clip:{name}: the image tower cannot be built: {error}") from None
    file = checkpoint or own_file
    if file is not None:
        load_weights(tower, _tower_weights(read_weights(file), tower), file)
    tower = _vision_transformer(tower, name)
    if image_size is not None:
        _resize(open_clip, tower, image_size)
    _store_preprocessing(open_clip, tower, preprocessing, name)
    return tower


# ---- where the model is described


def _described(open_clip: Any, name: str) -> tuple[dict[str, Any], dict[str, Any], Path | None]:
    """(settings of the model, its preprocessing, file of its weights if ``name`` says where they are)."""
    if name.startswith((_HUB, _FOLDER)):
        label = f"open_clip:{name}"
        folder = _downloaded(name.removeprefix(_HUB)) if name.startswith(_HUB) else Path(name.removeprefix(_FOLDER))
        settings = _hub_settings(folder, label)
        return settings["model_cfg"], dict(settings.get("preprocess_cfg") or {}), _weights_in(folder, label)
    architecture, _, tag = name.partition("/")
    settings = open_clip.get_model_config(architecture)
    if not tag:
        return settings, {}, None
    tagged = dict(open_clip.get_pretrained_cfg(architecture, tag))
    try:
        file = open_clip.download_pretrained(tagged)
    except Exception as error:  # the hub client and urllib raise many kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"open_clip:{name} could not be loaded ({reason}); check the network. Without network: give "
            f"open_clip:{architecture}/FILE.safetensors"
        ) from None
    return settings, tagged, Path(file)


def _downloaded(repository: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=[_CONFIG, *_WEIGHTS]))
    except Exception as error:  # the hub client raises many kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"open_clip:{_HUB}{repository} could not be loaded ({reason}); check the name and the network. Without "
            f"network: copy {_CONFIG} and {_WEIGHTS[0]} into a folder and give open_clip:{_FOLDER}FOLDER"
        ) from None


def _hub_settings(folder: Path, label: str) -> dict[str, Any]:
    """The content of ``open_clip_config.json``."""
    try:
        settings = json.loads((folder / _CONFIG).read_text("utf-8"))
        if {"embed_dim", "vision_cfg"} <= settings["model_cfg"].keys():
            return settings
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise CheckpointError(f"{label}: expected a model of open_clip with {_CONFIG}, got none or other content")


def _weights_in(folder: Path, label: str) -> Path:
    for file in _WEIGHTS:
        if (folder / file).is_file():
            return folder / file
    raise CheckpointError(
        f"{label} has no {_WEIGHTS[0]}; pickles (.bin, .pt) are not opened, because that can run code. If you trust "
        "the file, convert it once: safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
        f"'{_WEIGHTS[0]}')"
    )


def _tags(architecture: str) -> str:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    return f"its tags are {shortened(tags, 8)}" if tags else "it has no tags, so give a file: --checkpoint FILE"


# ---- the tower


def _tower_weights(weights: Mapping[str, Tensor], tower: nn.Module) -> dict[str, Tensor]:
    """The weights of the image tower, from those of the whole model or of the tower alone."""
    visual = {name.removeprefix("visual."): w for name, w in weights.items() if name.startswith("visual.")}
    return visual or dict(weights)


def _vision_transformer(tower: Any, name: str) -> Any:
    """The Vision Transformer in a tower. Raises UnsupportedModelError for other towers."""
    if type(tower).__name__ == "TimmModel":
        if len(tower.head):
            raise UnsupportedModelError(
                f"open_clip:{name} projects the output of its timm model by a layer of its own; slim it in Python: "
                "visual.trunk = patchlife.wrap(visual.trunk)"
            )
        tower = tower.trunk
        if getattr(tower, "num_classes", 0):
            tower.num_classes = 0  # its head is the projection: the output is an embedding, not logits
    adapt(tower)
    return tower


def _resize(open_clip: Any, tower: Any, size: int) -> None:
    """Set the image size; the position embeddings are interpolated as open_clip does when it loads weights."""
    rows, cols = adapt(tower).patch_size
    if size % rows or size % cols:
        raise ConfigError(f"image_size must be a multiple of the patches' {rows} x {cols} pixels, got {size}")
    if hasattr(tower, "set_input_size"):
        tower.set_input_size(img_size=(size, size))
        return
    tower.image_size, tower.grid_size = (size, size), (size // rows, size // cols)
    state = {"visual.positional_embedding": tower.positional_embedding.data}
    open_clip.model.resize_pos_embed(state, SimpleNamespace(visual=tower))
    tower.positional_embedding = nn.Parameter(state["visual.positional_embedding"])


def _store_preprocessing(open_clip: Any, tower: Any, given: Mapping[str, Any], name: str) -> None:
    """Store open_clip's preprocessing where the tower's `Backbone` reads it."""
    size = adapt(tower).image_size
    settings = open_clip.transform.merge_preprocess_dict(open_clip.transform.PreprocessCfg(), dict(given))
    settings["size"] = size
    mode = settings["resize_mode"]
    if mode not in _TIMM_CROP_MODES:
        raise UnsupportedModelError(f"open_clip:{name} resizes photos by the mode {mode!r}, which is not supported")
    if settings["interpolation"] == "random":  # in training; open_clip takes bicubic otherwise
        settings["interpolation"] = "bicubic"
    open_clip.model.set_model_preprocess_cfg(tower, settings)
    if isinstance(getattr(tower, "pretrained_cfg", None), dict):  # a model of timm
        kept = {key: tuple(settings[key]) for key in ("mean", "std")} | {"interpolation": settings["interpolation"]}
        tower.pretrained_cfg |= kept | {"crop_pct": 1.0, "crop_mode": _TIMM_CROP_MODES[mode]}
