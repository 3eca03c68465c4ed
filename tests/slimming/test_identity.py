"""Identity: a model at budget 1.0 equals its backbone, and wrapping does not change the backbone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, FEW, START, built, fresh, photos
from reference import assert_close
from slim_models import far_apart, slim
from torch import Tensor, nn

from patchlife import LifeConfig, wrap
from patchlife.slimming.run.adaptive import run_adaptive
from patchlife.slimming.run.fixed import run_fixed


@pytest.mark.parametrize("name", FAMILIES)
def test_small_models_depend_on_content_and_position(name: str) -> None:
    """Otherwise the tests below could not fail."""
    vit, images = built(name), photos(name)
    shifted = images.roll(8, dims=-1)
    assert far_apart(vit(images), vit(shifted))
    assert far_apart(vit(images[:1]), vit(images[1:2]))


@pytest.mark.contract("identity")
@pytest.mark.parametrize("variant", ["fixed", "adaptive"])
@pytest.mark.parametrize("name", FAMILIES)
def test_budget_one_equals_the_backbone(name: str, variant: str) -> None:
    vit, images = built(name), photos(name)
    model = slim(name, variant, budget=1.0)
    assert_close(model(images), vit(images))
    assert_close(model.forward_features(images), vit.forward_features(images))


@pytest.mark.parametrize("variant", ["fixed", "adaptive, merge"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_plan_that_drops_nothing_equals_the_backbone(name: str, variant: str) -> None:
    """The fixed and the adaptive run themselves, which a forward pass at budget 1.0 skips."""
    vit, images = built(name), photos(name)
    model = slim(name, variant, budget=1.0)
    backbone = model.backbone
    embedded = backbone.embed(images)
    tokens = embedded.tokens
    for index in range(model.start):
        tokens = backbone.block(index, tokens, backbone.rope_of(embedded.rope, index))
    plan = model.decide(tokens, embedded)
    assert not torch.equal(plan.order[0], torch.arange(plan.order.shape[1])), "the plan is in grid order"
    assert (plan.merge_targets is not None) == model.settings.merge
    if model.settings.mode == "fixed":
        out = run_fixed(backbone, tokens, embedded.rope, plan, keep_dropped=True)
    else:
        out = run_adaptive(backbone, tokens, embedded.rope, plan)
    place = torch.cat((torch.arange(backbone.prefix).expand(len(out), -1), plan.rank() + backbone.prefix), 1)
    restored = out.gather(1, place[..., None].expand_as(out))
    assert_close(backbone.norm(restored), vit.forward_features(images))


@pytest.mark.parametrize("name", FEW)
def test_predict_at_budget_one_keeps_all_patches(name: str) -> None:
    logits, lives = slim(name, budget=1.0).predict(photos(name))
    assert_close(logits, built(name)(photos(name)))
    assert (lives.life == lives.depth).all()
    assert (lives.kept == lives.life.shape[1]).all()
    assert lives.grid[0] * lives.grid[1] == lives.life.shape[1]


def test_an_explicit_schedule_of_all_patches_equals_the_backbone() -> None:
    model = slim("vit", kept=(36,) * 5)
    assert torch.equal(model(photos("vit")), built("vit")(photos("vit")))


def structure_of(vit: nn.Module) -> dict[str, Any]:
    """Everything of a model that wrapping must not change, except the values of its weights."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "modules": {n: (id(m), type(m), m.training) for n, m in vit.named_modules()},
        "parameters": {n: (id(p), p.requires_grad, p.dtype, p.grad) for n, p in vit.named_parameters()},
        "buffers": {n: (id(b), b.dtype) for n, b in vit.named_buffers()},
        "hooks": [len(getattr(m, h)) for m in vit.modules() for h in hooks],
        "attributes": {n: sorted(vars(m)) for n, m in vit.named_modules()},
    }


def wrap_and_run(vit: nn.Module, images: Tensor) -> None:
    """Wrap ``vit`` and run every method of the wrapped model; adaptive mode in eval mode only."""
    model = wrap(vit, LifeConfig(budget=0.65, start=START))
    model(images), model.forward_features(images), model.lives(images), model.predict(images)
    model.calibrate([images]).set_budget(0.7)
    if not vit.training:
        model.set_mode("adaptive")
        model(images), model.forward_features(images)


@pytest.mark.parametrize(("name", "training"), [(name, False) for name in FAMILIES] + [(name, True) for name in FEW])
def test_wrapping_does_not_change_the_backbone(name: str, training: bool) -> None:
    vit = fresh(name).train(training)
    vit.blocks[0].requires_grad_(False)
    before, weights = structure_of(vit), {k: v.clone() for k, v in vit.state_dict().items()}
    wrap_and_run(vit, photos(name))
    assert structure_of(vit) == before
    assert all(torch.equal(v, weights[k]) for k, v in vit.state_dict().items())


@pytest.mark.parametrize("name", FEW)
def test_the_attention_scorer_adds_no_weights(name: str) -> None:
    vit = built(name)
    model = slim(name)
    assert {id(p) for p in model.parameters()} == {id(p) for p in vit.parameters()}
    assert not list(model.scorer.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_wrapping_keeps_training_or_eval_mode(training: bool) -> None:
    model = wrap(fresh("vit").train(training))
    assert model.training == model.backbone.training == model.scorer.training == training
