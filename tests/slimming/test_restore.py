"""What the place of a dropped patch holds: its last state, its merge target's state, or un-merging by residual.

The reference restores patch by patch, from the states of a full-length run of timm's own blocks with patches masked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import START, built, cast, fresh, photos
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_close, distance, dropping, restored_tokens, targets_of
from slim_models import assert_some_dropped, far_apart, slim
from torch import Tensor

from patchlife import LifeConfig, SlimModel, wrap
from patchlife.config import RESTORES
from patchlife.slimming import merging
from patchlife.slimming.plan import Plan
from patchlife.slimming.regressor import LifeRegressor
from patchlife.slimming.run import adaptive, fixed, gated
from patchlife.slimming.run.restore import Dropped, dropped_patches, dropped_rows, restored, restored_rows

NEW = ("target", "residual")
MERGING = ("fixed, merge", "adaptive, merge")


def reference(model: SlimModel, images: Tensor, plan: Plan) -> list[Tensor]:
    """All tokens (batch, tokens, dim) after each block, in grid order."""
    vit = model.backbone.model
    with dropping(vit, plan.lives().life, model.start, model.settings.merge, targets_of(plan)) as dropper:
        vit.forward_features(images)
    return [restored_tokens(dropper, block, model.settings.restore) for block in range(model.backbone.depth)]


def tapped(model: SlimModel, images: Tensor) -> list[Tensor]:
    """The same from the model itself, with all blocks asked for."""
    taps = dict.fromkeys(range(model.backbone.depth), images)
    _, plan = model._run(images, keep_dropped=True, taps=taps)
    assert plan is not None
    after_start = {block: plan.in_grid_order(tokens, model.backbone.prefix) for block, tokens in taps.items()}
    return [tokens if block < model.start else after_start[block] for block, tokens in taps.items()]


def check(model: SlimModel, images: Tensor, variant: str, tolerance: float = 1e-5) -> None:
    plan = model.plan(images)
    assert_some_dropped(plan.lives(), variant)
    expected = reference(model, images, plan)
    for actual, states in zip(tapped(model, images), expected, strict=True):
        assert_close(actual, states, tolerance)
    assert_close(model.forward_features(images), model.backbone.norm(expected[-1]), tolerance)
    assert_close(model(images), model.backbone.classify(model.backbone.norm(expected[-1])), tolerance)


# ---- exactness


@pytest.mark.parametrize("how", RESTORES)
@pytest.mark.parametrize("variant", MERGING)
@pytest.mark.parametrize("name", ["vit", "deit-distilled", "gap-registers", "siglip", "rope-mixed", "dinov3"])
def test_every_block_equals_the_reference(name: str, variant: str, how: str) -> None:
    """Blocks before, at, between and after two drop points; pooled models read the restored patches."""
    check(slim(name, variant, drops=(2, 4), restore=how), photos(name), variant)


@pytest.mark.parametrize("variant", MERGING)
@pytest.mark.parametrize("how", NEW)
def test_chains_of_targets_that_are_dropped_later(how: str, variant: str) -> None:
    model = slim("vit", variant, cast("vit", torch.float64), start=1, drops=(1, 2, 3, 4), budget=0.6, restore=how)
    images = photos("vit").double()
    plan = model.plan(images)
    lives, targets = plan.lives().life, targets_of(plan)
    assert targets is not None
    assert (lives.gather(1, targets.rank)[lives < 5] < 5).any(), "no target is dropped later"
    check(model, images, variant, 1e-12)


@settings(deadline=None, max_examples=10)
@given(st.data())
def test_any_schedule(data: st.DataObject) -> None:
    start = data.draw(st.integers(1, 4), "start")
    after = data.draw(st.lists(st.integers(1, 36), min_size=5 - start, max_size=5 - start), "patches kept")
    kept = (*[36] * start, *sorted(after, reverse=True))
    how = data.draw(st.sampled_from(RESTORES), "restore")
    if kept[-1] < 36:
        check(slim("vit", "fixed, merge", kept=kept, start=start, restore=how), photos("vit", 2), "fixed, merge")


@settings(deadline=None, max_examples=10)
@given(st.floats(0.7, 0.95), st.sampled_from([(2,), (3,), (2, 3), (2, 4), (2, 3, 4)]), st.sampled_from(RESTORES))
def test_any_budget_and_drop_points_in_adaptive_mode(budget: float, drops: tuple[int, ...], how: str) -> None:
    model, images = slim("vit", "adaptive, merge", budget=budget, drops=drops, restore=how), photos("vit", 4)
    plan = model.plan(images)
    for actual, states in zip(tapped(model, images), reference(model, images, plan), strict=True):
        assert_close(actual, states)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), st.sampled_from(NEW), st.integers(0, 2), st.integers(0, 99))
def test_random_trees_of_targets(groups: list[int], how: str, prefix: int, seed: int) -> None:
    """Fixed and packed form on random states equal a recursion over single patches.

    ``groups``: how many patches are never dropped, then how many are dropped at each drop point, last one first.
    """
    draw = torch.Generator().manual_seed(seed)
    width = prefix + sum(groups)
    last, now, merged = torch.randn(3, width, 4, dtype=torch.float64, generator=draw)
    target = torch.zeros(width, dtype=torch.long)
    drops, packed, end = [], [], width
    for count in reversed(groups[1:]):
        begin = end - count
        target[begin:end] = torch.randint(prefix, begin, (count,), generator=draw)
        state = torch.randn(begin, 4, dtype=torch.float64, generator=draw)  # of all that are kept, merged
        merged[begin:end] = state[target[begin:end]]
        drops.append(dropped_patches(how, last[None, begin:end], state[None], target[None, begin:end]))
        packed.append(dropped_rows(how, torch.cat((state, last[begin:])), torch.arange(begin, end), target[begin:end]))
        end = begin

    def restored_patch(place: int) -> Tensor:
        if place < end:
            return now[place]
        state = restored_patch(int(target[place]))
        return state if how == "target" else last[place] + (state - merged[place])

    expected = torch.stack([restored_patch(place) for place in range(width)])
    assert_close(restored(now[None, :end], drops)[0], expected, 1e-12)
    rows = torch.cat((now[:end], last[end:]))
    before = rows.clone()
    assert_close(restored_rows(rows, packed), expected, 1e-12)
    assert torch.equal(rows, before), "the rows that later blocks read were changed"


@pytest.mark.parametrize("variant", MERGING)
@pytest.mark.parametrize("how", NEW)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, how: str, variant: str) -> None:
    """Under the same plan, a half-precision run differs from the half-precision reference by rounding only."""
    model, images = slim("vit", variant, cast("vit", dtype), drops=(2, 4), restore=how), photos("vit").to(dtype)
    expected = reference(model, images, model.plan(images))
    for actual, states in zip(tapped(model, images), expected, strict=True):
        assert actual.dtype == dtype
        assert_close(actual.float(), states.float(), 0.05)


@pytest.mark.parametrize("variant", MERGING)
@pytest.mark.parametrize("how", NEW)
def test_autocast(how: str, variant: str) -> None:
    model, images = slim("gap-registers", variant, restore=how), photos("gap-registers")
    with torch.autocast("cpu", torch.bfloat16):
        expected = reference(model, images, model.plan(images))
        for actual, states in zip(tapped(model, images), expected, strict=True):
            assert_close(actual.float(), states.float(), 0.05)


# ---- properties


@pytest.mark.parametrize("how", RESTORES)
@pytest.mark.parametrize("variant", MERGING)
def test_budget_one_equals_the_backbone(variant: str, how: str) -> None:
    vit, images = built("gap-registers"), photos("gap-registers")
    model = slim("gap-registers", variant, budget=1.0, restore=how)
    assert torch.equal(model(images), vit(images))
    assert torch.equal(model.forward_features(images), vit.forward_features(images))


@pytest.mark.parametrize("variant", MERGING)
def test_the_settings_differ_at_dropped_patches_only(variant: str) -> None:
    images = photos("vit")
    model = slim("vit", variant, restore="last")
    features = {"last": model.forward_features(images)}
    for how in NEW:
        with model.temporarily(restore=how):
            features[how] = model.forward_features(images)
    dropped = model.lives(images).life < model.backbone.depth
    for how in NEW:
        differs = (features[how] - features["last"]).abs().amax(dim=2) > 1e-3
        assert not differs[:, :1].any()
        assert torch.equal(differs[:, 1:], dropped), how
    assert far_apart(features["target"], features["residual"])


@pytest.mark.parametrize("how", NEW)
@pytest.mark.parametrize("variant", MERGING)
@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_an_image_alone_equals_the_image_in_a_batch(name: str, variant: str, how: str) -> None:
    model, images = slim(name, variant, restore=how), photos(name, 4)
    together = tapped(model, images)
    for image in (0, 3):
        for alone, batch in zip(tapped(model, images[image : image + 1]), together, strict=True):
            assert_close(alone[0], batch[image])


@pytest.mark.parametrize("variant", MERGING)
def test_a_broken_image_does_not_change_the_others(variant: str) -> None:
    model, images = slim("siglip", variant, restore="residual"), photos("siglip", 4)
    broken = images.clone()
    broken[1, :, 10:20, 10:20] = torch.nan
    others = [0, 2, 3]
    assert_close(model.forward_features(broken)[others], model.forward_features(images)[others])


@pytest.mark.parametrize("how", NEW)
@pytest.mark.parametrize("variant", MERGING)
def test_equal_patches_are_restored_as_the_dense_model_computes_them(
    variant: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A constant image without positions has equal patches. If keys count by their size, merging then loses nothing."""
    monkeypatch.setattr(merging, "BIAS", 1.0)
    vit = fresh("vit")
    vit.pos_embed.data.zero_()
    model, images = slim("vit", variant, vit, restore=how), torch.full((2, 3, 48, 48), 0.3)
    lives = model.lives(images).life
    if "fixed" in variant:
        assert (lives < 5).any(), "no patch is dropped"
    features, dense = model.forward_features(images), vit.forward_features(images)
    assert far_apart(dense, vit.norm(model.before_start(model.backbone.embed(images))))
    assert_close(features, dense)


@pytest.mark.parametrize("variant", MERGING)
def test_nothing_is_kept_for_a_classifier_that_reads_the_class_token(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, expected = photos("vit"), slim("vit", variant)(photos("vit"))

    def fail(*_: Any) -> None:
        raise AssertionError("states of dropped patches are kept")

    monkeypatch.setattr(fixed, "dropped_patches", fail)
    monkeypatch.setattr(adaptive, "dropped_rows", fail)
    model = slim("vit", variant, restore="residual")
    assert torch.equal(model(images), expected)
    with pytest.raises(AssertionError, match="are kept"):
        model.forward_features(images)


def test_restored_features_compile_to_one_graph() -> None:
    torch.compiler.reset()
    model, images = slim("siglip", "fixed, merge", drops=(2, 4), restore="residual"), photos("siglip")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(images), model(images))
    with model.temporarily(restore="last"):
        assert_close(compiled(images), model(images))
    torch.compiler.reset()


@pytest.mark.parametrize("how", NEW)
@pytest.mark.parametrize("variant", MERGING)
def test_gradients_equal_finite_differences(variant: str, how: str) -> None:
    """Of a drop point in the packed form, and in the fixed one."""
    torch.manual_seed(0)
    rows, goals, places = torch.randn(6, 2).double().requires_grad_(), torch.tensor([0, 2, 2]), torch.tensor([3, 4, 5])

    def run(rows: Tensor) -> Tensor:
        if "adaptive" in variant:
            return restored_rows(rows.sin(), [dropped_rows(how, rows, places, goals)])
        drop = dropped_patches(how, rows[None, 3:], rows[None, :3], goals[None])  # type: ignore[arg-type]
        return restored(rows[None, :3].sin(), [drop])

    with torch.enable_grad():
        assert torch.autograd.gradcheck(run, (rows,))


# ---- training


def learned(name: str, how: str) -> SlimModel:
    """A model with an untrained life regressor, in training mode."""
    torch.manual_seed(0)
    config = LifeConfig(budget=0.65, start=START, drops=(2, 3), restore=how)
    model = wrap(fresh(name), config)
    return SlimModel(model.backbone, config, LifeRegressor(model.backbone.dim, model.backbone.prefix))


@pytest.mark.parametrize("how", RESTORES)
@pytest.mark.parametrize("name", ["vit", "gap-registers", "rope-mixed"])
def test_training_has_the_values_of_the_fixed_run_after_every_block(name: str, how: str) -> None:
    model, images = learned(name, how), photos(name)
    expected = tapped(model.eval(), images)
    with torch.enable_grad():
        actual = tapped(model.train(), images)
    for own, others in zip(actual, expected, strict=True):
        assert_close(own.detach(), others.detach())


@pytest.mark.parametrize("how", RESTORES)
@pytest.mark.parametrize("block", [2, 3, 4])
def test_the_scorer_learns_from_every_block_after_the_start_block(block: int, how: str) -> None:
    model = learned("vit", how).train()
    with torch.enable_grad():
        features = model.forward_intermediates(photos("vit"), [block], intermediates_only=True)
        features[0].square().mean().backward()
    without = [name for name, p in model.scorer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without in ([], ["importance.bias"])  # one number for all patches: the softmax removes it


def test_the_choice_of_the_target_that_restores_a_patch_has_the_slope_of_a_softmax() -> None:
    """Cosines 0.6 and 0.8 with the two kept patches, whose states are 5 and 2; the softmax divides by 0.1."""
    embedding = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]], dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[[9.0], [5.0], [2.0]]], dtype=torch.float64)  # a prefix token first
    with torch.enable_grad():
        slope = gated._slope(gated._choice(embedding, kept=2))
        out = restored(tokens, [Dropped(None, torch.tensor([[2]]), slope)])
        out[0, 3, 0].backward()
    assert out.flatten().tolist() == [9.0, 5.0, 2.0, 2.0], "slopes do not change values"
    chosen = torch.sigmoid(torch.tensor((0.8 - 0.6) / 0.1, dtype=torch.float64))
    expected = chosen * (1 - chosen) / 0.1 * (2.0 - 5.0) * torch.tensor([-1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(embedding.grad[0, 2], expected)


@pytest.mark.parametrize("how", NEW)
def test_gradients_of_the_backbone_in_eval_mode_equal_those_of_the_reference(how: str) -> None:
    """Fixed and adaptive: the loss of all patches reaches the weights through the restored places too."""
    images = photos("vit")

    def gradients(variant: str, features: Callable[[SlimModel], Tensor]) -> Tensor:
        model = slim("vit", variant, fresh("vit"), restore=how)
        with torch.enable_grad():
            features(model).sin().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.backbone.model.blocks.parameters() if p.grad is not None])

    for variant in MERGING:
        own = gradients(variant, lambda model: model.forward_features(images))
        others = gradients(variant, lambda model: model.backbone.norm(reference(model, images, model.plan(images))[-1]))
        assert distance(own, others) <= 1e-4
