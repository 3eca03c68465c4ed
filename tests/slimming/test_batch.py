"""An image's result does not depend on its batch mates: not on their number, order, content or faults."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import FAMILIES, FEW, photos
from reference import assert_close
from slimmed import WAYS, assert_some_die, far_apart, slim
from torch import Tensor

from patchlife import SlimModel, load, wrap
from patchlife.backbones import build
from patchlife.data import Preprocess, read_photo
from patchlife.slimming.coverage import coverage_gain


@pytest.mark.parametrize("way", ["fixed", "adaptive, merge"])
@pytest.mark.parametrize("name", FAMILIES)
def test_alone_or_in_company(name: str, way: str) -> None:
    model, images = slim(name, way), photos(name, 4)
    logits, lives = model.predict(images)
    features = model.forward_features(images)
    assert_some_die(lives, way)
    assert far_apart(logits[0], logits[1])
    for image in (0, 3):
        alone, own = model.predict(images[image : image + 1])
        assert torch.equal(own.life[0], lives.life[image])
        assert torch.equal(own.kept[0], lives.kept[image])
        assert_close(alone[0], logits[image])
        assert_close(model.forward_features(images[image : image + 1])[0], features[image])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FEW)
def test_any_order_and_any_mates(name: str, way: str) -> None:
    model, images = slim(name, way), photos(name, 4)
    logits = model(images)
    assert_close(model(images.flip(0)), logits.flip(0))
    assert_close(model(torch.cat((images[2:], photos(name, 5, seed=9))))[:2], logits[2:])
    assert_close(model(images[[1, 1, 1]]), logits[[1, 1, 1]])


@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FEW)
def test_a_broken_image_harms_nobody_else(name: str, way: str, fault: float) -> None:
    model, images = slim(name, way), photos(name, 4)
    broken = images.clone()
    broken[1, :, 10:20, 10:20] = fault
    logits, lives = model.predict(broken)
    others = [0, 2, 3]
    assert_close(logits[others], model(images)[others])
    assert torch.equal(lives.life[others], model.lives(images).life[others])
    assert not torch.isfinite(logits[1]).all(), "a broken image must not look like a good one"


@pytest.mark.parametrize("way", WAYS)
def test_results_do_not_change_from_run_to_run(way: str) -> None:
    model, images = slim("vit", way), photos("vit", 4)
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize("way", WAYS)
def test_an_empty_batch_has_an_empty_answer(way: str) -> None:
    model = slim("vit", way)
    logits, lives = model.predict(photos("vit")[:0])
    assert logits.shape == (0, 10)
    assert lives.life.shape == (0, 36)


def assert_decided_alike(model: SlimModel, images: Tensor) -> None:
    """Alone or in a batch: the same order of all patches, the same lives and logits that differ by rounding."""
    together, (logits, lives) = model.plan(images), model.predict(images)
    for image in range(len(images)):
        alone, (own, life) = model.plan(images[image : image + 1]), model.predict(images[image : image + 1])
        assert torch.equal(alone.order[0], together.order[image])
        assert torch.equal(life.life[0], lives.life[image])
        assert_close(own[0], logits[image], 1e-4)


@pytest.mark.parametrize("way", ["fixed, merge", "adaptive, merge"])
@pytest.mark.parametrize("name", ["vit", "siglip", "dinov3"])
def test_rounding_does_not_change_the_order(name: str, way: str) -> None:
    """Gains are small differences of near numbers; computed as differences of sums they would be rounding noise."""
    assert_decided_alike(slim(name, way), photos(name, 48))


@pytest.mark.shared
@pytest.mark.parametrize("adapter", [None, "adapter"])
def test_photos_in_a_batch_or_alone(shared: Path, adapter: str | None) -> None:
    vit, _ = build("vit_tiny_patch16_224", shared / "weights" / "vit_tiny_patch16_224.safetensors")
    recipes = Path(__file__).parents[2] / "recipes" / "vit_tiny"
    model = load(recipes / adapter, vit) if adapter else wrap(vit)
    preprocess = Preprocess.from_timm_cfg({**vit.pretrained_cfg, "mean": (0.5,) * 3, "std": (0.5,) * 3})
    files = sorted((shared / "data" / "in20" / "val").rglob("*.*"))[::16]
    images = torch.stack([preprocess(read_photo(file)) for file in files])
    with model.temporarily(budget=0.45, mode="fixed"):
        for batch in images.split(16):
            assert_decided_alike(model, batch)


def test_scores_near_a_tie_are_told_apart_to_the_last_digits() -> None:
    """The gains of late patches are tiny beside the sum of all: they keep their own precision."""
    draw = torch.Generator().manual_seed(0)
    importance = torch.rand(1, 196, generator=draw).softmax(1)
    embedding = torch.nn.functional.normalize(torch.randn(1, 196, 24, generator=draw) + 2, dim=-1)
    gain, _ = coverage_gain(importance, embedding)
    exact, _ = coverage_gain(importance.double(), embedding.double())
    assert ((gain - exact).abs() <= 3e-7 * exact.abs() + 1e-8).all()
