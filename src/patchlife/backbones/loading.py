"""Building a backbone by its name: of timm, transformers or open_clip; from a file, from the hub, or from a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
from torch import nn

from ..config.checks import plain
from ..data import Preprocess
from ..errors import CheckpointError, ConfigError
from ..io.files import sha256_of
from .open_clip_loading import build_open_clip, check_open_clip_name, split_file
from .timm_loading import build_timm, check_folder, check_timm_name
from .transformers_files import check_transformers_name, folder_of, is_transformers_folder, weights_sha256
from .transformers_loading import build_transformers, processor_of

__all__ = [
    "Origin",
    "brings_weights",
    "build",
    "check_name",
    "check_weights",
    "local_folder",
    "preprocess_of",
    "rebuild",
    "short_name",
    "source_of",
]

_SOURCES = {
    "hf-hub": "hf-hub",
    "hf_hub": "hf-hub",
    "local-dir": "local-dir",
    "hf": "hf",
    "open_clip": "open_clip",
}


@dataclass(frozen=True)
class Origin:
    """How a backbone was built. Adapters store it to build the backbone again.

    Attributes:
        model: timm's name of the architecture; hf-hub:ORG/NAME or local-dir:FOLDER (timm); hf:ORG/NAME[@REVISION] or
            hf:FOLDER (transformers); open_clip:ARCH[/TAG], open_clip:hf-hub:ORG/NAME or open_clip:local-dir:FOLDER.
        options: arguments for ``timm.create_model``.
        checkpoint: safetensors file with the weights. sha256: checksum of this file, or of the weights in a folder of
            transformers.
        pretrained: the weights are those that the library provides for this name, or those of the hub or folder.
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
    """(model in eval mode with float32 weights, its `Origin`).

    Args:
        model: as in `Origin`, or a folder of transformers. All but names of timm and open_clip bring their weights.
        checkpoint: a safetensors file with the weights.
        pretrained: use the weights that timm provides.
        image_size: height and width of the images in pixels; the model's own if not given. Position embeddings are
            interpolated.
        model_args: further arguments for ``timm.create_model``. ``img_size`` (an int, or height and width) is the size
            that the model is built for. The file's position embeddings are of this size if their number fits.

    Raises:
        UnsupportedModelError: there is no model of this name or tag, or it is not a Vision Transformer.
        CheckpointError: the weights are missing, damaged, of another model, or not in the safetensors format.
        ConfigError: the model does not take these arguments or cannot be built with them.
        MissingExtraError: the library of the model is not installed.
    """
    model = check_name(model)
    options = {name: _plain(value) for name, value in (model_args or {}).items()}
    if checkpoint is not None and pretrained:
        raise ConfigError("weights come from --checkpoint or from --pretrained, not from both")
    source = source_of(model)
    if source in ("hf", "open_clip") and options:
        raise ConfigError(f"--model-args are arguments of timm's models; {model} takes none")
    if source == "hf":
        return _build_transformers(model, checkpoint, image_size)
    if source == "open_clip":
        return _build_open_clip(model, checkpoint, pretrained, image_size)
    pretrained = pretrained or (bool(source) and checkpoint is None)
    vit, size = build_timm(model, checkpoint, pretrained, image_size, options)
    return vit.eval(), Origin(model, options, *_file(checkpoint), pretrained, size)


def rebuild(origin: Origin, checkpoint: str | Path | None = None) -> nn.Module:
    """The backbone of ``origin``. ``checkpoint`` replaces the path of its weights if the file was moved."""
    file = checkpoint or origin.checkpoint
    vit, found = build(origin.model, file, origin.pretrained and not file, origin.image_size, origin.options)
    if source_of(origin.model) == "hf":
        check_weights(origin, found)
    return vit


def preprocess_of(origin: Origin, channels: int = 3) -> Preprocess | None:
    """How a photo becomes the input of a model of transformers; None for other models, which know it themselves.

    Raises:
        CheckpointError: the model has no file of an image processor.
        ConfigError: the image processor cannot be reproduced.
    """
    if source_of(origin.model) != "hf":
        return None
    return Preprocess.from_image_processor(processor_of(_after_colon(origin.model)), channels)


def check_weights(origin: Origin, found: Origin) -> None:
    """Raise CheckpointError if a folder's weights are not those of ``origin``."""
    if None not in (origin.sha256, found.sha256) and origin.sha256 != found.sha256:
        raise CheckpointError(
            f"{found.model} (sha256 {str(found.sha256)[:12]}...) has other weights than the backbone of the adapter "
            f"(sha256 {str(origin.sha256)[:12]}...); restore them, or fit a new adapter"
        )


# ---- names


def source_of(model: str) -> str:
    """What a model's name starts with, before a colon: hf-hub, local-dir, hf or open_clip; otherwise empty."""
    source, colon, _ = model.partition(":")
    return _SOURCES.get(source.lower(), "") if colon else ""


def brings_weights(model: str) -> bool:
    """Whether the name of a model says where its weights are."""
    if source_of(model) == "open_clip":
        return "/" in model
    return bool(source_of(model)) or _is_plain_folder(model)


def short_name(model: str) -> str:
    """The last part of the name of a model of transformers or open_clip, for people and for names of files."""
    name = _after_colon(model)
    if source_of(model) == "open_clip" and not source_of(name):
        return name.partition("/")[0]
    return Path(name.partition("@")[0] if not Path(name).is_absolute() else name).name


def check_name(model: str) -> str:
    """The name, with an absolute path if it holds a folder. A folder of transformers becomes ``hf:FOLDER``.

    Raises UnsupportedModelError for names that the libraries do not have, CheckpointError for folders without a model.
    """
    source, name = source_of(model), _after_colon(model)
    if source == "local-dir":
        return f"local-dir:{check_folder(Path(name))}"
    if source == "hf-hub":
        return f"hf-hub:{name}"
    if source == "open_clip":
        return f"open_clip:{check_open_clip_name(name)}"
    if source == "hf" or _is_plain_folder(model):
        return f"hf:{check_transformers_name(name if source else model)}"
    check_timm_name(model)
    return model


def local_folder(model: str) -> Path:
    """The folder that a name with ``hf:`` means, of a model or an adapter. From the hub it is downloaded.

    Raises CheckpointError if there is none, or if it cannot be downloaded.
    """
    return folder_of(check_transformers_name(_after_colon(model)))


# ---- the libraries


def _build_transformers(model: str, checkpoint: str | Path | None, image_size: int | None) -> tuple[nn.Module, Origin]:
    if checkpoint is not None:
        raise ConfigError(
            f"{model} brings its weights, which --checkpoint {checkpoint} would replace; remove --checkpoint, or save "
            "these weights into a folder with save_pretrained and give that folder"
        )
    name = _after_colon(model)
    vit = build_transformers(name, image_size)
    return vit.eval(), Origin(model, sha256=weights_sha256(name), pretrained=True, image_size=image_size)


def _build_open_clip(
    model: str, checkpoint: str | Path | None, pretrained: bool, image_size: int | None
) -> tuple[nn.Module, Origin]:
    name, file = split_file(_after_colon(model))
    if checkpoint is not None and brings_weights(model):
        raise ConfigError(f"{model} names its weights, got --checkpoint as well; give one of the two")
    checkpoint = checkpoint if file is None else file
    vit = build_open_clip(name, checkpoint, pretrained, image_size)
    has_own = brings_weights(f"open_clip:{name}")
    return vit.eval(), Origin(f"open_clip:{name}", {}, *_file(checkpoint), has_own, image_size)


def _file(checkpoint: str | Path | None) -> tuple[str | None, str | None]:
    """(absolute path, sha256) of a file of weights."""
    return (None, None) if checkpoint is None else (str(Path(checkpoint).resolve()), sha256_of(checkpoint))


def _is_plain_folder(model: str) -> bool:
    """Whether ``model`` is the path of a folder of transformers. A timm name wins over a folder of the same name."""
    return not timm.is_model(model) and is_transformers_folder(model)


def _after_colon(model: str) -> str:
    return model.partition(":")[2]


def _plain(value: Any) -> Any:
    """A model argument with tuples for lists and plain Python numbers, for timm and for JSON."""
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else plain(value)
