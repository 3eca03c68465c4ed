"""The gated run: the values of the fixed run, and gradients that reach the scorer."""

from __future__ import annotations

import pytest
import torch
from families import built, photos

from patchlife import LifeConfig, SlimModel, wrap
from patchlife.backbones import Embedded
from patchlife.slimming.merging import MergeTargets
from patchlife.slimming.plan import fixed_plan
from patchlife.slimming.regressor import LifeRegressor
from patchlife.slimming.run.fixed import run_fixed
from patchlife.slimming.run.gated import _choice, _gate, _gated_merge, _slope, _soft_weights, run_gated
from patchlife.slimming.scorers import Scores


def scored(name: str, merge: bool, budget: float = 0.6) -> tuple[SlimModel, torch.Tensor, Embedded, Scores]:
    """(model with an untrained life regressor, tokens of its start block, embedded images, scores with a graph)."""
    backbone = built(name)
    model = wrap(backbone, LifeConfig(budget=budget, start=2, drops=(2, 3), merge=merge))
    torch.manual_seed(0)
    model = SlimModel(model.backbone, model.settings, LifeRegressor(model.backbone.dim, model.backbone.prefix))
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
def test_values_equal_those_of_the_fixed_run(name: str, merge: bool) -> None:
    model, tokens, embedded, scores = scored(name, merge)
    keep_dropped = not model.backbone.reads_class
    plan = fixed_plan(
        scores.score, scores.embedding if merge else None, model.schedule(embedded.image_size), embedded.grid
    )
    fixed = run_fixed(model.backbone, tokens, embedded.rope, plan, keep_dropped)
    gated = run_gated(model.backbone, tokens, embedded.rope, plan, scores.embedding, keep_dropped)
    torch.testing.assert_close(gated, fixed, atol=1e-5, rtol=1e-5)


def test_every_parameter_of_the_scorer_gets_a_gradient() -> None:
    with torch.enable_grad():
        model, tokens, embedded, scores = scored("vit", merge=True)
        plan = fixed_plan(scores.score, scores.embedding, model.schedule(embedded.image_size), embedded.grid)
        out = run_gated(model.backbone, tokens, embedded.rope, plan, scores.embedding, keep_dropped=False)
        model.classify(out, plan).square().sum().backward()
    without = [name for name, p in model.scorer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without in ([], ["importance.bias"])  # one number for all patches: the softmax removes it


@pytest.mark.parametrize("merge", [True, False])
def test_scores_of_kept_and_of_merged_patches_get_gradients(merge: bool) -> None:
    with torch.enable_grad():
        model, tokens, embedded, scores = scored("vit", merge)
        score = scores.score.detach().requires_grad_()
        schedule = model.schedule(embedded.image_size)
        plan = fixed_plan(score, scores.embedding if merge else None, schedule, embedded.grid)
        out = run_gated(model.backbone, tokens, embedded.rope, plan, scores.embedding, keep_dropped=False)
        model.classify(out, plan).square().sum().backward()
    assert score.grad is not None
    slopes = score.grad.gather(1, plan.order)
    assert slopes[:, : schedule.kept[-1]].abs().max() > 0
    # without merging, patches that are missing from all gated blocks have no effect on the logits
    assert bool((slopes[:, schedule.kept[2] :] != 0).any()) == merge


def test_the_gradient_of_a_gate_is_the_slope_of_a_sigmoid() -> None:
    """Its centre is halfway between the last kept and the first dropped score, its width half of the mean score."""
    score = torch.tensor([[5.0, 4.0, 2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        slope = _slope(_gate(score, kept=2))
        slope.sum().backward()
    gate = torch.sigmoid((score.detach() - 3.0) / 1.5)
    assert slope.tolist() == [[0.0] * 4], "gates do not change values"
    torch.testing.assert_close(score.grad, gate * (1 - gate) / 1.5)


def test_gradients_of_a_merge_have_a_closed_form() -> None:
    """One patch of size 1 is merged with weight w into the first of two: their mean is (p0 + w p2) / (1 + w)."""
    score = torch.tensor([[5.0, 4.0, 0.0]], dtype=torch.float64, requires_grad=True)
    patches = torch.tensor([[[2.0], [7.0], [-1.0]]], dtype=torch.float64)
    w, size = 0.25, torch.ones(1, 3, dtype=torch.float64)
    weights = torch.tensor([[[w], [0.0]]], dtype=torch.float64)
    with torch.enable_grad():
        mean, new_size = _gated_merge(patches, size, _slope(_gate(score, kept=2)), weights, kept=2)
        mean.sum().backward()
    assert mean.flatten().tolist() == pytest.approx([(2.0 - w) / (1 + w), 7.0])
    assert new_size.tolist() == [[1 + w, 1.0]]
    gate = torch.sigmoid((score.detach() - 2.0) / 1.5)
    slope = gate * (1 - gate) / 1.5
    # the own weight of p0 rises with its gate and the merge weight of p2 falls with its gate, both towards p0
    expected = slope * torch.tensor([[w, 0.0, w]]) * (2.0 + 1.0) / (1 + w) ** 2
    torch.testing.assert_close(score.grad, expected)


def test_the_choice_of_a_merge_target_has_the_slope_of_a_softmax() -> None:
    """The cosines with the two kept patches are 0.6 and 0.8; the softmax divides them by a width of 0.1."""
    embedding = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]], dtype=torch.float64, requires_grad=True)
    w = 0.25
    targets = MergeTargets(torch.tensor([[1]]), torch.tensor([[w]], dtype=torch.float64))
    with torch.enable_grad():
        weights = _soft_weights(_slope(_choice(embedding, kept=2)), targets)
        weights[0, 1, 0].backward()
    assert weights.flatten().tolist() == [0.0, w]
    chosen = torch.sigmoid(torch.tensor((0.8 - 0.6) / 0.1, dtype=torch.float64))
    expected = w * chosen * (1 - chosen) / 0.1 * torch.tensor([-1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(embedding.grad[0, 2], expected)  # the kept embeddings are unit axes


def test_a_mean_of_merged_patches_keeps_its_precision_under_autocast() -> None:
    """As in the fixed run: the student of a mixed-precision training must compute what the slimmed model does."""
    draw = torch.Generator().manual_seed(0)
    patches, size = torch.randn(2, 12, 8, generator=draw), torch.ones(2, 12)
    weights = torch.rand(2, 5, 7, generator=draw)
    expected = _gated_merge(patches, size, torch.zeros(2, 12), weights, 5)
    with torch.autocast("cpu", torch.bfloat16):
        for one, other in zip(_gated_merge(patches, size, torch.zeros(2, 12), weights, 5), expected, strict=True):
            assert torch.equal(one, other)
