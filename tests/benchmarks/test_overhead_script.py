"""`bench/overhead.py` runs from end to end at tiny sizes."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "bench"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, with models of few channels and images of 4 x 4 patches."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # set by the script; restored after the test
    module = importlib.import_module("overhead")
    model, images = module.backbone_model, module.random_images
    monkeypatch.setattr(module, "backbone_model", lambda name, *_: model(name, pixels_of(name), True))
    monkeypatch.setattr(module, "random_images", lambda batch, pixels: images(batch, 56 if pixels % 16 else 64))
    return module


def pixels_of(name: str) -> int:
    """Of an image with 4 x 4 patches."""
    return 56 if "patch14" in name else 64


def result_of(script: Any, path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["overhead.py", "--rounds", "5", "--out", str(path), *options])
    script.main()
    return json.loads(path.read_text())["runs"]


def test_all_runs_of_a_model_are_measured(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--models", "deit_tiny_patch16_224", "--batches", "1", "16", "--patience", "0")
    one, sixteen = result_of(script, tmp_path / "overhead.json", monkeypatch, *options)
    expected = {script.BOUND, "dense", *script.OURS, "decision", "decision, learned scorer"}
    expected |= {f"{mode} {kind}" for mode in ("uneven", "adaptive") for kind in ("slices", "merging")}
    assert one["seconds"].keys() == expected
    assert [row["target"] for row in one["targets"]] == [">= 0.95"]
    assert [row["target"] for row in sixteen["targets"]] == [">= 0.98", ">= 0.93", "<= 0.015", "<= 0.015"]
    assert "slices / no-decision bound, throughput" in capsys.readouterr().out


def test_each_run_of_a_case_has_its_target(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = result_of(script, tmp_path / "cases.json", monkeypatch, "--cases", "dinov2-s-518")
    assert [record["conditions"]["run"] for record in records] == ["dense", *script.OURS]
    assert {record["conditions"]["threads"] for record in records} == {1}
    targets = [[row["target"] for row in record["targets"]] for record in records]
    assert targets == [[], [">= 0.97"], [">= 0.97"], [">= 0.98"], [">= 0.98"]]
    for record in records[1:]:
        ratio, row = record["ratios"][record["conditions"]["run"]]["median"], record["targets"][0]
        assert row["measured"] == pytest.approx(ratio, abs=1e-4)
        assert row["met"] == (ratio >= float(row["target"].removeprefix(">= ")))
    shown = capsys.readouterr().out
    assert "| dinov2-s-518 | 1 | slices, learned scorer |" in shown
    assert "| met |" in shown or "| missed |" in shown


def test_threads_are_as_before_after_a_case(script: Any) -> None:
    before = torch.get_num_threads()
    with script.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_every_case_has_a_target_for_every_run_of_ours(script: Any) -> None:
    assert {name for name in script.TARGETS if not name.startswith("batch ")} == set(script.CASES)
    for name in script.CASES:
        assert set(script.TARGETS[name]) == {(run, script.BOUND) for run in script.OURS}
