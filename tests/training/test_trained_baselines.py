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
from patchlife.benchmarks.baselines.tnt import TokenNoise
from patchlife.benchmarks.baselines.tome import ToMe
from patchlife.training.stage import Step
from patchlife.training.targets import Targets

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes/fewer_epochs"))
from baselines import DynamicViTStage, EViTStage, TNTStage, ToMeStage, _masked_block
from seed_table import comparisons, mean_points, table


def entering(bb: Backbone, images: Tensor, block: int) -> Tensor:
    """Tokens that enter ``block``."""
    x = bb.embed(images).tokens
    for index in range(block):
        x = bb.block(index, x)
    return x


def a_step(bb: Backbone, images: Tensor, block: int) -> Step:
    tokens = entering(bb, images, block)
    unused = torch.zeros(len(images))
    return Step(Targets(tokens, unused, unused, bb.model(images), unused, unused), unused, 0.3)


@pytest.mark.parametrize("rate", [0.5, 0.8])
def test_the_trained_models_are_the_benchmarked_ones(rate: float) -> None:
    bb, images = adapt(fresh("vit")), photos("vit")
    evit, dynamic = EViT(bb, rate), DynamicViT(bb, rate)
    torch.testing.assert_close(EViTStage(evit, 9).logits(entering(bb, images, min(evit.at))), evit(images))
    torch.testing.assert_close(DynamicViTStage(dynamic).logits(entering(bb, images, min(dynamic.at))), dynamic(images))
    noise, tome = TokenNoise(bb, rate), ToMe(bb, (5, 4, 4, 4, 4))
    torch.testing.assert_close(TNTStage(noise).logits(entering(bb, images, noise.at)), noise(images))
    torch.testing.assert_close(ToMeStage(tome).logits(entering(bb, images, 0)), tome(images))


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


def test_tnt_without_noise_trains_the_dense_model() -> None:
    bb, images = adapt(fresh("vit")), photos("vit", 2)
    stage = TNTStage(TokenNoise(bb, 0.5), noise=0.0)
    tokens = entering(bb, images, stage.baseline.at)
    noisy = stage.noisy(tokens, torch.Generator().manual_seed(0))
    assert torch.equal(noisy, tokens)
    torch.testing.assert_close(stage.baseline.rest(noisy), bb.model(images), rtol=1e-5, atol=1e-6)
    assert stage(a_step(bb, images, stage.baseline.at))[1]["divergence"] == pytest.approx(0, abs=1e-5)


def test_tnt_adds_less_noise_to_relevant_patches_and_none_to_the_class_token() -> None:
    bb, images = adapt(fresh("vit")), photos("vit", 2)
    baseline = TokenNoise(bb, 0.5)
    baseline.relevance.weight.data.mul_(20)  # a patch or two with nearly all of the relevance
    stage = TNTStage(baseline, noise=0.5)
    tokens = entering(bb, images, baseline.at)
    drawn = torch.stack([stage.noisy(tokens, torch.Generator().manual_seed(s)) - tokens for s in range(200)])
    patches = tokens[:, bb.prefix :]
    expected = 0.5 * patches.std(dim=(1, 2))[:, None] * (1 - baseline.alpha(patches))
    assert baseline.alpha(patches).max() > 0.3
    assert (drawn[:, :, : bb.prefix] == 0).all()
    torch.testing.assert_close(drawn[:, :, bb.prefix :].std(dim=(0, 3)), expected, rtol=0.05, atol=0.01)


def test_tnt_and_tome_train_blocks_and_the_relevance() -> None:
    bb, images = adapt(fresh("vit")), photos("vit", 4)
    for stage, block in (
        (TNTStage(TokenNoise(bb, 0.5)), 1),
        (ToMeStage(ToMe(bb, (5, 5, 5, 5, 5))), 0),
    ):
        stage.requires_grad_(True)
        stage.zero_grad()
        with torch.enable_grad():
            stage(a_step(bb, images, block))[0].backward()
        for index in range(1, bb.depth):
            assert all(p.grad.abs().sum() > 0 for n, p in bb.blocks[index].named_parameters() if n.endswith("weight"))
        if isinstance(stage, TNTStage):
            assert stage.baseline.relevance.weight.grad.abs().sum() > 0
            multipliers = {n: stage.lr_multiplier(n) for n in stage.trained()}
            assert {n for n, m in multipliers.items() if m == 10} == {
                "baseline.relevance.weight",
                "baseline.relevance.bias",
            }


def a_curve(method: str, epochs: int, top1: float, kl: float) -> dict:
    curve = [
        {"epoch": float(e), "seconds": 10.0 * e, "set": {"top1": top1 * e / epochs, "kl": kl}}
        for e in range(epochs + 1)
    ]
    return {"method": method, "epochs": epochs, "curve": curve}


def test_the_table_has_means_and_deviations_over_the_seeds() -> None:
    curves = [a_curve("ours", 1, 60, 0.2), a_curve("ours", 1, 64, 0.4), a_curve("tnt", 2, 50, 0.5)]
    result = {"dense": {"set": 80.0}, "curves": curves}
    lines = table(result).splitlines()
    assert lines[2] == "| PatchLife, any budget, all weights | 1 | 10 | 62.0 ± 2.8 | 0.300 ± 0.141 | 2 |"
    assert lines[3] == "| TNT, one layer | 2 | 20 | 50.0 | 0.500 | 1 |"
    assert mean_points(curves[:2])[1]["set"]["top1"] == 62
    assert comparisons(result) == [
        "PatchLife, any budget, all weights, 1 epochs, against TNT, one layer, 2 epochs: "
        "set +12.0 points, KL 0.300 against 0.500"
    ]


@pytest.mark.parametrize("method", ["evit", "dynamicvit", "tnt", "tome"])
def test_stages_train_in_bfloat16_as_on_a_gpu(method: str) -> None:
    bb, images = adapt(fresh("vit")), photos("vit", 4)
    stage, block = {
        "evit": lambda: (EViTStage(EViT(bb, 0.5), 9), 1),
        "dynamicvit": lambda: (DynamicViTStage(DynamicViT(bb, 0.7)), 1),
        "tnt": lambda: (TNTStage(TokenNoise(bb, 0.5)), 1),
        "tome": lambda: (ToMeStage(ToMe(bb, (5, 5, 5, 5, 5))), 0),
    }[method]()
    step = a_step(bb, images, block)
    stage.requires_grad_(True)
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        loss = stage(step)[0]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad.isfinite().all() for p in bb.parameters() if p.grad is not None)
