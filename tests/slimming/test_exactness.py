"""Fixed and adaptive runs equal the slow reference, which masks dropped patches in a run of timm's own code."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, FEW, built, cast, photos
from reference import assert_close, distance, dropping, masked
from slim_models import VARIANTS, assert_some_dropped, far_apart, slim
from torch import Tensor

from patchlife import SlimModel
from patchlife.slimming.merging import MergeTargets, merge
from patchlife.slimming.run.adaptive import Stage
from patchlife.slimming.run.adaptive import _merge as merge_rows

SHAPES = {
    "one drop": {"drops": (2,)},
    "a drop later than start": {"start": 1, "drops": (3,), "budget": 0.8},
    "every block": {"start": 1, "drops": (1, 2, 3, 4), "budget": 0.7},
    "the last block only": {"start": 1, "drops": (4,), "budget": 0.9},
    "a smooth schedule": {"kept": (36, 36, 29, 21, 14)},
    "down to one patch": {"kept": (36, 36, 20, 20, 1)},
    "a few patches less": {"kept": (36, 36, 33, 33, 33)},
}


def check(model: SlimModel, images: Tensor, variant: str) -> None:
    """Logits and features of ``model`` equal those of the reference, which differ from the dense model's."""
    lives = model.lives(images)
    assert_some_dropped(lives, variant)
    logits, features = masked(model, images, lives)
    assert far_apart(logits, model.backbone.model(images))
    assert_close(model(images), logits)
    assert_close(model.forward_features(images), features)


@pytest.mark.contract("{variant}")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_two_drops(name: str, variant: str) -> None:
    check(slim(name, variant, drops=(2, 4)), photos(name), variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["deit-distilled", "siglip", "rope-mixed"])
def test_any_schedule(name: str, shape: str, variant: str) -> None:
    check(slim(name, variant, **SHAPES[shape]), photos(name, 5), variant)


@pytest.mark.parametrize("variant", ["fixed", "adaptive, merge"])
@pytest.mark.parametrize("name", FEW)
def test_one_image(name: str, variant: str) -> None:
    check(slim(name, variant), photos(name, 1), variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FEW)
def test_predict_gives_logits_and_lives_of_one_run(name: str, variant: str) -> None:
    model, images = slim(name, variant), photos(name)
    logits, lives = model.predict(images)
    assert torch.equal(logits, model(images))
    assert torch.equal(lives.life, model.lives(images).life)
    assert torch.equal(lives.kept, model.lives(images).kept)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["dynamic", "dynamic-distilled", "dynamic-dinov3", "dynamic-rope-mixed"])
def test_one_dynamic_model_takes_several_sizes(name: str, variant: str) -> None:
    model = slim(name, variant)
    for height, width in [(48, 48), (40, 56), (48, 48)]:
        images = torch.nn.functional.interpolate(photos(name, 8), (height, width), mode="bilinear")
        model.calibrate([images])
        check(model, images, variant)
        assert model.lives(images).grid == (height // 8, width // 8)


@pytest.mark.parametrize("name", FEW)
def test_merging_changes_the_logits_and_not_the_lives(name: str) -> None:
    plain, images = slim(name, kept=(36, 36, 9, 9, 9)), photos(name)
    merging = slim(name, "fixed, merge", kept=(36, 36, 9, 9, 9))
    assert torch.equal(plain.lives(images).life, merging.lives(images).life)
    assert far_apart(plain(images), merging(images))


def test_the_reference_masks_dropped_patches() -> None:
    """Logits do not depend on the content of a patch with a life of 0."""
    vit, images = built("vit"), photos("vit")
    life = torch.full((3, 36), 5.0)
    life[:, 7] = 0
    changed = images.clone()
    changed[:, :, 8:16, 8:16] += 10  # patch 7 of a 6 x 6 grid
    with dropping(vit, life):
        assert torch.equal(vit(images), vit(changed))
    assert far_apart(vit(images), vit(changed))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", [*FEW, "residual-post-norm", "grouped-queries", "parallel-scaling"])
def test_float64(name: str, variant: str) -> None:
    """The differences from the reference shrink with the rounding error, so they are rounding errors."""
    model, images = slim(name, variant, cast(name, torch.float64), drops=(2, 4)), photos(name).double()
    lives = model.lives(images)
    assert_some_dropped(lives, variant)
    logits, features = masked(model, images, lives)
    assert_close(model(images), logits, 1e-12)
    assert_close(model.forward_features(images), features, 1e-12)


def check_half(name: str, variants: tuple[str, str], dtype: torch.dtype) -> None:
    """Under the same plan, a half-precision run differs from the half-precision reference by rounding only."""
    images = photos(name).to(dtype)
    model = slim(name, variants[1], cast(name, dtype), drops=(2, 4))
    rounding = distance(model.backbone.model(images).float(), built(name)(photos(name)))
    for variant in variants:
        plan = model.set_mode(VARIANTS[variant]["mode"]).plan(images)
        assert_some_dropped(plan.lives(), variant)
        logits, features = masked(model, images, plan.lives(), plan)
        actual = model(images)
        assert actual.dtype == dtype
        assert_close(actual.float(), logits.float(), max(0.01, 2 * rounding))
        assert_close(model.forward_features(images).float(), features.float(), 0.05)


HALF = (torch.bfloat16, torch.float16)


@pytest.mark.contract("half")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    check_half(name, ("fixed", "adaptive"), dtype)


@pytest.mark.parametrize(("name", "dtype"), [(n, d) for n in FAMILIES for d in HALF if n in FEW or d is HALF[0]])
def test_half_precision_with_merging(name: str, dtype: torch.dtype) -> None:
    check_half(name, ("fixed, merge", "adaptive, merge"), dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_merging_many_patches_stays_in_range(dtype: torch.dtype) -> None:
    """The sum of 251 patches of value 300 is out of float16's range, their mean is not."""
    patches = torch.full((1, 251, 4), 300.0, dtype=dtype)
    all_into_first = MergeTargets(torch.zeros(1, 250, dtype=torch.long), torch.ones(1, 250))
    mean, size = merge(patches, torch.ones(1, 251), *all_into_first)
    assert torch.equal(mean, patches[:, :1])
    assert size.tolist() == [[251.0]]
    rows, stage = (
        patches[0],
        Stage(
            range(1),
            torch.arange(1),
            (0, 1),
            torch.tensor((0, 1)),
            torch.arange(1, 251),
            torch.zeros(250).long(),
            torch.ones(250),
        ),
    )
    mean, size = merge_rows(rows.clone(), torch.ones(251), stage)
    assert (mean[0].float() - 300).abs().max() <= 300 * torch.finfo(dtype).eps * 16
    assert size[0] == 251


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast(variant: str) -> None:
    """Under autocast the run and the reference differ by bfloat16's rounding only."""
    model, images = slim("vit", variant), photos("vit")
    with torch.autocast("cpu", torch.bfloat16):
        plan = model.plan(images)
        actual, expected = model(images), masked(model, images, plan.lives(), plan)[0]
    assert_some_dropped(plan.lives(), variant)
    assert_close(actual.float(), expected.float(), 0.05)


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_does_not_change_the_decision(variant: str) -> None:
    """From the same tokens the plan is the same, and a patch that is no merge target keeps all its digits."""
    model = slim("vit", variant)
    embedded = model.backbone.embed(photos("vit"))
    tokens = model.before_start(embedded)
    plain = model.decide(tokens, embedded)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = model.decide(tokens, embedded)
        patches, targets = torch.randn(1, 3, 8), MergeTargets(torch.tensor([[1]]), torch.tensor([[0.5]]))
        after, _ = merge(patches, torch.ones(1, 3), *targets)
    assert torch.equal(plain.score, under_autocast.score)
    assert torch.equal(plain.order, under_autocast.order)
    if plain.merge_targets is not None:
        assert all(torch.equal(a, b) for a, b in zip(plain.merge_targets, under_autocast.merge_targets, strict=True))
    assert torch.equal(after[:, 0], patches[:, 0])
