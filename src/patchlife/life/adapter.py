"""Life adapters on disk: what was decided or learned about a backbone, never the unchanged backbone itself.

A folder of ``adapter.json`` (settings, which backbone), ``adapter.safetensors`` (head, calibration) and
``SHA256SUMS`` (checked before anything is opened; safetensors itself loads flipped bits without a word).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from .. import __version__
from ..backbones import Backbone, Origin, adapt, rebuild
from ..config import LifeConfig
from ..errors import AdapterError
from ..files import check_sums, replace_folder
from .calibration import Calibration
from .change import Change, merged
from .heads import AttentionRule, LifeHead
from .model import SlimModel
from .regressor import LifeRegressor

__all__ = ["FORMAT", "load", "read_adapter", "save"]

FORMAT = 1
HEADS: dict[str, type[LifeHead]] = {head.kind: head for head in (AttentionRule, LifeRegressor)}
_JSON, _TENSORS = "adapter.json", "adapter.safetensors"


def save(model: SlimModel, folder: str | Path) -> Path:
    """Write ``model``'s adapter; an adapter that stands there is replaced in one step or stays whole.

    Raises AdapterError when ``folder`` exists and is something else.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / _JSON).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise AdapterError(f"{folder} exists and is not a patchlife adapter; it was left alone, choose another folder")
    tensors = {f"head.{k}": v for k, v in model.scorer.state_dict().items()}
    if model.calibration is not None:
        tensors |= {f"calibration.{k}": v for k, v in model.calibration.tensors().items()}
    if model.change is not None:
        tensors |= {f"change.{k}": v for k, v in model.change.tensors.items()}
    about = {
        "format": FORMAT,
        "patchlife": __version__,
        "config": model.config.to_dict() | {"start": model.start, "drops": list(model.drops)},
        "head": {"kind": model.scorer.kind, "settings": model.scorer.settings()},
        "calibration_images": model.calibration.images if model.calibration else 0,
        "backbone": model.change.base if model.change else signature(model.backbone),
        "origin": model.origin.to_dict() if model.origin else None,
    }
    with replace_folder(folder) as fresh:
        (fresh / _JSON).write_text(json.dumps(about, indent=2) + "\n")
        (fresh / _TENSORS).write_bytes(to_bytes({k: v.detach().cpu().contiguous() for k, v in tensors.items()}))
    return folder


def load(folder: str | Path, vit: nn.Module | None = None) -> SlimModel:
    """The slimmed model that was saved in ``folder``; a change that it makes to ``vit`` goes into a copy.

    Without ``vit`` the backbone is built again from where it came from (timm name and checkpoint file).

    Raises AdapterError when the adapter is damaged, too new, or was made for another backbone.
    """
    about, tensors = read_adapter(folder)
    if vit is None:
        vit = _rebuild(about, Path(folder))
    backbone = adapt(vit)
    _check_same(about["backbone"], signature(backbone), Path(folder))
    change = _under("change.", tensors)
    if change:
        backbone = adapt(merged(vit, change))
    head = HEADS[about["head"]["kind"]](**about["head"]["settings"])
    head.load_state_dict(_under("head.", tensors))
    head.to(next(vit.parameters()).device)
    model = SlimModel(backbone, LifeConfig.from_dict(about["config"]), head)
    model.origin = Origin(**about["origin"]) if about["origin"] else None
    model.change = Change(change, about["backbone"]) if change else None
    calibration = _under("calibration.", tensors)
    if calibration:
        model.use_calibration(Calibration(**calibration, images=about["calibration_images"]))
    return model


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(what ``adapter.json`` says, tensors), after the checksums were verified.

    Raises AdapterError when the folder is no adapter, is damaged, or was written by a newer patchlife.
    """
    folder = Path(folder)
    if not (folder / _JSON).is_file():
        raise AdapterError(f"{folder} is not a patchlife adapter: it has no {_JSON}")
    files = check_sums(folder, AdapterError)
    if not {_JSON, _TENSORS} <= files.keys():
        raise AdapterError(f"{folder}'s checksums do not cover {_JSON} and {_TENSORS}; save or download it again")
    about = json.loads(files[_JSON].read_text())
    if about["format"] > FORMAT:
        raise AdapterError(
            f"{folder} was written by patchlife {about['patchlife']} in format {about['format']}; this is "
            f"{__version__}, which reads up to format {FORMAT}: pip install -U patchlife"
        )
    if about["head"]["kind"] not in HEADS:
        raise AdapterError(f"{folder} needs a life head of kind {about['head']['kind']!r}; known: {', '.join(HEADS)}")
    return about, load_file(files[_TENSORS])


def signature(backbone: Backbone) -> dict[str, Any]:
    """What tells two backbones apart: architecture, and a few projections of its weights.

    The projections survive a change of dtype or device, and no two trainings share them.
    """
    parameters = dict(backbone.vit.named_parameters())
    picked = [
        n
        for n in parameters
        if n.endswith(("qkv.weight", "q_proj.weight", "in_proj.weight", "patch_embed.proj.weight"))
    ]
    return {
        "name": (backbone.vit.pretrained_cfg or {}).get("architecture"),
        "family": backbone.family,
        "depth": backbone.depth,
        "dim": backbone.dim,
        "prefix": backbone.prefix,
        "patch_size": list(backbone.patch_size),
        "weights": {name: _projection(parameters[name]) for name in (picked[0], picked[len(picked) // 2], picked[-1])},
    }


def _projection(weight: Tensor) -> float:
    """The weight's component along a fixed direction, relative to its length: about N(0, 1) for a random weight."""
    flat = weight.detach().double().cpu().flatten()
    direction = torch.arange(len(flat), dtype=torch.double).mul(math.e).sin()
    return round(float(flat @ direction / flat.norm() / direction.norm() * len(flat) ** 0.5), 4)


def _check_same(saved: dict[str, Any], found: dict[str, Any], folder: Path) -> None:
    for key in ("depth", "dim", "prefix", "patch_size", "family"):
        if saved[key] != found[key]:
            raise AdapterError(
                f"{folder} is for {saved['name'] or saved['family']} ({key} {saved[key]}), this backbone is "
                f"{found['name'] or found['family']} ({key} {found[key]})"
            )
    for name, value in saved["weights"].items():
        if not abs(found["weights"].get(name, math.inf) - value) < 0.05:
            raise AdapterError(
                f"{folder} was made for other weights of {saved['name'] or saved['family']}: {name} differs; load the "
                "checkpoint it was fitted on, or fit a new adapter"
            )


def _rebuild(about: dict[str, Any], folder: Path) -> nn.Module:
    origin = about["origin"]
    if origin is None:
        raise AdapterError(f"{folder} does not know where its backbone comes from; pass the model: load(folder, vit)")
    if origin["checkpoint"] and not Path(origin["checkpoint"]).is_file():
        raise AdapterError(
            f"{folder} needs the backbone {origin['model']} from {origin['checkpoint']}, which is not there; "
            "give its place with --checkpoint, or pass the model: load(folder, vit)"
        )
    return rebuild(Origin(**origin))


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
