"""Stated FLOPs of transformers' models equal those of torch's counter, and budgets are met at several image sizes."""

from __future__ import annotations

import pytest
from slim_models import assert_some_dropped
from test_counting import WITHIN, measured
from transformers_families import ANY_SIZE, FAMILIES, FEW, OTHER_SIZE, arguments, built, photos, slim

from patchlife import LifeConfig, flops, wrap

# In a small model on small images a schedule has few choices: one patch more is 2 % of the budget.
NEAR = 0.94


def run(name: str, model: object):
    """A function of images that calls ``model`` with the arguments of its family."""
    return lambda images: model(**arguments(name, images))  # type: ignore[operator]


@pytest.mark.parametrize("name", FAMILIES)
def test_stated_dense_flops_equal_executed_ones(name: str) -> None:
    images = photos(name, 1)
    stated = flops(slim(name))
    assert stated.dense == pytest.approx(measured(run(name, built(name)), images), rel=WITHIN)


@pytest.mark.contract("flops", library="transformers")
@pytest.mark.parametrize("variant", ["fixed, merge", "adaptive"])
@pytest.mark.parametrize("name", FAMILIES)
def test_stated_flops_equal_executed_ones(name: str, variant: str) -> None:
    images, model = photos(name, 2), slim(name, variant, drops=(2, 4))
    lives = model.lives(images)
    assert_some_dropped(lives, variant)
    per_image = model.flops_of(lives)
    assert sum(per_image) == pytest.approx(measured(run(name, model), images), rel=WITHIN)
    if model.settings.mode == "fixed":
        assert per_image == [flops(model).slimmed] * 2


@pytest.mark.parametrize("size", [OTHER_SIZE, (96, 80)])
@pytest.mark.parametrize("name", [name for name in FEW if name in ANY_SIZE])
def test_budgets_are_met_at_every_image_size(name: str, size: tuple[int, int]) -> None:
    model = slim(name, "fixed, merge")
    stated = flops(model, size)
    assert NEAR * 0.65 <= stated.budget <= 0.65
    images = photos(name, 1, size=size)
    executed = measured(run(name, model), images) / measured(run(name, built(name)), images)
    assert executed == pytest.approx(stated.budget, rel=2 * WITHIN)


@pytest.mark.parametrize("name", ["clip", "dinov3", "siglip", "vit-classifier"])
@pytest.mark.parametrize("budget", [0.5, 0.8])
def test_budgets_are_met_within_three_percent_on_larger_grids(name: str, budget: float) -> None:
    model = wrap(built(name), LifeConfig(budget=budget, start=1))
    for size in [(112, 112), (96, 160)]:
        assert 0.97 * budget <= flops(model, size).budget <= budget


@pytest.mark.parametrize("variant", ["adaptive", "adaptive, merge"])
@pytest.mark.parametrize("name", ["clip", "dinov3", "registers-classifier", "siglip"])
def test_adaptive_mode_meets_its_budget_on_average(name: str, variant: str) -> None:
    model = slim(name, variant)
    for size in [(48, 48), OTHER_SIZE]:
        images = photos(name, 32, size=size)
        model.calibrate([images])
        spent = model.flops_of(model.lives(images), size)
        assert sum(spent) / len(spent) == pytest.approx(0.65 * flops(model, size).dense, rel=0.03)
