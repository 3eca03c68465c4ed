"""Adapters that were saved before schedules followed the budget keep their start block and drop points."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path

import patchlife
from patchlife import Shape
from patchlife.runtime.demo_model import demo_backbone, demo_folder

FOLDER = Path(__file__).with_name("demo_of_format_3")
FILES = ("adapter.json", "adapter.safetensors")
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


def of_the_present_demo(folder: Path, tmp_path: Path) -> Path:
    """A copy of an adapter of an earlier demo model; its weights' identity is that of the present one."""
    copy = Path(shutil.copytree(folder, tmp_path / "adapter"))
    saved, present = (json.loads((at / "adapter.json").read_text()) for at in (folder, demo_folder() / "adapter"))
    saved["backbone"]["weights"] = present["backbone"]["weights"]
    (copy / "adapter.json").write_text(json.dumps(saved))
    sums = [f"{sha256((copy / name).read_bytes()).hexdigest()}  {name}\n" for name in FILES]
    (copy / "SHA256SUMS").write_text("".join(sums))
    return copy


def test_an_adapter_of_format_3(tmp_path: Path) -> None:
    """That of the demo, as version 0.1 wrote it before schedules followed the budget."""
    folder = of_the_present_demo(FOLDER, tmp_path)
    check(patchlife.load(folder, demo_backbone()), folder, tmp_path)
