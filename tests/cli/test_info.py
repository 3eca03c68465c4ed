"""``patchlife info``: the facts, that they agree with each other, and what is said about what does not work."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize("settings", [["--budget", 0.5], ["--budget", 1], ["--no-merge"], ["--mode", "adaptive"]])
def test_the_parts_make_the_whole(settings, patchlife, model):
    said = patchlife("info", *model, *settings, "--json")
    assert said.code == 0
    about = json.loads(said.out)
    flops = about["flops"]
    assert sum(flops["dense_blocks"]) + flops["outside_blocks"] == pytest.approx(flops["dense"], abs=6)
    slimmed = sum(flops["slimmed_blocks"]) + flops["outside_blocks"] + flops["decision"]
    assert slimmed == pytest.approx(flops["slimmed"], abs=6)
    assert (about["model"], about["depth"], about["patches"], about["grid"]) == ("test_vit", 6, 100, [10, 10])
    assert about["kept"][0] == 100
    assert flops["fraction_of_dense"] == pytest.approx(flops["slimmed"] / flops["dense"], abs=1e-4)


def test_the_text_says_what_the_numbers_say(patchlife, model):
    about = json.loads(patchlife("info", *model, "--json").out)
    text = patchlife("info", *model).out
    assert "test_vit: VisionTransformer" in text
    assert f"{about['flops']['fraction_of_dense']:.3f} of the dense" in text
    assert "100 (10 x 10) of 16 x 16 pixels" in text
    for index, kept in enumerate(about["kept"]):
        assert f"\n{index:>5}  {kept:>7}" in text


def test_random_weights_will_do(patchlife):
    said = patchlife("info", "test_vit")
    assert said.code == 0
    assert "random (fine for this, not for photos)" in said.out


def test_an_uncalibrated_adaptive_model_says_so(patchlife, model):
    assert "adaptive mode is not calibrated" in patchlife("info", *model, "--mode", "adaptive").out


def test_why_a_model_is_not_supported(patchlife):
    said = patchlife("info", "test_convnext")
    assert (said.code, said.out) == (2, "")
    assert "expected a Vision Transformer of timm, got timm.models.convnext.ConvNeXt" in said.err
    assert "Supported: ViT" in said.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--budget", 0.01], "budget 0.01 is out of reach"),
        (["--start", 9], "start must be a block from 1 to 5"),
        (["--drops", "4,2"], "drops must rise"),
        (["--kept", "100,50"], "kept must be 6 numbers that begin with 100"),
        (["--device", "cpu"], "unrecognized arguments: --device cpu"),
    ],
)
def test_settings_that_do_not_fit(settings, message, patchlife, model):
    said = patchlife("info", *model, *settings)
    assert said.code == 2
    assert message in said.err
    assert said.err.count("\n") == 1
