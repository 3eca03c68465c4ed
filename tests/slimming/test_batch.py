"""An image's result does not depend on the other images of the batch: their number, order, content or defects."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, FEW, photos
from reference import assert_close
from slim_models import VARIANTS, assert_some_dropped, far_apart, slim
from torch import Tensor

from patchlife import SlimModel, load, wrap
from patchlife.backbones import build
from patchlife.data import Preprocess, read_photo
from patchlife.slimming.coverage import coverage_gain


@pytest.mark.contract("batch")
@pytest.mark.parametrize("variant", ["fixed", "adaptive, merge"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_alone_equals_the_image_in_a_batch(name: str, variant: str) -> None:
    model, images = slim(name, variant), photos(name, 4)
    logits, lives = model.predict(images)
    features = model.forward_features(images)
    assert_some_dropped(lives, variant)
    assert far_apart(logits[0], logits[1])
    for image in (0, 3):
        logits_alone, lives_alone = model.predict(images[image : image + 1])
        assert torch.equal(lives_alone.life[0], lives.life[image])
        assert torch.equal(lives_alone.kept[0], lives.kept[image])
        assert_close(logits_alone[0], logits[image])
        assert_close(model.forward_features(images[image : image + 1])[0], features[image])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FEW)
def test_any_order_and_any_other_images(name: str, variant: str) -> None:
    model, images = slim(name, variant), photos(name, 4)
    logits = model(images)
    assert_close(model(images.flip(0)), logits.flip(0))
    assert_close(model(torch.cat((images[2:], photos(name, 5, seed=9))))[:2], logits[2:])
    assert_close(model(images[[1, 1, 1]]), logits[[1, 1, 1]])


@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FEW)
def test_a_broken_image_does_not_change_the_others(name: str, variant: str, fault: float) -> None:
    model, images = slim(name, variant), photos(name, 4)
    broken = images.clone()
    broken[1, :, 10:20, 10:20] = fault
    logits, lives = model.predict(broken)
    others = [0, 2, 3]
    assert_close(logits[others], model(images)[others])
    assert torch.equal(lives.life[others], model.lives(images).life[others])
    assert not torch.isfinite(logits[1]).all(), "a broken image must not get finite logits"


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_do_not_change_from_run_to_run(variant: str) -> None:
    model, images = slim("vit", variant), photos("vit", 4)
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_empty_batch_gives_empty_results(variant: str) -> None:
    model = slim("vit", variant)
    logits, lives = model.predict(photos("vit")[:0])
    assert logits.shape == (0, 10)
    assert lives.life.shape == (0, 36)


def assert_batch_has_no_effect(model: SlimModel, images: Tensor) -> int:
    """Alone and in a batch an image has the same lives, and logits equal up to rounding.

    Returns the number of places in the order of patches that differ. They are within one life.
    """
    differing = 0
    plan, (logits, lives) = model.plan(images), model.predict(images)
    for image in range(len(images)):
        alone = images[image : image + 1]
        logits_alone, lives_alone = model.predict(alone)
        differing += int((model.plan(alone).order[0] != plan.order[image]).sum())
        assert torch.equal(lives_alone.life[0], lives.life[image])
        assert_close(logits_alone[0], logits[image], 1e-4)
    return differing


@pytest.mark.parametrize("variant", ["fixed, merge", "adaptive, merge"])
@pytest.mark.parametrize("name", ["vit", "siglip", "dinov3"])
def test_rounding_does_not_change_the_order(name: str, variant: str) -> None:
    """Gains are small differences of nearly equal numbers; as differences of sums they would be rounding noise."""
    assert not assert_batch_has_no_effect(slim(name, variant), photos(name, 48))


@pytest.mark.shared
@pytest.mark.parametrize("adapter", [None, "adapter"])
def test_a_photo_alone_equals_the_photo_in_a_batch(shared: Path, adapter: str | None) -> None:
    vit, _ = build("vit_tiny_patch16_224", shared / "weights" / "vit_tiny_patch16_224.safetensors")
    recipes = Path(__file__).parents[2] / "recipes" / "vit_tiny"
    model = load(recipes / adapter, vit) if adapter else wrap(vit)
    preprocess = Preprocess.from_timm_cfg({**vit.pretrained_cfg, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    files = sorted((shared / "data" / "in20" / "val").rglob("*.*"))[::16]
    images = torch.stack([preprocess(read_photo(file)) for file in files])
    with model.temporarily(budget=0.45, mode="fixed"):
        differing = sum(assert_batch_has_no_effect(model, batch) for batch in images.split(16))
    assert differing <= 4, "of 12,000 neighbours in the order, two pairs may be equal up to rounding"


def test_small_gains_keep_their_relative_precision() -> None:
    """The gains of late patches are tiny compared with the sum of all gains."""
    draw = torch.Generator().manual_seed(0)
    importance = torch.rand(1, 196, generator=draw).softmax(1)
    embedding = torch.nn.functional.normalize(torch.randn(1, 196, 24, generator=draw) + 2, dim=-1)
    gain = coverage_gain(importance, embedding)
    exact = coverage_gain(importance.double(), embedding.double())
    assert ((gain - exact).abs() <= 3e-7 * exact.abs() + 1e-8).all()
