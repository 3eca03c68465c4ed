"""An image's result does not depend on its batch mates: not on their number, order, content or faults."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, FEW, photos
from reference import assert_close
from slimmed import WAYS, assert_some_die, far_apart, slim


@pytest.mark.parametrize("way", ["fixed", "adaptive, heirs"])
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
        assert torch.equal(own.survivors[0], lives.survivors[image])
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
