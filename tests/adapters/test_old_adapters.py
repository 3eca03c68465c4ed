"""Adapters that were saved before schedules followed the budget keep their start block and drop points."""

from __future__ import annotations

import json
from pathlib import Path

import patchlife
from patchlife import Shape
from patchlife.runtime.demo_model import demo_backbone

FOLDER = Path(__file__).with_name("demo_of_format_3")
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


def test_an_adapter_of_format_3(tmp_path: Path) -> None:
    """That of the demo, as version 0.1 wrote it before schedules followed the budget."""
    check(patchlife.load(FOLDER, demo_backbone()), FOLDER, tmp_path)
