"""Describe an adapter's backbone anew, as this version of patchlife does: nothing is learned, no weight changes.

python recipes/resign.py ADAPTER BACKBONE      BACKBONE: the safetensors file that it was fitted on, or demo

For adapters of format 1, and for those whose backbone is described in other words since. The weights must be the same.
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

from patchlife.backbones import Origin, adapt, build, signature
from patchlife.backbones.identity import differences
from patchlife.config import LifeConfig
from patchlife.errors import AdapterError
from patchlife.files import check_sums, sha256_of
from patchlife.life import AttentionRule, Calibration, SlimModel
from patchlife.life.adapter import FORMAT
from patchlife.life.change import Change, merged
from patchlife.life.regressor import LifeRegressor
from patchlife.models import demo_backbone

SCORERS = {scorer.kind: scorer for scorer in (AttentionRule, LifeRegressor)}


def main(folder: str, backbone: str) -> None:
    files = check_sums(folder, AdapterError)
    about, tensors = json.loads(files["adapter.json"].read_text()), load_file(files["adapter.safetensors"])
    if about["format"] > FORMAT:
        raise SystemExit(f"{folder} is in format {about['format']}, expected {FORMAT} at most; it was left as it is")
    vit = demo_backbone() if backbone == "demo" else _built(about, Path(backbone))
    if about["format"] == 1:
        _check_projections(about, vit)
    else:
        found = signature(adapt(vit))
        if told := differences(found | {"weights": about["backbone"]["weights"]}, found):
            raise SystemExit(f"the adapter was made for other weights: {told[0]}")
    _restored(about, tensors, vit).save(folder)
    print(f"{folder}: format {FORMAT}, for {about['backbone']['name']}")


def _built(about: dict[str, Any], file: Path) -> nn.Module:
    origin = about["origin"]
    if origin is None:
        raise SystemExit("the adapter does not say which timm model it belongs to; sign it in Python: see this script")
    if origin["sha256"] not in (None, sha256_of(file)):
        raise SystemExit(f"{file} is not the file that the adapter was fitted on: its sha256 is another one")
    return build(origin["model"], file, image_size=origin["options"].get("img_size"))[0]


def _check_projections(about: dict[str, Any], vit: nn.Module) -> None:
    """What format 1 knew of the weights: one projection each of three of them."""
    for name, expected in about["backbone"]["weights"].items():
        flat = vit.get_parameter(name).detach().double().flatten()
        direction = torch.arange(len(flat), dtype=torch.double).mul(math.e).sin()
        found = float(flat @ direction / flat.norm() / direction.norm() * len(flat) ** 0.5)
        if not abs(found - expected) < 1e-4:
            raise SystemExit(f"the adapter was made for other weights: {name} differs")


def _restored(about: dict[str, Any], tensors: dict[str, Tensor], vit: nn.Module) -> SlimModel:
    """The model as the adapter holds it."""
    scorer_at = "head" if about["format"] == 1 else "scorer"
    weights, calibration, change = (
        {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        for prefix in (f"{scorer_at}.", "calibration.", "change.")
    )
    scorer = SCORERS[about[scorer_at]["kind"]](**about[scorer_at]["settings"])
    scorer.load_state_dict(weights)
    parts = Change(change, signature(adapt(vit)), about.get("classes")) if change else None
    backbone = adapt(merged(vit, parts.tensors, parts.classes) if parts else vit)
    model = SlimModel(backbone, LifeConfig.from_dict(about["config"]), scorer)
    model.change = parts
    model.origin = Origin(**about["origin"]) if about["origin"] else None
    if calibration:
        model.use_calibration(Calibration(**calibration, images=about["calibration_images"]))
    return model


if __name__ == "__main__":
    main(*sys.argv[1:])
