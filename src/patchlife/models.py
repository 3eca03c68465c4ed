"""From what a user calls MODEL to a slimmed model that is ready to see photos.

MODEL is a timm name, the folder of a life adapter, or ``demo``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import nn

from .backbones import Origin, adapt, build, pretrained_cfg
from .config import Device, LifeConfig, ModelConfig
from .errors import AdapterError, CheckpointError, ConfigError, PatchLifeError
from .files import sha256_of
from .images import Preprocess
from .labels import Labels, imagenet_labels, numbered_labels, read_labels
from .life import SlimModel, wrap

__all__ = ["DEMO", "ReadyModel", "demo_backbone", "demo_folder", "open_model", "pick_device"]

DEMO = "demo"


@dataclass(frozen=True)
class ReadyModel:
    """A slimmed model with all that it takes to run it on photos.

    Attributes:
        name: what it is called: a timm name, or demo.
        model: slimmed, in eval mode, on its device.
        preprocess: what it wants to see.
        labels: what its answers are called.
    """

    name: str
    model: SlimModel
    preprocess: Preprocess
    labels: Labels

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


def open_model(config: ModelConfig, device: Device = "cpu", random_weights: bool = False) -> ReadyModel:
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
    preprocess = replace(Preprocess.from_timm_cfg(pretrained_cfg(vit)), size=model.backbone.image_size)
    name = pretrained_cfg(vit).get("architecture") or type(vit).__name__
    return ReadyModel(name, model.to(where).eval(), preprocess, _labels_of(vit, config.labels))


def pick_device(device: Device) -> torch.device:
    """The device that a user means. Raises ConfigError if this machine has none of that kind."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return torch.device("cuda" if there["cuda"] else "cpu")
    if not there[device]:
        found = ", ".join(name for name, usable in there.items() if usable)
        raise ConfigError(f"torch finds no {device} device here, it finds {found}; choose --device auto")
    return torch.device(device)


def demo_folder() -> Path:
    """The embedded model and its photos."""
    return Path(str(files(__package__) / "assets" / "demo"))


# ---- the three kinds of MODEL


def _open_timm(config: ModelConfig, random_weights: bool) -> SlimModel:
    if not (config.checkpoint or config.pretrained or random_weights) and timm.is_model(config.model):
        raise ConfigError(
            f"{config.model} would have random weights; give some with --checkpoint FILE, or fetch timm's "
            "with --pretrained"
        )
    vit, origin = _built(config.model, config)
    return _slimmed(vit, LifeConfig.from_dict(config.life), origin)


def _open_adapter(config: ModelConfig) -> SlimModel:
    """An adapter on the backbone that it names; weights from elsewhere must be the same ones."""
    from .life.adapter import load, read_adapter

    folder = Path(config.model)
    about, _ = read_adapter(folder)
    if not (about["origin"] or about["backbone"]["name"]):
        raise AdapterError(f"{folder} does not name its backbone; in Python: patchlife.load({str(folder)!r}, vit)")
    origin = Origin(**about["origin"]) if about["origin"] else Origin(about["backbone"]["name"])
    checkpoint = config.checkpoint or (Path(origin.checkpoint) if origin.checkpoint else None)
    if checkpoint:
        _check_sum(folder, origin, checkpoint)
    pretrained = not checkpoint and (origin.pretrained or config.pretrained)
    size = config.image_size or origin.options.get("img_size")
    vit, _ = _built(origin.model, replace(config, checkpoint=checkpoint, pretrained=pretrained, image_size=size))
    saved = load(folder, vit)
    if not config.life:
        return saved
    return _resettled(saved, saved.config.replace(**config.life))


def _open_demo(config: ModelConfig) -> SlimModel:
    """The embedded model with the lives it learned; with the rule where patches shall begin to die elsewhere."""
    from .life.adapter import load

    if config.checkpoint or config.pretrained or config.image_size:
        raise ConfigError("demo brings its own weights and image size; drop --checkpoint, --pretrained, --image-size")
    vit = demo_backbone()
    plain, learned = wrap(vit, LifeConfig.from_dict(config.life)), load(demo_folder() / "adapter", vit)
    return _resettled(learned, learned.config.replace(**config.life)) if plain.start == learned.start else plain


def demo_backbone() -> nn.Module:
    """The embedded Vision Transformer, in eval mode; raises CheckpointError if it is not as it was shipped."""
    folder = demo_folder()
    try:
        about = json.loads((folder / "model.json").read_text("utf-8"))
        weights = folder / about["weights"]["file"]
        intact = sha256_of(weights) == about["weights"]["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the demo's model in {folder} is incomplete ({error}); reinstall patchlife") from None
    if not intact:
        raise CheckpointError(f"{weights} is damaged: its sha256 is not the one in model.json; reinstall patchlife")
    vit: Any = timm.models.VisionTransformer(**about["architecture"])
    vit.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    looks = {**about["input"], "input_size": about["input"]["size"]}
    vit.pretrained_cfg = {"architecture": DEMO, "label_names": about["classes"], **looks}
    return vit.eval()


# ---- their parts


def _is_folder(model: str) -> bool:
    """A path, or a folder that lies here; timm's names have no separators, and win over folders of other things."""
    folder = Path(model)
    if folder.name != model or (folder / "adapter.json").is_file():
        return True
    return folder.is_dir() and not timm.is_model(model)


def _built(name: str, config: ModelConfig) -> tuple[Any, Origin]:
    """The backbone with its weights, made for the wanted image size."""
    try:
        vit, origin = build(name, config.checkpoint, config.pretrained)
    except PatchLifeError:
        raise
    except Exception as error:  # whatever the hub's client and timm raise
        if not config.pretrained:
            raise
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"timm's weights for {name} could not be had ({reason}); is the network up, and does timm have "
            "some? A file will do too: --checkpoint FILE"
        ) from None
    if config.image_size:
        _resize(vit, config.image_size)
        origin = replace(origin, options={**origin.options, "img_size": config.image_size})
    return vit, origin


def _resize(vit: Any, side: int) -> None:
    """Make the backbone take photos of another size; timm interpolates its positions."""
    rows, cols = adapt(vit).patch_size
    if side % rows or side % cols:
        raise ConfigError(f"image_size must be a multiple of the patches' {rows} x {cols} pixels, got {side}")
    vit.set_input_size(img_size=(side, side))


def _slimmed(vit: nn.Module, settings: LifeConfig, origin: Origin | None) -> SlimModel:
    model = wrap(vit, settings)
    model.origin = origin
    return model


def _resettled(saved: SlimModel, settings: LifeConfig) -> SlimModel:
    """An adapter's model under other settings."""
    model = SlimModel(saved.backbone, settings, saved.scorer)
    model.origin, model.change = saved.origin, saved.change
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
