"""Building a timm model by its name, from the hub, or from a folder that timm saved."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, UnsupportedModelError
from .adapt import adapt
from .checkpoint import load_weights, read_weights, without_prefix

__all__ = ["build_timm", "check_folder", "check_timm_name"]

_ARGUMENTS_OF_TIMM = {*inspect.signature(timm.create_model).parameters} - {"kwargs"}  # not of the model


def build_timm(
    model: str, checkpoint: str | Path | None, pretrained: bool, image_size: int | None, options: dict[str, Any]
) -> tuple[nn.Module, int | None]:
    """(the model, ``image_size`` if it is not in ``options``).

    The number of classes is that of the checkpoint, unless ``options`` gives it. It and the image size are added to
    ``options``. The position embeddings are loaded at the image size that they were trained for, and interpolated if
    another size is requested.
    """
    vit: Any = _created(model, pretrained, options)
    _check_classifier(vit, pretrained, options)
    if checkpoint is not None:
        options["num_classes"] = _load(vit, checkpoint, options, image_size)
    if image_size is not None:
        _resize(vit, "image_size", image_size)
    elif options.get("img_size") is not None:
        _resize(vit, "img_size", options["img_size"])
    if image_size is not None and "img_size" not in options:
        options["img_size"], image_size = image_size, None
    return vit, image_size


# ---- names


def check_timm_name(model: str) -> None:
    """Raise UnsupportedModelError for names and tags that timm does not have."""
    if not timm.is_model(model):
        near = ", ".join(timm.list_models(f"*{model.split('.')[0][:14]}*")[:5])
        raise UnsupportedModelError(
            f"timm has no model named {model!r}" + (f"; did you mean one of {near}?" if near else "")
        )
    architecture, dot, tag = model.partition(".")
    tagged = timm.list_models(f"{architecture}.*", include_tags=True) if dot else []
    if dot and model not in tagged:
        raise UnsupportedModelError(
            f"timm has no weights tagged {tag!r} for {architecture}; "
            + (f"tags are {', '.join(tagged)}" if tagged else "this model has no tags, so give its name alone")
        )


def check_folder(folder: Path) -> Path:
    """The absolute path of a folder that timm saved for the hub. Raises an error if its files are missing or wrong."""
    config = folder / "config.json"
    try:
        hub_config = json.loads(config.read_text("utf-8"))
        architecture = hub_config.get("architecture", hub_config.get("pretrained_cfg", {}).get("architecture"))
    except (OSError, ValueError, AttributeError) as error:
        problem = getattr(error, "strerror", None) or "other content"
        raise CheckpointError(
            f"local-dir:{folder}: expected a folder with config.json as timm writes it, got {problem} at {config}; "
            "check the path"
        ) from None
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise UnsupportedModelError(f"{config} names the architecture {architecture!r}, which timm does not have")
    if not (folder / "model.safetensors").is_file():  # timm would open a pickle instead
        raise CheckpointError(
            f"local-dir:{folder} has no model.safetensors; pickles (.bin, .pth) are not opened, because that can "
            "run code: save the model again with timm.models.save_for_hf(model, folder, safe_serialization=True)"
        )
    return folder.resolve()


# ---- the model


def _created(model: str, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    """The model that timm builds. Raises ConfigError if timm can build it only without ``options``."""
    if not_of_model := sorted(_ARGUMENTS_OF_TIMM & options.keys()):
        raise ConfigError(
            f"{not_of_model[0]} is not an argument of the model; weights come from --checkpoint FILE or --pretrained"
        )
    try:
        return timm.create_model(model, pretrained=pretrained, **options)
    except Exception as error:
        if options and _can_build(model) and not _can_build(model, **options):
            raise ConfigError(_options_error(model, options, error)) from None
        raise


def _check_classifier(vit: Any, pretrained: bool, options: Mapping[str, Any]) -> None:
    """Raise ConfigError if timm would put a random classifier on its weights, for another number of classes."""
    asked = options.get("num_classes")
    trained = (getattr(vit, "pretrained_cfg", None) or {}).get("num_classes")
    if pretrained and asked and asked != trained:
        raise ConfigError(
            f"num_classes={asked} would put a random classifier on weights of {trained} classes; leave it out, or give "
            "a fine-tuned model with --checkpoint FILE"
        )


def _can_build(model: str, **options: Any) -> bool:
    try:
        timm.create_model(model, **options)
    except Exception:
        return False
    return True


def _options_error(model: str, options: Mapping[str, Any], error: Exception) -> str:
    """Error text for options that timm cannot build a model with."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unknown and unknown[1] in options:
        known = {*inspect.signature(VisionTransformer).parameters, *inspect.signature(Eva).parameters}
        near = difflib.get_close_matches(unknown[1], known, 3)
        return f"{model} takes no model argument {unknown[1]!r}" + (
            f"; did you mean {', '.join(near)}?" if near else ""
        )
    arguments = " ".join(f"{name}={value}" for name, value in options.items())
    return f"timm cannot build {model} with the model arguments {arguments}: {str(error) or type(error).__name__}"


def _load(vit: Any, checkpoint: str | Path, options: Mapping[str, Any], image_size: int | None) -> int:
    """Load a file into ``vit``, with classifier and positions resized to the file. Returns the number of classes."""
    adapt(vit)  # refuses unsupported models before the weights are read
    weights = without_prefix(read_weights(checkpoint), vit.state_dict().keys(), checkpoint)
    if "num_classes" not in options:
        vit.reset_classifier(_classes_in(weights, vit))
    _fit_positions(vit, weights, image_size)
    load_weights(vit, weights, checkpoint)
    return vit.num_classes


def _classes_in(weights: Mapping[str, Tensor], vit: Any) -> int:
    """Number of classes of the file's classifier; 0 if it has no classifier."""
    names = vit.pretrained_cfg.get("classifier") or "head"
    heads = [weights.get(f"{name}.weight") for name in ([names] if isinstance(names, str) else names)]
    return next((len(head) for head in heads if head is not None and head.ndim == 2), 0)


def _fit_positions(vit: Any, weights: Mapping[str, Tensor], image_size: int | None) -> None:
    """Set the image size of ``vit`` to that of the file's position embeddings.

    Only the number of positions is known. The first of these sizes with as many patches is taken: the size that the
    model was built for, the default of its name, ``image_size``, a square.
    """
    positions = weights.get("pos_embed")
    if positions is None or positions.ndim != 3 or vit.pos_embed is None:
        return
    patches = positions.shape[1] - (0 if vit.no_embed_class else vit.num_prefix_tokens)
    rows, cols = vit.patch_embed.patch_size
    side = math.isqrt(max(patches, 0))
    own, asked = vit.pretrained_cfg["input_size"][1:], (image_size or 0, image_size or 0)
    sizes = [(height // rows, width // cols) for height, width in (own, asked)]
    for grid in (vit.patch_embed.grid_size, *sizes, (side, side)):
        if math.prod(grid) == patches > 0:
            if tuple(grid) != tuple(vit.patch_embed.grid_size):
                vit.set_input_size(img_size=(grid[0] * rows, grid[1] * cols))
            return


def _resize(vit: Any, name: str, size: Any) -> None:
    """Set the image size of the backbone; timm interpolates the position embeddings. ``name``: for the error."""
    rows, cols = adapt(vit).patch_size
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(s, int) and s > 0 for s in pair):
        raise ConfigError(f"{name} must be a number of pixels, or HEIGHT,WIDTH, got {size!r}")
    if (pair[0] % rows or pair[1] % cols) and not vit.patch_embed.dynamic_img_pad:
        raise ConfigError(f"{name} must be a multiple of the patches' {rows} x {cols} pixels, got {size}")
    if pair != tuple(vit.patch_embed.img_size):
        vit.set_input_size(img_size=pair)
