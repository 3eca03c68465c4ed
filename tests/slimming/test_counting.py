"""The FLOPs that are stated equal what torch's own counter measures on what is really executed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, FEW, built, photos
from reference import GivenScores
from slimmed import WAYS, assert_some_die, slim
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from patchlife import LifeConfig, SlimModel, flops
from patchlife.backbones import adapt
from patchlife.flop_counter import counted
from patchlife.slimming.calibration import Calibration

WITHIN = 0.005


def _fused_on_cpu(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def measured(run: Callable[[Tensor], Tensor], images: Tensor) -> int:
    """torch's count for ``run(images)``; torch leaves out fused attention on the CPU unless it is told."""
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_on_cpu}
    with torch.enable_grad(), FlopCounterMode(display=False, custom_mapping=fused) as counter:
        run(images)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", FAMILIES)
def test_stated_dense_flops_are_executed(name: str) -> None:
    images = photos(name, 1)
    stated = flops(slim(name), tuple(images.shape[-2:]))
    assert stated.dense == pytest.approx(measured(built(name), images), rel=WITHIN)


@pytest.mark.parametrize(
    ("name", "way"),
    [(name, way) for name in FAMILIES for way in WAYS if "merge" in way or name in FEW],
)
def test_stated_flops_are_executed(name: str, way: str) -> None:
    images = photos(name, 2)
    size = tuple(images.shape[-2:])
    model = slim(name, way, drops=(2, 4))
    lives = model.lives(images)
    assert_some_die(lives, "fixed")
    each = model.flops_of(lives, size)
    assert sum(each) == pytest.approx(measured(model, images), rel=WITHIN)
    stated = flops(model, size)
    assert stated.slimmed < 0.9 * stated.dense
    if model.config.mode == "fixed":
        assert each == [stated.slimmed] * 2
        assert stated.budget <= model.config.budget


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FEW)
def test_the_parts_make_the_whole(name: str, way: str) -> None:
    model = slim(name, way, drops=(2, 4))
    stated = flops(model)
    assert len(stated.dense_blocks) == len(stated.slimmed_blocks) == 5
    assert stated.dense == stated.outer + sum(stated.dense_blocks)
    assert stated.slimmed_blocks[:2] == stated.dense_blocks[:2]
    assert stated.slimmed_blocks[2] < stated.dense_blocks[2]
    assert stated.decision > 0
    assert stated.slimmed == stated.outer + stated.decision + sum(stated.slimmed_blocks)


@pytest.mark.parametrize("name", FEW)
def test_budget_one_costs_what_the_backbone_costs(name: str) -> None:
    model, images = slim(name, budget=1.0), photos(name, 1)
    stated = flops(model)
    assert stated.slimmed == stated.dense
    assert stated.decision == 0
    assert measured(model, images) == measured(built(name), images)


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_heirs_are_part_of_the_decision(mode: str) -> None:
    plain, heirs = slim("vit", mode), slim("vit", f"{mode}, merge")
    without, with_heirs = flops(plain).decision, flops(heirs).decision
    assert 0 < without <= with_heirs < 0.05 * flops(heirs).dense
    assert (without < with_heirs) == (
        mode == "fixed"
    )  # cosines are there anyway; adaptive mode merges without products


@pytest.mark.parametrize("name", FEW)
def test_our_counter_is_torchs(name: str) -> None:
    images = photos(name)
    assert counted(built(name), images)[0] == measured(built(name), images)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("name", [*FEW, "map-registers", "perception-encoder"])
def test_counting_works_wherever_a_model_is_wrapped(name: str, context: Callable) -> None:
    expected = flops(slim(name))
    with context():
        assert flops(slim(name)) == expected
        slim(name)(photos(name))


def test_an_image_that_loses_nobody_has_paid_for_the_decision() -> None:
    images = photos("vit", 2)
    score = torch.rand(2, 36, generator=torch.Generator().manual_seed(0)) + torch.tensor([[9.0], [0.0]])
    model = SlimModel(adapt(built("vit")), LifeConfig(budget=0.7), GivenScores(score))
    model.use_calibration(Calibration.of(score)).set_mode("adaptive")
    lives = model.lives(images)
    assert (lives.kept[0] == 36).all(), "the first one is meant to keep all its patches"
    assert model.flops_of(lives)[0] == pytest.approx(measured(model, images[:1]), rel=0.005)
