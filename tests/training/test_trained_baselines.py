"""The rivals of recipes/fewer_epochs: what they learn with is what the comparison measures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from families import fresh, photos
from torch import Tensor

from patchlife.backbones import Backbone, adapt
from patchlife.benchmarks.baselines.dynamicvit import DynamicViT
from patchlife.benchmarks.baselines.evit import EViT
from patchlife.training.stage import Step
from patchlife.training.targets import Targets

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes/fewer_epochs"))
from rivals import DynamicViTStage, EViTStage, _masked_block


def entering(bb: Backbone, images: Tensor, block: int) -> Tensor:
    """Tokens that enter ``block``."""
    x = bb.embed(images).tokens
    for index in range(block):
        x = bb.block(index, x)
    return x


def targets(bb: Backbone, images: Tensor, block: int) -> Step:
    tokens = entering(bb, images, block)
    nothing = torch.zeros(len(images))
    return Step(Targets(tokens, nothing, nothing, bb.vit(images)), nothing, 0.3)


@pytest.mark.parametrize("rate", [0.5, 0.8])
def test_what_is_learned_is_what_is_measured(rate: float) -> None:
    bb, images = adapt(fresh("vit")), photos("vit")
    evit, dynamic = EViT(bb, rate), DynamicViT(bb, rate)
    torch.testing.assert_close(EViTStage(evit, 9).answer(entering(bb, images, min(evit.at))), evit(images))
    torch.testing.assert_close(DynamicViTStage(dynamic).answer(entering(bb, images, min(dynamic.at))), dynamic(images))


def test_masked_attention_is_attention_without_the_dropped() -> None:
    bb, images = adapt(fresh("vit")), photos("vit", 2)
    x = entering(bb, images, 1)
    everyone = torch.ones(2, x.shape[1] - bb.prefix)
    torch.testing.assert_close(_masked_block(bb, 1, x, everyone), bb.block(1, x), atol=1e-5, rtol=1e-5)
    alive = everyone.clone()
    alive[:, 10:] = 0
    kept = bb.prefix + 10
    torch.testing.assert_close(_masked_block(bb, 1, x, alive)[:, :kept], bb.block(1, x[:, :kept]), atol=1e-5, rtol=1e-5)


def test_predictors_hear_of_the_answer_and_learn_faster() -> None:
    bb, images = adapt(fresh("vit")), photos("vit", 4)
    baseline = DynamicViT(bb, 0.7)
    stage = DynamicViTStage(baseline)
    with torch.enable_grad():
        stage.requires_grad_(True)
        stage(targets(bb, images, min(baseline.at)))[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in baseline.predictors.parameters())
    multipliers = {name: stage.lr_multiplier(name) for name in stage.trained()}
    assert {multiplier for name, multiplier in multipliers.items() if "predictors" in name} == {10.0}
    assert {multiplier for name, multiplier in multipliers.items() if "predictors" not in name} == {1.0}


def test_the_keep_rate_falls_to_its_target() -> None:
    bb, images = adapt(fresh("vit")), photos("vit", 2)
    baseline = EViT(bb, 0.5)
    stage, seen = EViTStage(baseline, 9), []
    keep = baseline.keep
    baseline.keep = lambda patches: seen.append(baseline.rate) or keep(patches)  # type: ignore[method-assign]
    step = targets(bb, images, min(baseline.at))
    rates = []
    for _ in range(9):
        seen.clear()
        stage(step)
        rates.append(seen[0])
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.8
    assert rates[3:] == [0.5] * 6
    assert baseline.rate == 0.5
