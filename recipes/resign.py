"""Bring an adapter of format 1 to format 2: nothing is learned anew, the backbone is described by all of its weights.

python recipes/resign.py ADAPTER BACKBONE      BACKBONE: the safetensors file that it was fitted on, or demo
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import patchlife
from patchlife.backbones import Origin, adapt, rebuild, signature
from patchlife.backbones.weight_delta import Change, merged
from patchlife.config import LifeConfig
from patchlife.errors import AdapterError
from patchlife.io.files import check_sums, sha256_of
from patchlife.runtime.opening import demo_backbone
from patchlife.slimming import AttentionRule, Calibration, SlimModel
from patchlife.slimming.regressor import LifeRegressor


def main(folder: str, backbone: str) -> None:
    files = check_sums(folder, AdapterError)
    about, tensors = json.loads(files["adapter.json"].read_text()), load_file(files["adapter.safetensors"])
    if about["format"] != 1:
        raise SystemExit(f"{folder} is in format {about['format']}, expected 1; it was left as it is")
    vit = demo_backbone() if backbone == "demo" else _built(about, Path(backbone))
    _check_projections(about, vit)
    model = _restored(about, tensors, vit)
    patchlife.save(model, folder)
    print(f"{folder}: format 2, for {about['backbone']['name']}")


def _built(about: dict[str, Any], file: Path) -> nn.Module:
    origin = about["origin"]
    if origin is None:
        raise SystemExit("the adapter does not say which timm model it belongs to; sign it in Python: see this script")
    if origin["sha256"] not in (None, sha256_of(file)):
        raise SystemExit(f"{file} is not the file that the adapter was fitted on: its sha256 is another one")
    return rebuild(Origin(**origin), file)


def _check_projections(about: dict[str, Any], vit: nn.Module) -> None:
    """What format 1 knew of the weights: one projection each of three of them."""
    for name, expected in about["backbone"]["weights"].items():
        flat = vit.get_parameter(name).detach().double().flatten()
        direction = torch.arange(len(flat), dtype=torch.double).mul(math.e).sin()
        found = float(flat @ direction / flat.norm() / direction.norm() * len(flat) ** 0.5)
        if not abs(found - expected) < 1e-4:
            raise SystemExit(f"the adapter was made for other weights: {name} differs")


def _restored(about: dict[str, Any], tensors: dict[str, Tensor], vit: nn.Module) -> SlimModel:
    """The model as format 1 held it."""
    head, calibration, change = (
        {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        for prefix in ("head.", "calibration.", "change.")
    )
    scorer = {kind.kind: kind for kind in (AttentionRule, LifeRegressor)}[about["head"]["kind"]](
        **about["head"]["settings"]
    )
    scorer.load_state_dict(head)
    model = SlimModel(adapt(merged(vit, change) if change else vit), LifeConfig.from_dict(about["config"]), scorer)
    model.change = Change(change, signature(adapt(vit))) if change else None
    model.origin = Origin(**about["origin"]) if about["origin"] else None
    if calibration:
        rows, cols = model.backbone.grid
        model.use_calibration(Calibration(**calibration, images=about["calibration_images"], patches=rows * cols))
    return model


if __name__ == "__main__":
    main(*sys.argv[1:])
