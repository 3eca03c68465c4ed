"""The fast runs equal the slow reference that hides dead patches in a full-length run of timm's own code."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, FEW, built, cast, photos
from reference import assert_close, distance, dropping, masked
from slimmed import WAYS, assert_some_die, far_apart, slim
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


def check(model: SlimModel, images: Tensor, way: str) -> None:
    """Logits, features and `predict` of ``model`` against the reference, which is not the dense model."""
    lives = model.lives(images)
    assert_some_die(lives, way)
    logits, features = masked(model, images, lives)
    assert far_apart(logits, model.backbone.vit(images))
    assert_close(model(images), logits)
    assert_close(model.forward_features(images), features)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_two_drops(name: str, way: str) -> None:
    check(slim(name, way, drops=(2, 4)), photos(name), way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["deit-distilled", "siglip", "rope-mixed"])
def test_any_schedule(name: str, shape: str, way: str) -> None:
    check(slim(name, way, **SHAPES[shape]), photos(name, 5), way)


@pytest.mark.parametrize("way", ["fixed", "adaptive, merge"])
@pytest.mark.parametrize("name", FEW)
def test_one_image(name: str, way: str) -> None:
    check(slim(name, way), photos(name, 1), way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FEW)
def test_predict_gives_logits_and_lives_of_one_run(name: str, way: str) -> None:
    model, images = slim(name, way), photos(name)
    logits, lives = model.predict(images)
    assert torch.equal(logits, model(images))
    assert torch.equal(lives.life, model.lives(images).life)
    assert torch.equal(lives.kept, model.lives(images).kept)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["dynamic", "dynamic-distilled", "dynamic-dinov3", "dynamic-rope-mixed"])
def test_one_dynamic_model_takes_several_sizes(name: str, way: str) -> None:
    model = slim(name, way)
    for height, width in [(48, 48), (40, 56), (48, 48)]:
        images = torch.nn.functional.interpolate(photos(name, 8), (height, width), mode="bilinear")
        model.calibrate([images])
        check(model, images, way)
        assert model.lives(images).grid == (height // 8, width // 8)


@pytest.mark.parametrize("name", FEW)
def test_heirs_matter(name: str) -> None:
    """The same patches die with and without heirs, and the answers are not the same."""
    plain, images = slim(name, kept=(36, 36, 9, 9, 9)), photos(name)
    heirs = slim(name, "fixed, merge", kept=(36, 36, 9, 9, 9))
    assert torch.equal(plain.lives(images).life, heirs.lives(images).life)
    assert far_apart(plain(images), heirs(images))


def test_the_reference_hides_the_dead() -> None:
    """Whatever a patch holds when it dies, the class token never learns of it."""
    vit, images = built("vit"), photos("vit")
    life = torch.full((3, 36), 5.0)
    life[:, 7] = 0
    changed = images.clone()
    changed[:, :, 8:16, 8:16] += 10  # patch 7 of a 6 x 6 grid
    with dropping(vit, life):
        assert torch.equal(vit(images), vit(changed))
    assert far_apart(vit(images), vit(changed))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*FEW, "residual-post-norm", "grouped-queries", "parallel-scaling"])
def test_float64(name: str, way: str) -> None:
    """What is left of the differences to the reference is rounding: they vanish with it."""
    model, images = slim(name, way, cast(name, torch.float64), drops=(2, 4)), photos(name).double()
    lives = model.lives(images)
    assert_some_die(lives, way)
    logits, features = masked(model, images, lives)
    assert_close(model(images), logits, 1e-12)
    assert_close(model.forward_features(images), features, 1e-12)


def check_half(name: str, ways: tuple[str, str], dtype: torch.dtype) -> None:
    """Against the reference in half precision under the same plan, ours is off by what rounding costs, not more."""
    images = photos(name).to(dtype)
    model = slim(name, ways[1], cast(name, dtype), drops=(2, 4))
    rounding = distance(model.backbone.vit(images).float(), built(name)(photos(name)))
    for way in ways:
        plan = model.set_mode(WAYS[way]["mode"]).plan(images)
        assert_some_die(plan.lives(), way)
        logits, features = masked(model, images, plan.lives(), plan)
        ours = model(images)
        assert ours.dtype == dtype
        assert_close(ours.float(), logits.float(), max(0.01, 2 * rounding))
        assert_close(model.forward_features(images).float(), features.float(), 0.05)


HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    check_half(name, ("fixed", "adaptive"), dtype)


@pytest.mark.parametrize(("name", "dtype"), [(n, d) for n in FAMILIES for d in HALF if n in FEW or d is HALF[0]])
def test_half_precision_with_heirs(name: str, dtype: torch.dtype) -> None:
    check_half(name, ("fixed, merge", "adaptive, merge"), dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_merging_many_patches_stays_in_range(dtype: torch.dtype) -> None:
    """250 patches of size 300: their sum leaves float16's range, their mean does not."""
    patches = torch.full((1, 251, 4), 300.0, dtype=dtype)
    everybody = MergeTargets(torch.zeros(1, 250, dtype=torch.long), torch.ones(1, 250))
    mean, size = merge(patches, torch.ones(1, 251), everybody)
    assert torch.equal(mean, patches[:, :1])
    assert size.tolist() == [[251.0]]
    rows, stage = (
        patches[0],
        Stage(range(1), torch.arange(1), (0, 1), torch.arange(1, 251), torch.zeros(250).long(), torch.ones(250)),
    )
    mean, size = merge_rows(rows.clone(), torch.ones(251), stage)
    assert (mean[0].float() - 300).abs().max() <= 300 * torch.finfo(dtype).eps * 16
    assert size[0] == 251


@pytest.mark.parametrize("way", WAYS)
def test_autocast(way: str) -> None:
    """Under autocast, ours and the reference stay as close as bf16 allows."""
    model, images = slim("vit", way), photos("vit")
    with torch.autocast("cpu", torch.bfloat16):
        plan = model.plan(images)
        ours, theirs = model(images), masked(model, images, plan.lives(), plan)[0]
    assert_some_die(plan.lives(), way)
    assert_close(ours.float(), theirs.float(), 0.05)


@pytest.mark.parametrize("way", WAYS)
def test_autocast_decides_as_without(way: str) -> None:
    """From the same tokens; and a patch that nobody leaves anything to keeps all its digits."""
    model = slim("vit", way)
    embedded = model.backbone.embed(photos("vit"))
    tokens = model.before_start(embedded)
    plain = model.decide(tokens, embedded)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model.decide(tokens, embedded)
        patches, targets = torch.randn(1, 3, 8), MergeTargets(torch.tensor([[1]]), torch.tensor([[0.5]]))
        after, _ = merge(patches, torch.ones(1, 3), targets)
    assert torch.equal(plain.score, cast.score)
    assert torch.equal(plain.order, cast.order)
    if plain.merge_targets is not None:
        assert all(torch.equal(a, b) for a, b in zip(plain.merge_targets, cast.merge_targets, strict=True))
    assert torch.equal(after[:, 0], patches[:, 0])
