"""What holds for every scorer that patchlife ships: a class added to `SCORERS` is tested here without a new test."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from families import FEW, START, built, photos
from reference import assert_close, masked

import patchlife
from patchlife import LifeConfig, Scorer, SlimModel
from patchlife.adapters.scorers import SCORERS
from patchlife.backbones import adapt

MODES = ("fixed", "adaptive")


def scorer_of(kind: str, family: str) -> Scorer:
    """A scorer with random weights; constructor arguments follow from the backbone and the start block."""
    backbone, wanted = adapt(built(family)), inspect.signature(SCORERS[kind]).parameters
    values = {"dim": backbone.dim, "prefix": backbone.prefix, "starts": (START,)}
    torch.manual_seed(0)
    return SCORERS[kind](**{name: value for name, value in values.items() if name in wanted})


def slimmed(kind: str, family: str, mode: str, budget: float = 0.65) -> SlimModel:
    config = LifeConfig(budget=budget, mode=mode, start=START)
    model = patchlife.wrap(built(family), config, scorer_of(kind, family)).eval()
    return model.calibrate([photos(family, 8, seed=1)])


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("kind", SCORERS)
def test_budget_one_is_the_backbone(kind: str, family: str) -> None:
    images = photos(family)
    assert_close(slimmed(kind, family, "fixed", budget=1.0)(images), built(family)(images))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("kind", SCORERS)
def test_runs_equal_the_slow_reference(kind: str, family: str, mode: str) -> None:
    model, images = slimmed(kind, family, mode), photos(family)
    plan = model.plan(images)
    lives = plan.lives()
    assert (lives.kept[:, -1] < lives.kept[:, 0]).any()
    logits, features = masked(model, images, lives, plan)
    assert_close(model(images), logits)
    assert_close(model.forward_features(images), features)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", SCORERS)
def test_images_do_not_depend_on_their_batch(kind: str, mode: str) -> None:
    model, images = slimmed(kind, "vit", mode), photos("vit")
    assert_close(torch.cat([model(image[None]) for image in images]), model(images))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", SCORERS)
def test_an_adapter_restores_it(kind: str, mode: str, tmp_path: Path) -> None:
    model, images = slimmed(kind, "vit", mode), photos("vit")
    loaded = patchlife.load(patchlife.save(model, tmp_path / "adapter"), built("vit"))
    assert type(loaded.scorer) is SCORERS[kind]
    assert torch.equal(loaded(images), model(images))
