"""The trained baselines of recipes/fewer_epochs run as the benchmarked ones do, and train as in their papers."""

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
from baselines import DynamicViTStage, EViTStage, _masked_block


def entering(bb: Backbone, images: Tensor, block: int) -> Tensor:
    """Tokens that enter ``block``."""
    x = bb.embed(images).tokens
    for index in range(block):
        x = bb.block(index, x)
    return x


def a_step(bb: Backbone, images: Tensor, block: int) -> Step:
    tokens = entering(bb, images, block)
    unused = torch.zeros(len(images))
    return Step(Targets(tokens, unused, unused, bb.model(images), unused), unused, 0.3)


@pytest.mark.parametrize("rate", [0.5, 0.8])
def test_the_trained_models_are_the_benchmarked_ones(rate: float) -> None:
    bb, images = adapt(fresh("vit")), photos("vit")
    evit, dynamic = EViT(bb, rate), DynamicViT(bb, rate)
    torch.testing.assert_close(EViTStage(evit, 9).logits(entering(bb, images, min(evit.at))), evit(images))
    torch.testing.assert_close(DynamicViTStage(dynamic).logits(entering(bb, images, min(dynamic.at))), dynamic(images))


def test_masked_attention_is_attention_without_the_dropped() -> None:
    bb, images = adapt(fresh("vit")), photos("vit", 2)
    x = entering(bb, images, 1)
    all_kept = torch.ones(2, x.shape[1] - bb.prefix)
    torch.testing.assert_close(_masked_block(bb, 1, x, all_kept), bb.block(1, x), atol=1e-5, rtol=1e-5)
    kept_mask = all_kept.clone()
    kept_mask[:, 10:] = 0
    kept = bb.prefix + 10
    torch.testing.assert_close(
        _masked_block(bb, 1, x, kept_mask)[:, :kept], bb.block(1, x[:, :kept]), atol=1e-5, rtol=1e-5
    )


def test_predictors_get_gradients_and_a_higher_learning_rate() -> None:
    bb, images = adapt(fresh("vit")), photos("vit", 4)
    baseline = DynamicViT(bb, 0.7)
    stage = DynamicViTStage(baseline)
    with torch.enable_grad():
        stage.requires_grad_(True)
        stage(a_step(bb, images, min(baseline.at)))[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in baseline.predictors.parameters())
    multipliers = {name: stage.lr_multiplier(name) for name in stage.trained()}
    assert {multiplier for name, multiplier in multipliers.items() if "predictors" in name} == {10.0}
    assert {multiplier for name, multiplier in multipliers.items() if "predictors" not in name} == {1.0}


def test_the_keep_rate_falls_to_its_target() -> None:
    bb, images = adapt(fresh("vit")), photos("vit", 2)
    baseline = EViT(bb, 0.5)
    stage, used = EViTStage(baseline, 9), []
    keep = baseline.keep
    baseline.keep = lambda patches: used.append(baseline.rate) or keep(patches)  # type: ignore[method-assign]
    step = a_step(bb, images, min(baseline.at))
    rates = []
    for _ in range(9):
        used.clear()
        stage(step)
        rates.append(used[0])
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.8
    assert rates[3:] == [0.5] * 6
    assert baseline.rate == 0.5
