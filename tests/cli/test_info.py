"""``patchlife info``: consistent numbers, the same facts in text and JSON, and unsupported models and settings."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize("settings", [["--budget", 0.5], ["--budget", 1], ["--no-merge"], ["--mode", "adaptive"]])
def test_flops_of_the_parts_add_up_to_the_total(settings, patchlife, model):
    result = patchlife("info", *model, *settings, "--json")
    assert result.code == 0
    description = json.loads(result.out)
    flops = description["flops"]
    assert sum(flops["dense_blocks"]) + flops["outside_blocks"] == pytest.approx(flops["dense"], abs=6)
    slimmed = sum(flops["slimmed_blocks"]) + flops["outside_blocks"] + flops["decision"]
    assert slimmed == pytest.approx(flops["slimmed"], abs=6)
    assert (description["model"], description["depth"], description["patches"], description["grid"]) == (
        "test_vit",
        6,
        100,
        [10, 10],
    )
    assert description["kept"][0] == 100
    assert flops["fraction_of_dense"] == pytest.approx(flops["slimmed"] / flops["dense"], abs=1e-4)


def test_the_text_has_the_numbers_of_the_json(patchlife, model):
    description = json.loads(patchlife("info", *model, "--json").out)
    text = patchlife("info", *model).out
    assert "test_vit: VisionTransformer" in text
    assert f"{description['flops']['fraction_of_dense']:.3f} of the dense" in text
    assert f"{description['scorer']}, budget 0.6, fixed mode, merging, restore residual, not calibrated" in text
    assert f"before blocks {', '.join(map(str, description['drops']))}" in text
    assert "100 (10 x 10) of 16 x 16 pixels" in text
    for index, kept in enumerate(description["kept"]):
        assert f"\n{index:>5}  {kept:>7}" in text


def test_the_setting_of_dropped_patches_is_shown(patchlife, model):
    assert "merging, restore residual" in patchlife("info", *model, "--restore", "residual").out


def test_random_weights_are_enough(patchlife):
    result = patchlife("info", "test_vit")
    assert result.code == 0
    assert "random (enough for this description, not for photos)" in result.out


def test_an_uncalibrated_adaptive_model_is_reported(patchlife, model):
    assert "adaptive mode is not calibrated" in patchlife("info", *model, "--mode", "adaptive").out


def test_an_unsupported_model_is_named(patchlife):
    result = patchlife("info", "test_convnext")
    assert (result.code, result.out) == (2, "")
    assert "expected a Vision Transformer of timm, got timm.models.convnext.ConvNeXt" in result.err
    assert "Supported: ViT" in result.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--budget", 0.01], "budget 0.01 is out of reach"),
        (["--start", 9], "start must be a block from 1 to 5"),
        (["--drops", "4,2"], "drops must increase"),
        (["--kept", "100,50"], "kept must be 6 numbers that begin with 100"),
        (["--device", "cpu"], "unrecognized arguments: --device cpu"),
    ],
)
def test_settings_that_the_model_cannot_have(settings, message, patchlife, model):
    result = patchlife("info", *model, *settings)
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1
