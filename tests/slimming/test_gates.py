"""A differentiable end of life: the values of the fast run, and a gradient that knows who is missed."""

from __future__ import annotations

import pytest
import torch
from families import built, photos

from patchlife import LifeConfig, SlimModel, wrap
from patchlife.backbones import Embedded
from patchlife.slimming.plan import fixed_plan
from patchlife.slimming.regressor import LifeRegressor
from patchlife.slimming.run.fixed import run_fixed
from patchlife.slimming.run.gated import run_gated
from patchlife.slimming.scorers import Scores


def judged(name: str, merge: bool, budget: float = 0.6) -> tuple[SlimModel, torch.Tensor, Embedded, Scores]:
    """(model with a fresh head, tokens at its start block, embedding, the head's scores with its gradient)."""
    backbone = built(name)
    model = wrap(backbone, LifeConfig(budget=budget, start=2, drops=(2, 3), merge=merge))
    torch.manual_seed(0)
    model = SlimModel(model.backbone, model.config, LifeRegressor(model.backbone.dim, model.backbone.prefix))
    embedded = model.backbone.embed(photos(name, 4))
    with torch.no_grad():
        tokens = model.before_start(embedded)
    with torch.enable_grad():
        scores = model.scorer(tokens, embedded.rope, model.backbone, model.start)
    return model, tokens, embedded, scores


@pytest.mark.parametrize(
    "name", ["vit", "gap-registers", "siglip", "eva02", "rope-mixed", "dinov3-average", "unpooled"]
)
@pytest.mark.parametrize("merge", [True, False])
def test_values_are_those_of_the_fast_run(name: str, merge: bool) -> None:
    model, tokens, embedded, scores = judged(name, merge)
    keep_dropped = not model.backbone.reads_class
    plan = fixed_plan(
        scores.score, scores.similarities() if merge else None, model.schedule(embedded.image_size), embedded.grid
    )
    fast = run_fixed(model.backbone, tokens, embedded.rope, plan, keep_dropped)
    gated = run_gated(model.backbone, tokens, embedded.rope, plan, scores.embedding, keep_dropped)
    torch.testing.assert_close(gated, fast, atol=1e-5, rtol=1e-5)


def test_every_parameter_of_the_head_hears_of_the_answer() -> None:
    with torch.enable_grad():
        model, tokens, embedded, scores = judged("vit", merge=True)
        plan = fixed_plan(scores.score, scores.similarities(), model.schedule(embedded.image_size), embedded.grid)
        out = run_gated(model.backbone, tokens, embedded.rope, plan, scores.embedding, keep_dropped=False)
        model.classify(out, plan).square().sum().backward()
    silent = [name for name, p in model.scorer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent in ([], ["importance.bias"])  # one number for all patches changes nobody's place


@pytest.mark.parametrize("merge", [True, False])
def test_a_survivor_that_is_missed_is_told_to_live_longer(merge: bool) -> None:
    """The gradient of a gate is the change that fading this survivor makes, to first order."""
    with torch.enable_grad():
        model, tokens, embedded, scores = judged("vit", merge)
        score = scores.score.detach().requires_grad_()
        schedule = model.schedule(embedded.image_size)
        plan = fixed_plan(score, scores.similarities() if merge else None, schedule, embedded.grid)
        out = run_gated(model.backbone, tokens, embedded.rope, plan, scores.embedding, keep_dropped=False)
        model.classify(out, plan).square().sum().backward()
    assert score.grad is not None
    slopes = score.grad.gather(1, plan.order)
    last = schedule.kept[-1]
    assert slopes[:, :last].abs().max() > 0
    if merge:
        assert slopes[:, last:].abs().max() > 0  # the dying are asked too: what they bequeath may do harm
