"""The measuring scripts of transformers' models run from end to end at tiny sizes."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import patchlife

pytest.importorskip("transformers")
SCRIPTS = Path(__file__).parents[2] / "bench"


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # set by the script; restored after the test
    return importlib.import_module(request.param)


def result_of(script: Any, path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [script.__name__, "--tiny", "--rounds", "5", "--out", str(path), *options])
    script.main()
    return json.loads(path.read_text())


@pytest.mark.parametrize("script", ["transformers_bound"], indirect=True)
def test_the_bound_is_measured_beside_timm(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = result_of(script, tmp_path / "result.json", monkeypatch, "--batches", "1", "2")
    one, two = result["runs"]
    assert (one["conditions"]["batch"], two["conditions"]["batch"]) == (1, 2)
    assert {"transformers", "torch", "timm", "threads", "cpu"} <= one["conditions"].keys()
    assert one["ratios"].keys() == one["seconds"].keys()
    assert [row["target"] for row in one["targets"]] == [">= 0.95", ">= 0.95", None, None]
    assert "slices / bound, throughput" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["transformers_bound"], indirect=True)
def test_the_bound_runs_each_layer_on_the_patches_of_the_schedule(script: Any) -> None:
    model, images = script.transformers_model(script.TINY), torch.randn(2, 3, 64, 64)
    kept, seen = script.slimmed(model, 0.6, merge=False).schedule().kept, []
    with torch.no_grad():
        assert torch.equal(script.no_decision_bound(model, (16,) * 4, images), model(images).logits)
        for layer in model.vit.layers:
            layer.register_forward_pre_hook(lambda _, args: seen.append((args[0].shape[1], args[0].is_contiguous())))
        script.no_decision_bound(model, kept, images)
    assert kept[-1] < 16
    assert seen == [(1 + n, True) for n in kept]


@pytest.mark.parametrize("script", ["transformers_bound"], indirect=True)
def test_both_libraries_have_weights_of_the_same_shapes(script: Any) -> None:
    count = [
        sum(p.numel() for p in make(script.TINY).parameters())
        for make in (script.transformers_model, script.timm_model)
    ]
    assert count[0] == count[1]


@pytest.mark.parametrize("script", ["vision_language"], indirect=True)
def test_encoders_and_the_whole_model_are_measured(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--parts", "encoders", "whole", "--budgets", "0.6", "--new-tokens", "2"]
    result = result_of(script, tmp_path / "result.json", monkeypatch, *options)
    assert [one["conditions"]["encoder"] for one in result["encoders"]] == list(script.ENCODERS)
    siglip = result["encoders"][0]
    assert siglip["conditions"]["patches"] == 36
    assert 0.58 < siglip["conditions"]["gflops"]["budget 0.6"]["fraction"] <= 0.6
    assert siglip["seconds"].keys() == {"dense", "budget 0.6", "budget 0.6, no-decision bound"}
    whole = result["whole"][0]
    assert whole["conditions"]["prompt_tokens"] == 36 + 32
    assert all(0 < share < 1 for share in whole["encoder_share_of_time"].values())
    assert "encoder share of time, dense" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["vision_language"], indirect=True)
def test_patches_and_flops_at_real_shapes_are_those_counted_by_hand(script: Any) -> None:
    shapes, _ = script.shapes(tiny=False)
    counted = []
    for shape in shapes.values():
        with torch.device("meta"):  # FLOPs need no weights
            encoder = script.encoder(shape)
        model = patchlife.wrap(encoder)
        patches, width = (shape["image_size"] // 14) ** 2, shape["hidden_size"]
        tokens = patches + model.backbone.prefix
        layer = 2 * tokens * (4 * width**2 + 2 * width * shape["intermediate_size"]) + 4 * tokens**2 * width
        by_hand = shape["num_hidden_layers"] * layer + 2 * patches * 3 * 14**2 * width
        assert patchlife.flops(model).dense == pytest.approx(by_hand, rel=0.005)
        counted.append(patches)
    assert counted == [729, 576]
