"""Adapters that were saved before schedules followed the budget keep their start block and drop points."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
from safetensors.torch import load_file

import patchlife
from patchlife import Shape
from patchlife.runtime.demo_model import demo_backbone, demo_folder

ROOT = Path(__file__).parents[2]
BUDGETS = (0.35, 0.5, 0.8, 1.0)


def check(model: patchlife.SlimModel, folder: Path, tmp_path: Path) -> None:
    saved = json.loads((folder / "adapter.json").read_text())
    config = saved["config"]
    assert model.shapes == (Shape(1.0, tuple(config["drops"])),)
    for budget in BUDGETS:
        model.set_budget(budget)
        assert (model.start, list(model.drops)) == (config["start"], config["drops"])
        assert model.calibration.images == saved["calibrations"]["196"]
    again = json.loads((patchlife.save(model, tmp_path / "again") / "adapter.json").read_text())
    kept = ("format", "calibrations")
    assert [again[name] for name in kept] == [saved[name] for name in kept]
    assert (again["config"]["start"], again["config"]["drops"]) == (config["start"], config["drops"])


def test_the_demos_adapter(tmp_path: Path) -> None:
    check(patchlife.load(demo_folder() / "adapter", demo_backbone()), demo_folder() / "adapter", tmp_path)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["adapter", "head"])
def test_the_adapters_of_the_recipe(name: str, shared: Path, tmp_path: Path) -> None:
    vit = timm.create_model("vit_tiny_patch16_224").eval()
    vit.load_state_dict(load_file(shared / "weights" / "vit_tiny_patch16_224.safetensors"))
    folder = ROOT / "recipes" / "vit_tiny" / name
    check(patchlife.load(folder, vit), folder, tmp_path)
