"""The FLOPs that the cost model states equal those that torch's own counter measures during a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, FEW, built, photos
from reference import GivenScores
from slim_models import VARIANTS, assert_some_dropped, slim
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
    """torch's count for ``run(images)``, with a formula for fused attention on the CPU, which torch leaves out."""
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_on_cpu}
    with torch.enable_grad(), FlopCounterMode(display=False, custom_mapping=fused) as counter:
        run(images)
    return counter.get_total_flops()


@pytest.mark.contract("flops")
@pytest.mark.parametrize("name", FAMILIES)
def test_stated_dense_flops_equal_executed_ones(name: str) -> None:
    images = photos(name, 1)
    stated = flops(slim(name), tuple(images.shape[-2:]))
    assert stated.dense == pytest.approx(measured(built(name), images), rel=WITHIN)


@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, variant) for name in FAMILIES for variant in VARIANTS if "merge" in variant or name in FEW],
)
def test_stated_flops_equal_executed_ones(name: str, variant: str) -> None:
    images = photos(name, 2)
    size = tuple(images.shape[-2:])
    model = slim(name, variant, drops=(2, 4))
    lives = model.lives(images)
    assert_some_dropped(lives, variant)
    per_image = model.flops_of(lives, size)
    assert sum(per_image) == pytest.approx(measured(model, images), rel=WITHIN)
    stated = flops(model, size)
    assert stated.slimmed < 0.9 * stated.dense
    if model.settings.mode == "fixed":
        assert per_image == [stated.slimmed] * 2
        assert stated.budget <= model.settings.budget


@pytest.mark.parametrize("name", ["dynamic", "dynamic-siglip", "dynamic-dinov3", "dynamic-rope-mixed"])
@pytest.mark.parametrize("variant", ["adaptive", "adaptive, merge"])
def test_stated_flops_of_a_dynamic_model_in_adaptive_mode(name: str, variant: str) -> None:
    """For each image, and for their mean, at two sizes that one model is calibrated for."""
    model = slim(name, variant, drops=(2, 4))
    batches = {size: torch.nn.functional.interpolate(photos(name, 8), size) for size in [(40, 56), (64, 48)]}
    model.calibrate(batches.values())
    for size, images in batches.items():
        lives = model.lives(images)
        assert_some_dropped(lives, variant)
        per_image = model.flops_of(lives, size)
        for index, stated in enumerate(per_image):
            assert stated == pytest.approx(measured(model, images[index : index + 1]), rel=WITHIN)
        mean = sum(per_image) / len(images)
        assert mean == pytest.approx(flops(model, size).slimmed, rel=0.02)
        assert mean == pytest.approx(model.settings.budget * flops(model, size).dense, rel=0.03)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FEW)
def test_the_parts_sum_to_the_total(name: str, variant: str) -> None:
    model = slim(name, variant, drops=(2, 4))
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
def test_merging_is_part_of_the_decision(mode: str) -> None:
    plain, merging = flops(slim("vit", mode)), flops(slim("vit", f"{mode}, merge"))
    assert 0 < plain.decision < merging.decision < 0.05 * merging.dense


@pytest.mark.parametrize("name", FEW)
def test_the_counter_equals_torchs(name: str) -> None:
    images = photos(name)
    assert counted(built(name), images)[0] == measured(built(name), images)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("name", [*FEW, "map-registers", "perception-encoder"])
def test_counting_works_in_every_gradient_mode(name: str, context: Callable) -> None:
    expected = flops(slim(name))
    with context():
        assert flops(slim(name)) == expected
        slim(name)(photos(name))


def test_flops_of_an_image_that_keeps_all_patches_include_the_decision() -> None:
    images = photos("vit", 2)
    score = torch.rand(2, 36, generator=torch.Generator().manual_seed(0)) + torch.tensor([[9.0], [0.0]])
    model = SlimModel(adapt(built("vit")), LifeConfig(budget=0.7), GivenScores(score))
    model.use_calibration(Calibration.of(score)).set_mode("adaptive")
    lives = model.lives(images)
    assert (lives.kept[0] == 36).all(), "the first image must keep all its patches"
    assert model.flops_of(lives)[0] == pytest.approx(measured(model, images[:1]), rel=WITHIN)
