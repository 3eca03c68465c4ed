"""`patchlife eval` with an engine, or on an exported bundle, gives the numbers of the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small as photos_and_weights
import torch

from patchlife import LifeConfig
from patchlife.cli.main import main
from patchlife.export import on_the_fly
from patchlife.runtime import eager_engine
from patchlife.runtime.exported import EngineClassifier


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("desk")
    photos_and_weights.checkpoint(folder / "vit.safetensors")
    photos_and_weights.write_photos(folder / "photos" / "3", 3)
    photos_and_weights.write_photos(folder / "photos" / "5", 2, first=3)
    return folder


def _eval(desk: Path, out: Path, *options: str, budgets: str = "1.0,0.7") -> dict:
    words = [photos_and_weights.NAME, "--checkpoint", str(desk / "vit.safetensors")] if "--engine" in options else []
    assert main(["eval", *words, *options, str(desk / "photos"), "--budgets", budgets, "--out", str(out)]) == 0
    return json.loads(out.read_text())


def _assert_same(engine: dict, eager: dict) -> None:
    for a, b in zip(engine["scores"], eager["scores"], strict=True):
        for key in ("budget", "mode", "flops", "top1", "top5", "drop", "drop_interval", "agreement"):
            assert a[key] == b[key], key
        assert a["divergence"] == pytest.approx(b["divergence"], abs=1e-4)


def test_scores_with_an_engine_are_those_of_the_model(desk, tmp_path, monkeypatch):
    exported = []

    def in_torch(model, *_):
        exported.append(model.settings.budget)
        return eager_engine(model)

    monkeypatch.setattr(on_the_fly, "cached_engine", in_torch)
    eager = _eval(desk, tmp_path / "a.json", "--engine", "eager")
    onnx = _eval(desk, tmp_path / "b.json", "--engine", "onnx")
    _assert_same(onnx, eager)
    assert (eager["engine"], onnx["engine"]) == ("eager", "onnx")
    assert exported == [1.0, 0.7], "each budget once, no other"


def test_engines_take_fixed_mode_only(desk, capsys):
    words = ["eval", photos_and_weights.NAME, str(desk / "photos")]
    assert main([*words, "--engine", "onnx", "--modes", "fixed,adaptive"]) == 2
    assert "--engine onnx runs fixed mode only, got adaptive" in capsys.readouterr().err


@pytest.mark.slow
def test_a_bundle_with_budget_1_has_its_own_dense_model(desk, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    words = [photos_and_weights.NAME, "--checkpoint", str(desk / "vit.safetensors")]
    assert main(["export", *words, "--budgets", "1.0,0.7", "--out", str(bundle)]) == 0
    result = _eval(desk, tmp_path / "a.json", str(bundle))
    _assert_same(result, _eval(desk, tmp_path / "b.json", "--engine", "eager"))
    assert result["engine"] == "onnx"
    assert result["conditions"]["onnxruntime"]
    capsys.readouterr()
    for option, message in {
        ("--budgets", "1.0,0.5"): "holds the budgets 1, 0.7, got 0.5",
        ("--engine", "onnx"): "drop --engine",
        ("--modes", "adaptive"): "runs fixed mode only, got adaptive",
    }.items():
        assert main(["eval", str(bundle), str(desk / "photos"), "--budgets", "1.0,0.7", *option]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_of_one_budget_has_no_dense_model(desk, tmp_path, capsys):
    file = tmp_path / "vit.pt2"
    words = [photos_and_weights.NAME, "--checkpoint", str(desk / "vit.safetensors"), "--budget", "0.7"]
    assert main(["export", *words, "--format", "torch", "--out", str(file)]) == 0
    assert main(["eval", str(file), str(desk / "photos")]) == 2
    assert "open it with --trust" in capsys.readouterr().err
    assert main(["eval", str(file), str(desk / "photos"), "--trust"]) == 2
    error = capsys.readouterr().err
    assert "eval compares with the dense model" in error
    assert "patchlife predict --labelled" in error


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["compile", "onnx", "openvino"])
def test_real_engines(desk, tmp_path, monkeypatch, engine):
    monkeypatch.setenv("PATCHLIFE_CACHE", str(tmp_path / "cache"))
    torch.compiler.reset()
    eager = _eval(desk, tmp_path / "a.json", "--engine", "eager")
    _assert_same(_eval(desk, tmp_path / "b.json", "--engine", engine), eager)


def test_a_schedule_differs_from_the_default_budget_and_is_restored():
    requested, config = [], LifeConfig(kept=(36, 36, 20, 10, 5))
    model = EngineClassifier(lambda settings: requested.append(settings) or "engine", config, {})
    with model.temporarily():
        for budget in (0.6, 0.8, 0.6):  # 0.6 is the default, and so the config's budget beside its schedule
            assert model.set_budget(budget).engine == "engine"
    assert requested == [LifeConfig(budget=0.6), LifeConfig(budget=0.8)]
    assert model.settings is config
    assert model.engine == "engine"
    assert requested[2:] == [config]
