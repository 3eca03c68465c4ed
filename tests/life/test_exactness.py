"""The fast runs equal the slow reference that hides dead patches in a full-length run of timm's own code."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, FEW, built, fresh, photos
from reference import distance, masked
from slimmed import MODES, assert_some_die, far_apart, slim

from patchlife import SlimModel

SHAPES = {
    "one drop": {},
    "a drop later than start": {"start": 1, "drops": (3,), "budget": 0.8},
    "from block 1": {"start": 1},
    "every block": {"start": 1, "drops": (1, 2, 3, 4)},
    "the last block only": {"start": 1, "drops": (4,), "budget": 0.9},
    "a smooth schedule": {"survivors": (36, 36, 29, 21, 14)},
    "down to one patch": {"survivors": (36, 36, 20, 20, 1)},
    "a few patches less": {"survivors": (36, 36, 33, 33, 33)},
}


def check(model: SlimModel, images: torch.Tensor, mode: str) -> None:
    """Logits, features and `predict` of ``model`` against the reference, which is not the dense model."""
    vit, lives = model.backbone.vit, model.lives(images)
    assert_some_die(lives, mode)
    logits, features = masked(vit, images, lives.life)
    assert far_apart(logits, vit(images))
    assert distance(model(images), logits) <= 1e-5
    assert distance(model.forward_features(images), features) <= 1e-5
    predicted, told = model.predict(images)
    assert torch.equal(predicted, model(images))
    assert torch.equal(told.life, lives.life)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_two_drops(name: str, mode: str) -> None:
    check(slim(name, mode, drops=(2, 4)), photos(name), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FEW)
def test_any_schedule(name: str, shape: str, mode: str) -> None:
    check(slim(name, mode, **SHAPES[shape]), photos(name), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FEW)
def test_one_image(name: str, mode: str) -> None:
    check(slim(name, mode), photos(name, 1), mode)


@pytest.mark.parametrize("name", ["dynamic", "dynamic-distilled", "dynamic-dinov3", "dynamic-rope-mixed"])
@pytest.mark.parametrize("mode", MODES)
def test_one_dynamic_model_takes_several_sizes(name: str, mode: str) -> None:
    model = slim(name, mode)
    for height, width in [(48, 48), (40, 56), (64, 32), (48, 48)]:
        images = torch.nn.functional.interpolate(photos(name), (height, width), mode="bilinear")
        check(model, images, mode)
        assert model.lives(images).grid == (height // 8, width // 8)


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16(name: str) -> None:
    """Against the reference in bf16 under the same plan, ours is off by what rounding costs, not more."""
    model, images = slim(name, "adaptive", fresh(name).bfloat16(), drops=(2, 4)), photos(name).bfloat16()
    for mode in MODES:
        lives = model.set_mode(mode).lives(images)
        assert_some_die(lives, mode)
        logits, features = masked(model.backbone.vit, images, lives.life)
        rounding = distance(logits.float(), masked(built(name), images.float(), lives.life)[0])
        assert model(images).dtype == torch.bfloat16
        assert distance(model(images).float(), logits.float()) <= max(0.01, 2 * rounding)
        assert distance(model.forward_features(images).float(), features.float()) <= 0.05


@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode: str) -> None:
    """Under autocast, ours and the reference stay as close as bf16 allows."""
    model, images = slim("vit", mode), photos("vit")
    with torch.autocast("cpu", torch.bfloat16):
        lives = model.lives(images)
        ours, theirs = model(images), masked(built("vit"), images, lives.life)[0]
    assert_some_die(lives, mode)
    assert distance(ours.float(), theirs.float()) <= 0.05
