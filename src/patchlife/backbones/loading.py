"""Building a backbone by its timm name, with weights from a file, from the hub, or from a folder."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..config.checks import plain
from ..errors import CheckpointError, ConfigError, UnsupportedModelError
from ..io.files import sha256_of
from .adapt import adapt
from .checkpoint import load_weights, read_weights, without_prefix

__all__ = ["Origin", "build", "check_name", "rebuild", "source_of"]

_SOURCES = {"hf-hub": "hf-hub", "hf_hub": "hf-hub", "local-dir": "local-dir"}
_ARGUMENTS_OF_TIMM = {*inspect.signature(timm.create_model).parameters} - {"kwargs"}  # not of the model


@dataclass(frozen=True)
class Origin:
    """How a backbone was built. Adapters store it to build the backbone again.

    Attributes:
        model: timm's name of the architecture, or hf-hub:ORG/NAME or local-dir:FOLDER.
        options: arguments for ``timm.create_model``.
        checkpoint: safetensors file with the weights. sha256: checksum of this file.
        pretrained: the weights are those that timm provides for this name, or those of the hub or folder.
        image_size: height and width in pixels that the model was resized to, if that is not ``options["img_size"]``.
    """

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    sha256: str | None = None
    pretrained: bool = False
    image_size: int | None = None

    def __post_init__(self) -> None:
        options = {name: _plain(value) for name, value in self.options.items()}
        object.__setattr__(self, "options", options)  # equal before and after JSON, which turns tuples into lists

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def build(
    model: str,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    image_size: int | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Origin]:
    """(timm model in eval mode, its `Origin`).

    The number of classes is that of the checkpoint, unless ``model_args`` gives it. The position embeddings are loaded
    at the image size that they were trained for, and interpolated if another size is requested.

    Args:
        model: timm's name, hf-hub:ORG/NAME, or local-dir:FOLDER. The last two bring their weights.
        checkpoint: a safetensors file with the weights.
        pretrained: use the weights that timm provides.
        image_size: height and width of the images in pixels; the model's own if not given.
        model_args: further arguments for ``timm.create_model``. ``img_size`` (an int, or height and width) is the size
            that the model is built for. The file's position embeddings are of this size if their number fits.

    Raises:
        UnsupportedModelError: timm has no model of this name or tag.
        CheckpointError: the file is missing, damaged, of another model, or not in the safetensors format.
        ConfigError: the model does not take these arguments or cannot be built with them.
    """
    model = check_name(model)
    options = {name: _plain(value) for name, value in (model_args or {}).items()}
    if checkpoint is not None and pretrained:
        raise ConfigError("weights come from --checkpoint or from --pretrained, not from both")
    pretrained = pretrained or (bool(source_of(model)) and checkpoint is None)
    vit: Any = _created(model, pretrained, options)
    _check_classifier(vit, pretrained, options)
    path = sha256 = None
    if checkpoint is not None:
        options["num_classes"] = _load(vit, checkpoint, options, image_size)
        path, sha256 = str(Path(checkpoint).resolve()), sha256_of(checkpoint)
    if image_size is not None:
        _resize(vit, "image_size", image_size)
    elif options.get("img_size") is not None:
        _resize(vit, "img_size", options["img_size"])
    if image_size is not None and "img_size" not in options:
        options["img_size"], image_size = image_size, None
    return vit.eval(), Origin(model, options, path, sha256, pretrained, image_size)


def rebuild(origin: Origin, checkpoint: str | Path | None = None) -> nn.Module:
    """The backbone of ``origin``. ``checkpoint`` replaces the path of its weights if the file was moved."""
    file = checkpoint or origin.checkpoint
    return build(origin.model, file, origin.pretrained and not file, origin.image_size, origin.options)[0]


# ---- names


def source_of(model: str) -> str:
    """``hf-hub`` or ``local-dir`` if a model's name starts with it and a colon; otherwise empty."""
    source, colon, _ = model.partition(":")
    return _SOURCES.get(source.lower(), "") if colon else ""


def check_name(model: str) -> str:
    """The name, with an absolute path if it holds a folder.

    Raises UnsupportedModelError for names that timm does not have, CheckpointError for folders without a model.
    """
    if source := source_of(model):
        path = model.partition(":")[2]
        return f"{source}:{_checked_folder(Path(path))}" if source == "local-dir" else f"{source}:{path}"
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
    return model


def _checked_folder(folder: Path) -> Path:
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


def _plain(value: Any) -> Any:
    """A model argument with tuples for lists and plain Python numbers, for timm and for JSON."""
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else plain(value)


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
