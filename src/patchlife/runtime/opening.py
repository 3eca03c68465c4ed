"""Opening a MODEL argument: a model of timm, transformers or open_clip, the folder of an adapter, or ``demo``."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch

from ..adapters import load, read_adapter
from ..backbones import (
    Backbone,
    Origin,
    brings_weights,
    build,
    check_name,
    check_weights,
    local_folder,
    preprocess_of,
    short_name,
    source_of,
)
from ..config import Device, LifeConfig, ModelConfig, Precision
from ..data import Preprocess
from ..data.labels import Labels, imagenet_labels, named_labels, numbered_labels, read_labels
from ..errors import AdapterError, CheckpointError, ConfigError, PatchLifeError
from ..io.exported_files import is_exported
from ..io.files import sha256_of
from ..slimming import SlimModel, slim_model, wrap
from .demo_model import DEMO, demo_backbone, demo_folder
from .pipeline import Pipeline, pick_device

__all__ = ["adapter_folder", "backbone_config", "open_pipeline"]


def open_pipeline(
    config: ModelConfig,
    device: Device = "cpu",
    random_weights: bool = False,
    dtype: Precision = "float32",
    keep_aspect: bool = False,
) -> Pipeline[SlimModel]:
    """The pipeline of the model that ``config`` describes.

    Args:
        config: model, weights and settings.
        device: of the model.
        random_weights: accept a name of an architecture without weights, for example to count FLOPs.
        dtype: number format of the weights, and of the images that the model takes.
        keep_aspect: photos keep their own shape, so the model is built for images of different sizes.

    Raises:
        UnsupportedModelError: there is no such model, or its patches cannot be dropped exactly.
        CheckpointError: the weights are missing, damaged, or of another model; or there is no image processor.
        AdapterError: the adapter is damaged, or was made for another model.
        ConfigError: the settings do not fit the model.
        MissingExtraError: the library of the model is not installed.
    """
    torch_device = pick_device(device)
    _check_not_exported(config.model)
    if config.model == DEMO:
        model = _open_demo(config, keep_aspect)
    elif folder := adapter_folder(config.model):
        model = _open_adapter(config, folder, keep_aspect)
    else:
        model = _open_backbone(config, random_weights, keep_aspect)
    if keep_aspect and not model.backbone.any_size:
        raise ConfigError(
            f"{config.model} takes images of {model.backbone.image_size[0]} x {model.backbone.image_size[1]} pixels "
            "only, so photos cannot keep their own shape; remove --keep-aspect, or give a model of timm"
        )
    backbone, origin = model.backbone, model.origin
    preprocess = (preprocess_of(origin, backbone.channels) if origin else None) or backbone.preprocess or Preprocess()
    return Pipeline(
        _name_of(backbone, origin),
        model.to(torch_device, getattr(torch, dtype)).eval(),
        replace(preprocess, size=backbone.image_size, keep_aspect=backbone.patch_size if keep_aspect else None),
        _labels_of(backbone, config.labels),
        config.multi_label or backbone.multi_label,
    )


def _check_not_exported(model: str) -> None:
    """Raise ConfigError for a file or a bundle. A timm name wins over a file of the same name."""
    if is_exported(model) and not timm.is_model(model):
        raise ConfigError(
            f"expected a model, got the file or bundle {model}; only predict, embed, eval, explore and serve run "
            "exported models. Give the MODEL that it was exported from; weights are given with --checkpoint FILE"
        )


# ---- the kinds of MODEL argument


def _open_backbone(config: ModelConfig, random_weights: bool, any_size: bool) -> SlimModel:
    """A model of timm, transformers or open_clip."""
    name = check_name(config.model)
    if not (config.checkpoint or config.pretrained or random_weights or brings_weights(name)):
        raise ConfigError(_random_weights(name))
    vit, origin = _build(name, config, any_size)
    model = wrap(vit, LifeConfig.from_dict(config.life))
    model.origin = origin
    return model


def _random_weights(name: str) -> str:
    """Error text for a name of an architecture without weights."""
    if source_of(name) == "open_clip":
        return f"{name} would have random weights; give {name}/TAG, {name}/FILE.safetensors, or --checkpoint FILE"
    return (
        f"{name} would have random weights; give a file with --checkpoint FILE, or download timm's weights with "
        "--pretrained"
    )


def _open_adapter(config: ModelConfig, folder: Path, any_size: bool) -> SlimModel:
    """An adapter on the backbone that it names. A ``config.checkpoint`` must hold the same weights."""
    settings = backbone_config(config)
    vit, origin = _build(settings.model, settings, any_size)
    manifest, _ = read_adapter(folder)
    if origin and manifest["origin"] and source_of(manifest["origin"]["model"]) == "hf":
        check_weights(Origin(**manifest["origin"]), origin)
    saved = load(folder, vit)
    saved.origin = origin
    if not config.life:
        return saved
    return _with_settings(saved, saved.settings.replace(**config.life))


def backbone_config(config: ModelConfig) -> ModelConfig:
    """``config`` for the backbone alone: for an adapter, with the model, weights and options that it was made for.

    Raises AdapterError for a folder that is not an adapter, and for one that does not name its backbone.
    """
    folder = None if config.model == DEMO else adapter_folder(config.model)
    if folder is None:
        return config
    if not (folder / "adapter.json").is_file() and (suggestion := _suggestion(config.model)):
        raise AdapterError(f"{folder} is not a patchlife adapter: it has no adapter.json; {suggestion}")
    manifest, _ = read_adapter(folder)
    if not manifest["origin"] and manifest["backbone"]["name"] == DEMO:
        return replace(config, model=DEMO)
    if not (manifest["origin"] or manifest["backbone"]["name"]):
        raise AdapterError(f"{folder} does not name its backbone; in Python: patchlife.load({str(folder)!r}, vit)")
    if not (manifest["origin"] or config.checkpoint or config.pretrained):
        raise AdapterError(
            f"{folder} does not record the weights of its backbone, {manifest['backbone']['name']}; give them with "
            "--checkpoint FILE or --pretrained"
        )
    origin = Origin(**manifest["origin"]) if manifest["origin"] else Origin(manifest["backbone"]["name"])
    if source_of(origin.model) == "hf" or (config.checkpoint and brings_weights(str(config.checkpoint))):
        name = _moved(folder, origin, config.checkpoint)
        size = config.image_size or origin.image_size
        return replace(config, model=name, checkpoint=None, pretrained=False, image_size=size)
    checkpoint = config.checkpoint or (Path(origin.checkpoint) if origin.checkpoint else None)
    if checkpoint:
        _check_checksum(folder, origin, checkpoint)
    return replace(
        config,
        model=origin.model,
        checkpoint=checkpoint,
        pretrained=not checkpoint and (origin.pretrained or config.pretrained),
        image_size=config.image_size or origin.image_size,
        model_args={**origin.options, **config.model_args},
    )


def _moved(adapter: Path, origin: Origin, place: Path | None) -> str:
    """The model of transformers that an adapter is opened on; ``place`` is the path of its folder, if it is given."""
    if place is not None:
        return f"hf:{place}"
    folder = Path(origin.model.partition(":")[2])
    if folder.is_absolute() and not folder.is_dir():
        raise CheckpointError(
            f"{adapter} needs the model in the folder {folder}, which is not there; give its present location with "
            "--checkpoint FOLDER"
        )
    return origin.model


def _suggestion(model: str) -> str:
    """What to write instead of a MODEL argument that is no adapter; empty if there is no suggestion."""
    if (Path(model) / "config.json").is_file():
        return f"for a model that timm saved in this folder give local-dir:{model}"
    if (Path(model) / "open_clip_config.json").is_file():
        return f"for a model of open_clip give open_clip:local-dir:{model}"
    if not Path(model).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@\w+)?", model):
        return f"for a model of the Hugging Face hub give hf-hub:{model} (timm) or hf:{model} (transformers)"
    return ""


def _open_demo(config: ModelConfig, any_size: bool) -> SlimModel:
    """The demo model with its trained adapter, or with the attention scorer if another start block is set."""
    vit, _ = _build(DEMO, config, any_size)
    trained = load(demo_folder() / "adapter", vit)
    if config.life.get("start") or config.life.get("drops"):
        untrained = wrap(vit, LifeConfig.from_dict(config.life))
        if untrained.start not in trained.starts:
            return untrained
    return _with_settings(trained, trained.settings.replace(**config.life))


# ---- steps


def adapter_folder(model: str) -> Path | None:
    """The folder of an adapter; None for names of models and folders of transformers. From the hub it is downloaded.

    A path that is not a model counts as the folder of an adapter, also if there is none. A timm name wins over a folder
    of the same name without an adapter.
    """
    if source_of(model) == "hf":
        folder = local_folder(model)
        return folder if (folder / "adapter.json").is_file() else None
    if source_of(model):
        return None
    folder = Path(model)
    if (folder / "adapter.json").is_file():
        return folder
    if brings_weights(model):
        return None
    return folder if folder.name != model or (folder.is_dir() and not timm.is_model(model)) else None


def _build(name: str, config: ModelConfig, any_size: bool) -> tuple[Any, Origin | None]:
    """(the backbone with its weights at the requested image size, its origin); ``any_size``: for models of timm.

    The demo model has no origin: it is part of this package.
    """
    if name == DEMO:
        if config.checkpoint or config.pretrained or config.image_size or config.model_args:
            raise ConfigError(
                "demo has its own weights and image size; remove --checkpoint, --pretrained, --image-size, --model-args"
            )
        return demo_backbone(any_size), None
    options = config.model_args
    if any_size and source_of(name) in ("", "hf-hub", "local-dir"):
        options = {**options, "dynamic_img_size": True}
    try:
        return build(name, config.checkpoint, config.pretrained, config.image_size, options)
    except PatchLifeError:
        raise
    except Exception as error:  # the hub client and timm raise many kinds
        if not (config.pretrained or source_of(name) in ("hf-hub", "local-dir")):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        what = name if source_of(name) else f"timm's weights for {name}"
        raise CheckpointError(f"{what} could not be loaded ({reason}); {_loading_hint(name)}") from None


def _loading_hint(name: str) -> str:
    """What to check if the weights of ``name`` cannot be loaded."""
    if source_of(name) == "local-dir":
        return "the folder must hold config.json and model.safetensors of one model, as timm writes them"
    if source_of(name) == "hf-hub":
        return (
            "check the network, and that it is a timm model. Without network: copy its config.json and "
            "model.safetensors into a folder and give local-dir:FOLDER"
        )
    return "check the network, and that timm has weights of this name; or give a file with --checkpoint FILE"


def _with_settings(saved: SlimModel, settings: LifeConfig) -> SlimModel:
    """The model of an adapter with other settings. Raises ConfigError if its scorer was trained for another start."""
    model = slim_model(saved.backbone, settings, saved.scorer)
    model.origin, model.delta, model.tuning = saved.origin, saved.delta, saved.tuning
    learned = any(True for _ in saved.scorer.parameters())
    if learned and (other := sorted(set(model.starts) - set(saved.starts))):
        trained, got = (", ".join(map(str, starts)) for starts in (saved.starts, other))
        raise ConfigError(
            f"this adapter's scorer was trained for start block {trained}, got {got}; keep that start block"
        )
    for (_, start), calibration in saved.calibrations.items():
        if start in model.starts:
            model.use_calibration(calibration, start)
    return model


def _check_checksum(folder: Path, origin: Origin, checkpoint: Path) -> None:
    """Raise CheckpointError unless ``checkpoint`` is the file, byte for byte, that the adapter was made for."""
    if not checkpoint.is_file():
        raise CheckpointError(
            f"{folder} needs the weights of {origin.model}, which are not at {checkpoint}; give their present "
            "location with --checkpoint FILE"
        )
    actual = sha256_of(checkpoint)
    if origin.sha256 not in (None, actual):
        raise CheckpointError(
            f"{checkpoint} (sha256 {actual[:12]}...) is not the backbone that {folder} was made for: "
            f"{origin.checkpoint or origin.model} (sha256 {origin.sha256[:12]}...)"
        )


def _name_of(backbone: Backbone, origin: Origin | None) -> str:
    """The name of a model, for people and for names of files."""
    if origin and source_of(origin.model) in ("hf", "open_clip"):
        return short_name(origin.model)
    return backbone.name or type(backbone.model).__name__


def _labels_of(backbone: Backbone, path: Path | None) -> Labels:
    """Class names from the file ``path``, else the model's own, else ImageNet's for 1000 classes, else numbers."""
    count = backbone.num_classes
    if path:
        return read_labels(path, count)
    if count and len(backbone.label_names) == count:
        return named_labels(backbone.label_names)
    return imagenet_labels() if count == 1000 else numbered_labels(count)
