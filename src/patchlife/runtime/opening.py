"""Opening a MODEL argument: a timm name, hf-hub:ORG/NAME, local-dir:FOLDER, the folder of an adapter, or ``demo``."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm

from ..adapters import load, read_adapter
from ..backbones import Backbone, Origin, build, check_name, source_of
from ..config import Device, LifeConfig, ModelConfig
from ..data import Preprocess
from ..data.labels import Labels, imagenet_labels, numbered_labels, read_labels
from ..errors import AdapterError, CheckpointError, ConfigError, PatchLifeError
from ..io.files import sha256_of
from ..slimming import SlimModel, slim_model, wrap
from .demo_model import DEMO, demo_backbone, demo_folder
from .pipeline import Pipeline, pick_device

__all__ = ["backbone_config", "open_pipeline"]


def open_pipeline(config: ModelConfig, device: Device = "cpu", random_weights: bool = False) -> Pipeline[SlimModel]:
    """The pipeline of the model that ``config`` describes.

    Args:
        config: model, weights and settings.
        device: of the model.
        random_weights: accept a timm name without weights, for example to count FLOPs.

    Raises:
        UnsupportedModelError: timm has no such model, or its patches cannot be dropped exactly.
        CheckpointError: the weights are missing, damaged, or of another model.
        AdapterError: the adapter is damaged, or was made for another model.
        ConfigError: the settings do not fit the model.
    """
    torch_device = pick_device(device)
    if config.model == DEMO:
        model = _open_demo(config)
    elif _is_folder(config.model):
        model = _open_adapter(config)
    else:
        model = _open_timm(config, random_weights)
    backbone = model.backbone
    preprocess = backbone.preprocess or Preprocess(size=backbone.image_size)
    name = backbone.name or type(backbone.model).__name__
    labels = _labels_of(backbone, config.labels)
    return Pipeline(name, model.to(torch_device).eval(), preprocess, labels, config.multi_label)


# ---- the three kinds of MODEL argument


def _open_timm(config: ModelConfig, random_weights: bool) -> SlimModel:
    check_name(config.model)
    if not (config.checkpoint or config.pretrained or random_weights or source_of(config.model)):
        raise ConfigError(
            f"{config.model} would have random weights; give a file with --checkpoint FILE, or download timm's "
            "weights with --pretrained"
        )
    vit, origin = _build(config.model, config)
    model = wrap(vit, LifeConfig.from_dict(config.life))
    model.origin = origin
    return model


def _open_adapter(config: ModelConfig) -> SlimModel:
    """An adapter on the backbone that it names. A ``config.checkpoint`` must hold the same weights."""
    settings = backbone_config(config)
    vit, origin = _build(settings.model, settings)
    saved = load(config.model, vit)
    saved.origin = origin
    if not config.life:
        return saved
    return _with_settings(saved, saved.settings.replace(**config.life))


def backbone_config(config: ModelConfig) -> ModelConfig:
    """``config`` for the backbone alone: for an adapter, with the model, weights and options that it was made for.

    Raises AdapterError for a folder that is not an adapter, and for one that does not name its backbone.
    """
    if config.model == DEMO or not _is_folder(config.model):
        return config
    folder = Path(config.model)
    if not (folder / "adapter.json").is_file() and (suggestion := _suggestion(config.model)):
        raise AdapterError(f"{folder} is not a patchlife adapter: it has no adapter.json; {suggestion}")
    manifest, _ = read_adapter(folder)
    if not (manifest["origin"] or manifest["backbone"]["name"]):
        raise AdapterError(f"{folder} does not name its backbone; in Python: patchlife.load({str(folder)!r}, vit)")
    if not (manifest["origin"] or config.checkpoint or config.pretrained):
        raise AdapterError(
            f"{folder} does not record the weights of its backbone, {manifest['backbone']['name']}; give them with "
            "--checkpoint FILE or --pretrained"
        )
    origin = Origin(**manifest["origin"]) if manifest["origin"] else Origin(manifest["backbone"]["name"])
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


def _suggestion(model: str) -> str:
    """What to write instead of a MODEL argument that is no adapter; empty if there is no suggestion."""
    if (Path(model) / "config.json").is_file():
        return f"for a model that timm saved in this folder give local-dir:{model}"
    if not Path(model).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@\w+)?", model):
        return f"for a model of the Hugging Face hub give hf-hub:{model}"
    return ""


def _open_demo(config: ModelConfig) -> SlimModel:
    """The demo model with its trained adapter, or with the attention scorer if another start block is set."""
    if config.checkpoint or config.pretrained or config.image_size or config.model_args:
        raise ConfigError(
            "demo has its own weights and image size; remove --checkpoint, --pretrained, --image-size, --model-args"
        )
    vit = demo_backbone()
    untrained, trained = wrap(vit, LifeConfig.from_dict(config.life)), load(demo_folder() / "adapter", vit)
    if untrained.start != trained.start:
        return untrained
    return _with_settings(trained, trained.settings.replace(**config.life))


# ---- steps


def _is_folder(model: str) -> bool:
    """Whether ``model`` is a path, not a name. A timm name wins over a folder of the same name without adapter."""
    if source_of(model):
        return False
    folder = Path(model)
    if folder.name != model or (folder / "adapter.json").is_file():
        return True
    return folder.is_dir() and not timm.is_model(model)


def _build(name: str, config: ModelConfig) -> tuple[Any, Origin]:
    """(the backbone with its weights at the requested image size, its origin)."""
    try:
        return build(name, config.checkpoint, config.pretrained, config.image_size, config.model_args)
    except PatchLifeError:
        raise
    except Exception as error:  # the hub client and timm raise many kinds
        if not (config.pretrained or source_of(name)):
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
    model.origin, model.delta = saved.origin, saved.delta
    if model.start == saved.start:
        return model.use_calibration(saved.calibration) if saved.calibration else model
    if any(True for _ in saved.scorer.parameters()):
        raise ConfigError(
            f"this adapter's scorer was trained for start block {saved.start}, got {model.start}; keep that start block"
        )
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


def _labels_of(backbone: Backbone, path: Path | None) -> Labels:
    """Class names from the file ``path``, else the model's own, else ImageNet's for 1000 classes, else numbers."""
    count = backbone.num_classes
    if path:
        return read_labels(path, count)
    if count and len(backbone.label_names) == count:
        return Labels(backbone.label_names)
    return imagenet_labels() if count == 1000 else numbered_labels(count)
