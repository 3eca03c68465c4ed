"""`patchlife eval` in an engine, or on an exported package: the numbers are the model's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small as photos_and_weights
import torch

from patchlife import LifeConfig
from patchlife.cli.main import main
from patchlife.runtime import eager_engine
from patchlife.runtime import exported as pipeline


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("desk")
    photos_and_weights.checkpoint(folder / "vit.safetensors")
    photos_and_weights.write_photos(folder / "photos" / "3", 3)
    photos_and_weights.write_photos(folder / "photos" / "5", 2, first=3)
    return folder


def _eval(desk: Path, out: Path, *said: str, budgets: str = "1.0,0.7") -> dict:
    words = [photos_and_weights.NAME, "--checkpoint", str(desk / "vit.safetensors")] if "--engine" in said else []
    assert main(["eval", *words, *said, str(desk / "photos"), "--budgets", budgets, "--out", str(out)]) == 0
    return json.loads(out.read_text())


def _same(engine: dict, eager: dict) -> None:
    for a, b in zip(engine["scores"], eager["scores"], strict=True):
        for key in ("budget", "mode", "flops", "top1", "top5", "drop", "drop_interval", "agreement"):
            assert a[key] == b[key], key
        assert a["divergence"] == pytest.approx(b["divergence"], abs=1e-4)


def test_scores_in_an_engine_are_the_models_own(desk, tmp_path, monkeypatch):
    made = []

    def in_torch(model, *_):
        made.append(model.config.budget)
        return eager_engine(model)

    monkeypatch.setattr(pipeline, "cached_engine", in_torch)
    eager = _eval(desk, tmp_path / "a.json", "--engine", "eager")
    onnx = _eval(desk, tmp_path / "b.json", "--engine", "onnx")
    _same(onnx, eager)
    assert (eager["engine"], onnx["engine"]) == ("eager", "onnx")
    assert made == [1.0, 0.7], "each budget once, no other"


def test_engines_take_fixed_mode_only(desk, capsys):
    words = ["eval", photos_and_weights.NAME, str(desk / "photos")]
    assert main([*words, "--engine", "onnx", "--modes", "fixed,adaptive"]) == 2
    assert "--engine onnx runs fixed mode only, got adaptive" in capsys.readouterr().err


@pytest.mark.slow
def test_a_package_brings_its_dense_model(desk, tmp_path, capsys):
    package = tmp_path / "package"
    words = [photos_and_weights.NAME, "--checkpoint", str(desk / "vit.safetensors")]
    assert main(["export", *words, "--budgets", "1.0,0.7", "--out", str(package)]) == 0
    found = _eval(desk, tmp_path / "a.json", str(package))
    _same(found, _eval(desk, tmp_path / "b.json", "--engine", "eager"))
    assert found["engine"] == "onnx"
    assert found["conditions"]["onnxruntime"]
    capsys.readouterr()
    for said, message in {
        ("--budgets", "1.0,0.5"): "holds the budgets 1, 0.7, got 0.5",
        ("--engine", "onnx"): "drop --engine",
        ("--modes", "adaptive"): "runs fixed mode only, got adaptive",
    }.items():
        assert main(["eval", str(package), str(desk / "photos"), "--budgets", "1.0,0.7", *said]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_of_one_budget_has_no_dense_model(desk, tmp_path, capsys):
    file = tmp_path / "vit.pt2"
    words = [photos_and_weights.NAME, "--checkpoint", str(desk / "vit.safetensors"), "--budget", "0.7"]
    assert main(["export", *words, "--format", "torch", "--out", str(file)]) == 0
    assert main(["eval", str(file), str(desk / "photos")]) == 2
    assert "open it with --trust" in capsys.readouterr().err
    assert main(["eval", str(file), str(desk / "photos"), "--trust"]) == 2
    said = capsys.readouterr().err
    assert "eval compares with the dense model" in said
    assert "patchlife predict --labelled" in said


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["compile", "onnx", "openvino"])
def test_real_engines(desk, tmp_path, monkeypatch, engine):
    monkeypatch.setenv("PATCHLIFE_CACHE", str(tmp_path / "cache"))
    torch.compiler.reset()
    eager = _eval(desk, tmp_path / "a.json", "--engine", "eager")
    _same(_eval(desk, tmp_path / "b.json", "--engine", engine), eager)


def test_a_schedule_is_not_taken_for_a_budget_and_comes_back():
    asked, config = [], LifeConfig(kept=(36, 36, 20, 10, 5))
    model = pipeline.EngineClassifier(lambda settings: asked.append(settings) or "engine", config, {})
    with model.temporarily():
        for budget in (0.6, 0.8, 0.6):  # 0.6 is the default beside which the schedule stands
            assert model.set_budget(budget).engine == "engine"
    assert asked == [LifeConfig(budget=0.6), LifeConfig(budget=0.8)]
    assert model.config is config
    assert model.engine == "engine"
    assert asked[2:] == [config]
