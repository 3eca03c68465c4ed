"""Loading an adapter: a slimmed model from a folder and the backbone that it was made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..backbones import Origin, adapt, rebuild, signature
from ..backbones.comparison import differences
from ..backbones.gates import ramps_of
from ..backbones.weight_delta import WeightDelta, apply_delta
from ..config import LifeConfig
from ..errors import AdapterError, shortened
from ..io.files import sha256_of
from ..slimming import Calibration, Scorer, SlimModel, slim_model
from .format import calibration_of_name, read_adapter, under
from .scorers import restored_scorer

__all__ = ["load"]


def load(folder: str | Path, vit: nn.Module | None = None, scorer: Scorer | type[Scorer] | None = None) -> SlimModel:
    """The slimmed model that was saved in ``folder``. ``vit`` is not changed: a weight delta is merged into a copy.

    Args:
        folder: as `patchlife.save` wrote it.
        vit: the backbone; if not given, it is built again from its origin (name of the model, and file of its weights).
        scorer: for a scorer that is not one of patchlife's: its class, which is called with the saved settings, or an
            instance, a copy of which gets the saved weights.

    The scorer is frozen and in eval mode; ``model.scorer.requires_grad_(True)`` makes it trainable again.

    Raises AdapterError when the adapter is damaged, of another format, or was made for another backbone or scorer.
    """
    folder = Path(folder)
    manifest, tensors = read_adapter(folder)
    restored = restored_scorer(manifest["scorer"], under("scorer.", tensors), scorer, folder)
    if vit is None:
        vit = _rebuild(manifest, folder)
    backbone, delta = adapt(vit), _delta_of(manifest, under("weight_delta.", tensors))
    _check_same(manifest["backbone"], signature(backbone), delta, folder)
    if delta:
        backbone = adapt(apply_delta(vit, delta.static, delta.classes))
    restored.to(next(vit.parameters()).device)
    model = slim_model(backbone, LifeConfig.from_dict(manifest["config"]), restored)
    restored.eval().requires_grad_(False)
    model.origin = Origin(**manifest["origin"]) if manifest["origin"] else None
    model.use_delta(delta)
    model.tuning = manifest.get("tuning")
    for name, images in manifest["calibrations"].items():
        patches, start = calibration_of_name(name)
        tables = under(f"calibration.{name}.", tensors)
        model.use_calibration(Calibration(**tables, images=images, patches=patches), start)
    return model


def _delta_of(manifest: dict[str, Any], tensors: dict[str, Any]) -> WeightDelta | None:
    if not tensors and manifest["classes"] is None:
        return None
    return WeightDelta(tensors, manifest["backbone"], manifest["classes"], ramps_of(manifest.get("gates")))


def _check_same(saved: dict[str, Any], found: dict[str, Any], delta: WeightDelta | None, folder: Path) -> None:
    """Raise AdapterError unless the backbone is the one that the adapter was made for."""
    differing = differences(saved, found, ignored=delta.replaced if delta else ())
    if not differing:
        return
    name = saved["name"] or saved["family"]
    if all(part.endswith("has other values") for part in differing):
        raise AdapterError(
            f"{folder} was made for other weights of {name}: {shortened(differing)}; load the checkpoint that it was "
            "fitted on, or fit a new adapter"
        )
    raise AdapterError(
        f"{folder} is for {name} and does not fit: this backbone is {found['name'] or found['family']} "
        f"({shortened(differing)})"
    )


def _rebuild(manifest: dict[str, Any], folder: Path) -> nn.Module:
    """The backbone, built again. Raises AdapterError if its origin is not known or its file is another one."""
    origin = manifest["origin"]
    if origin is None:
        raise AdapterError(f"{folder} does not record the origin of its backbone; pass the model: load(folder, vit)")
    file = origin["checkpoint"]
    if not file and not origin["pretrained"]:
        raise AdapterError(
            f"{folder} needs the backbone {origin['model']} and does not record where its weights are; "
            "pass the model: load(folder, vit)"
        )
    if file and not Path(file).is_file():
        raise AdapterError(
            f"{folder} needs the backbone {origin['model']} from {file}, which is not there; "
            "give its place with --checkpoint, or pass the model: load(folder, vit)"
        )
    if file and origin["sha256"] not in (None, sha256_of(file)):
        raise AdapterError(
            f"{file} is not the file that {folder} was made for (sha256 {origin['sha256'][:12]}..., found "
            f"{sha256_of(file)[:12]}...); restore that file, or pass the model: load(folder, vit)"
        )
    return rebuild(Origin(**origin))
