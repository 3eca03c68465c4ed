"""From what a user calls MODEL to a slimmed model that is pipeline to see photos.

MODEL is a timm name (hf-hub:ORG/NAME and local-dir:FOLDER are such, too), the folder of a life adapter, or ``demo``.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from torch import nn

from ..adapters import load, read_adapter
from ..backbones import Origin, build, check_name, pretrained_cfg, source_of
from ..config import Device, LifeConfig, ModelConfig
from ..data import Preprocess
from ..data.labels import Labels, imagenet_labels, numbered_labels, read_labels
from ..errors import AdapterError, CheckpointError, ConfigError, PatchLifeError
from ..io.files import sha256_of
from ..slimming import SlimModel, wrap
from .demo_model import DEMO, demo_backbone, demo_folder
from .pipeline import Pipeline, pick_device

__all__ = ["open_pipeline"]


def open_pipeline(config: ModelConfig, device: Device = "cpu", random_weights: bool = False) -> Pipeline[SlimModel]:
    """Build the model that ``config`` describes.

    Args:
        config: which model.
        device: where to put it.
        random_weights: a timm name without weights will do (to look at it, not to use it).

    Raises:
        UnsupportedModelError: timm does not know it, or its patches cannot be dropped exactly.
        CheckpointError: weights that are missing, damaged, or of another model.
        AdapterError: an adapter that is damaged, or was made for another model.
        ConfigError: settings that do not fit the model.
    """
    where = pick_device(device)
    if config.model == DEMO:
        model = _open_demo(config)
    elif _is_folder(config.model):
        model = _open_adapter(config)
    else:
        model = _open_timm(config, random_weights)
    vit: Any = model.backbone.vit
    looks = Preprocess.from_timm_cfg(pretrained_cfg(vit), model.backbone.channels)
    preprocess = replace(looks, size=model.backbone.image_size)
    name = pretrained_cfg(vit).get("architecture") or type(vit).__name__
    return Pipeline(name, model.to(where).eval(), preprocess, _labels_of(vit, config.labels))


# ---- the three kinds of MODEL


def _open_timm(config: ModelConfig, random_weights: bool) -> SlimModel:
    check_name(config.model)
    if not (config.checkpoint or config.pretrained or random_weights or source_of(config.model)):
        raise ConfigError(
            f"{config.model} would have random weights; give some with --checkpoint FILE, or fetch timm's "
            "with --pretrained"
        )
    vit, origin = _built(config.model, config)
    return _slimmed(vit, LifeConfig.from_dict(config.life), origin)


def _open_adapter(config: ModelConfig) -> SlimModel:
    """An adapter on the backbone that it names; weights from elsewhere must be the same ones."""
    folder = Path(config.model)
    if not (folder / "adapter.json").is_file() and (meant := _perhaps(config.model)):
        raise AdapterError(f"{folder} is not a patchlife adapter: it has no adapter.json; {meant}")
    metadata, _ = read_adapter(folder)
    if not (metadata["origin"] or metadata["backbone"]["name"]):
        raise AdapterError(f"{folder} does not name its backbone; in Python: patchlife.load({str(folder)!r}, vit)")
    origin = Origin(**metadata["origin"]) if metadata["origin"] else Origin(metadata["backbone"]["name"])
    checkpoint = config.checkpoint or (Path(origin.checkpoint) if origin.checkpoint else None)
    if checkpoint:
        _check_sum(folder, origin, checkpoint)
    pretrained = not checkpoint and (origin.pretrained or config.pretrained)
    args = {**origin.options, **config.model_args}
    size = config.image_size or origin.image_size
    settings = replace(config, checkpoint=checkpoint, pretrained=pretrained, image_size=size, model_args=args)
    vit, built_from = _built(origin.model, settings)
    saved = load(folder, vit)
    saved.origin = built_from
    if not config.life:
        return saved
    return _resettled(saved, saved.config.replace(**config.life))


def _perhaps(model: str) -> str:
    """What a name may mean that is no adapter; empty if nobody knows."""
    if (Path(model) / "config.json").is_file():
        return f"for a model that timm wrote to this folder give local-dir:{model}"
    if not Path(model).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@\w+)?", model):
        return f"for a model of the hub give hf-hub:{model}"
    return ""


def _open_demo(config: ModelConfig) -> SlimModel:
    """The embedded model with the lives it learned; with the rule where patches shall begin to die elsewhere."""
    if config.checkpoint or config.pretrained or config.image_size or config.model_args:
        raise ConfigError(
            "demo brings its own weights and image size; drop --checkpoint, --pretrained, --image-size, --model-args"
        )
    vit = demo_backbone()
    plain, learned = wrap(vit, LifeConfig.from_dict(config.life)), load(demo_folder() / "adapter", vit)
    return _resettled(learned, learned.config.replace(**config.life)) if plain.start == learned.start else plain


# ---- their parts


def _is_folder(model: str) -> bool:
    """A path, or a folder that lies here; timm's names have no separators, and win over folders of other things."""
    if source_of(model):
        return False
    folder = Path(model)
    if folder.name != model or (folder / "adapter.json").is_file():
        return True
    return folder.is_dir() and not timm.is_model(model)


def _built(name: str, config: ModelConfig) -> tuple[Any, Origin]:
    """The backbone with its weights, made for the wanted image size."""
    try:
        return build(name, config.checkpoint, config.pretrained, config.image_size, config.model_args)
    except PatchLifeError:
        raise
    except Exception as error:  # whatever the hub's client and timm raise
        if not (config.pretrained or source_of(name)):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        what = name if source_of(name) else f"timm's weights for {name}"
        raise CheckpointError(f"{what} could not be had ({reason}); {_instead(name)}") from None


def _instead(name: str) -> str:
    """What to do where weights do not come from the hub."""
    if source_of(name) == "local-dir":
        return "the folder must hold config.json and model.safetensors of one model, as timm writes them"
    if source_of(name) == "hf-hub":
        return (
            "is the network up, and is it a timm model? Without network: copy its config.json and model.safetensors "
            "into a folder and give local-dir:FOLDER"
        )
    return "is the network up, and does timm have some? A file will do too: --checkpoint FILE"


def _slimmed(vit: nn.Module, settings: LifeConfig, origin: Origin | None) -> SlimModel:
    model = wrap(vit, settings)
    model.origin = origin
    return model


def _resettled(saved: SlimModel, settings: LifeConfig) -> SlimModel:
    """An adapter's model under other settings."""
    model = SlimModel(saved.backbone, settings, saved.scorer)
    model.origin, model.delta = saved.origin, saved.delta
    if model.start == saved.start:
        return model.use_calibration(saved.calibration) if saved.calibration else model
    if any(True for _ in saved.scorer.parameters()):
        raise ConfigError(f"this adapter's head was fitted to start at block {saved.start}, got {model.start}")
    return model


def _check_sum(folder: Path, origin: Origin, checkpoint: Path) -> None:
    """The backbone's file must be the one that the adapter was made for, to the byte."""
    if not checkpoint.is_file():
        raise CheckpointError(
            f"{folder} needs the backbone {origin.model}, which is not at {checkpoint}; say where it is "
            "now: --checkpoint FILE"
        )
    found = sha256_of(checkpoint)
    if origin.sha256 not in (None, found):
        raise CheckpointError(
            f"{checkpoint} (sha256 {found[:12]}...) is not the backbone that {folder} was made for: "
            f"{origin.checkpoint or origin.model} (sha256 {origin.sha256[:12]}...)"
        )


def _labels_of(vit: Any, path: Path | None) -> Labels:
    """What the user says they are called, or the model itself, or ImageNet."""
    if path:
        return read_labels(path, vit.num_classes)
    names = pretrained_cfg(vit).get("label_names") or ()
    if vit.num_classes and len(names) == vit.num_classes:
        return Labels(tuple(names))
    return imagenet_labels() if vit.num_classes == 1000 else numbered_labels(vit.num_classes)
