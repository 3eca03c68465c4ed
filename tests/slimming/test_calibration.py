"""Adaptive mode's thresholds meet the mean budget, however unevenly scores are spread over images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from costs import SIZES, vit_cost
from families import fresh, liven, photos
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_close, masked
from slim_models import slim
from torch import Tensor

from patchlife import LifeConfig, SlimModel, flops, wrap
from patchlife.errors import ConfigError, NumericalError
from patchlife.slimming import Calibration
from patchlife.slimming.plan import adaptive_plan
from patchlife.slimming.scorers import AttentionScorer

IMAGES = 64


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def fractions(patches: int) -> Tensor:
    """Mean 1 in every image, as of normalised attention; flat in some images and peaked in others."""
    weight = (normal(IMAGES, patches) * (0.2 + 2 * uniform(IMAGES, 1))).exp()
    return weight / weight.mean(dim=1, keepdim=True)


def one_in(nth: int, patches: int) -> Tensor:
    """The scores of one image in ``nth`` are far above those of all others."""
    return normal(IMAGES, patches) + 8.0 * (torch.arange(IMAGES) % nth == 0)[:, None]


SPREADS = {
    "uniform": lambda n: uniform(IMAGES, n),
    "fractions": fractions,
    "different means": lambda n: normal(IMAGES, n) + 3 * uniform(IMAGES, 1),
    "half of the images high": lambda n: one_in(2, n),
    "one image in eight high": lambda n: one_in(8, n),
    "one image high": lambda n: one_in(IMAGES, n),
    "heavy tails": lambda n: (normal(IMAGES, n) / uniform(IMAGES, n)).clamp(-1e6, 1e6),
}


def spent(score: Tensor, calibration: Calibration, cost, schedule) -> tuple[float, Tensor]:
    """(mean FLOPs over the images as a fraction of dense, kept per image and block)."""
    thresholds = calibration.thresholds(schedule.kept, cost.patches)
    counts = adaptive_plan(score, None, schedule, (1, cost.patches), thresholds).counts
    return sum(cost.total(image, decided=True) for image in counts.tolist()) / len(counts) / cost.dense, counts


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("size", ["vit_tiny_patch16_224", "deit_small_patch16_224", "vit_small_patch14_dinov2"])
def test_the_mean_budget_holds(size: str, spread: str) -> None:
    cost = vit_cost(**SIZES[size])
    score = SPREADS[spread](cost.patches)
    calibration = Calibration.of(score)
    for drops in ((3,), (3, 6), (3, 6, 9)):
        for budget in (0.5, 0.6, 0.75, 0.9, 0.97):
            schedule = calibration.solve(cost, budget, 3, drops)
            mean, counts = spent(score, calibration, cost, schedule)
            assert mean == pytest.approx(budget, rel=0.02), (drops, budget)
            assert mean == pytest.approx(calibration.mean_flops(cost, schedule.kept) / cost.dense, rel=0.02)
            assert (counts[:, :3] == cost.patches).all()
            assert (counts.diff(dim=1) <= 0).all()
            assert len(counts[:, -1].unique()) > 1


@pytest.mark.parametrize("spread", SPREADS)
def test_thresholds_keep_the_requested_mean_number_of_patches(spread: str) -> None:
    score = SPREADS[spread](196)
    calibration = Calibration.of(score)
    assert calibration.images == IMAGES
    assert (calibration.threshold.diff() <= 0).all()
    assert (calibration.square.diff() >= 0).all()
    for kept in (1, 20, 98, 150, 195):
        threshold = calibration.thresholds((kept,), 196)
        assert (score > threshold).sum(dim=1).float().mean() == pytest.approx(kept, abs=0.6)
    even = torch.linspace(0, 1, len(calibration.square)) ** 2
    assert (calibration.square >= even - 1e-2).all(), "a mean square is at least the square of the mean"


def test_a_block_that_keeps_all_patches_has_no_threshold() -> None:
    thresholds = Calibration.of(SPREADS["fractions"](196)).thresholds((196, 196, 50), 196)
    assert thresholds[:2].tolist() == [-torch.inf, -torch.inf]
    assert torch.isfinite(thresholds[2])


def test_ties_do_not_exceed_the_budget() -> None:
    """Patches of equal scores are kept or dropped together, so the mean cost may be below the budget, never above."""
    cost = vit_cost(**SIZES["vit_tiny_patch16_224"])
    score = (normal(IMAGES, 196) * 2).round() / 2
    calibration = Calibration.of(score)
    for budget in (0.5, 0.6, 0.75, 0.9):
        mean, _ = spent(score, calibration, cost, calibration.solve(cost, budget, 3, (3, 6)))
        assert 0.7 * budget <= mean <= 1.01 * budget


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    score = uniform(4, 9)
    score[2, 3] = bad
    with pytest.raises(NumericalError, match="not finite; check pixels and weights"):
        Calibration.of(score)


def test_calibration_without_images_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one image, got none"):
        Calibration.of(torch.empty(0, 9))


@settings(deadline=None)
@given(
    st.integers(1, 6),
    st.integers(2, 30),
    st.integers(0, 2**31),
    st.sampled_from([1e-6, 1.0, 1e30]),
)
def test_any_scores_give_a_falling_table(images: int, patches: int, seed: int, scale: float) -> None:
    score = torch.randn(images, patches, generator=torch.Generator().manual_seed(seed)).mul(2).round() * scale
    calibration = Calibration.of(score)
    assert not calibration.threshold.isnan().any()
    assert (calibration.threshold.diff() <= 0).all()
    assert (calibration.square.diff() >= 0).all()
    assert calibration.square[-1] == 1
    assert (score > calibration.threshold[-1]).all()
    assert not (score > calibration.threshold[0]).any()


def many_patches(mode: str, merge: bool) -> SlimModel:
    """A narrow ViT of twelve blocks and 196 patches: one patch is a small fraction of the cost."""
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=112, patch_size=8, embed_dim=48, num_heads=3, num_classes=10
    )
    return wrap(liven(vit).eval(), LifeConfig(mode=mode, merge=merge))


@pytest.mark.parametrize("merge", [False, True])
def test_a_model_meets_its_budget_over_its_calibration_images(merge: bool) -> None:
    images = torch.randn(24, 3, 112, 112) * torch.linspace(0.05, 2, 24)[:, None, None, None]
    model = many_patches("adaptive", merge).calibrate(images.split(8))
    for budget in (0.5, 0.65, 0.8, 0.95):
        lives = model.set_budget(budget).lives(images)
        per_image = model.flops_of(lives)
        assert sum(per_image) / 24 / flops(model).dense == pytest.approx(budget, rel=0.02)
        assert flops(model).slimmed == pytest.approx(sum(per_image) / 24, rel=0.02)
        assert max(per_image) > 1.02 * min(per_image), "all images cost the same"


def spent_by(model: SlimModel, images: Tensor) -> float:
    """FLOPs of a run on ``images``, as a fraction of the dense FLOPs at their size."""
    size = (images.shape[-2], images.shape[-1])
    return sum(model.flops_of(model.lives(images), size)) / len(images) / flops(model, size).dense


def images_of(side: int, count: int = 32, seed: int = 0) -> Tensor:
    """Random square images of unequal contrast."""
    images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return images * torch.linspace(0.05, 2, count)[:, None, None, None]


def test_thresholds_belong_to_an_image_size() -> None:
    """Scores of few patches are larger: with the thresholds of another size the mean cost misses the budget."""
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=48, num_heads=3, dynamic_img_size=True
    )
    model = wrap(liven(vit).eval(), LifeConfig(mode="adaptive", budget=0.7)).calibrate([images_of(64)])
    logits = model(images_of(64, seed=1))
    with pytest.raises(ConfigError, match=r"128 x 128 pixels \(256 patches; .*: 64\)"):
        model(images_of(128))
    model.calibrate([images_of(128)])
    assert torch.equal(model(images_of(64, seed=1)), logits), "calibration for one size must not change another size"
    model.calibrate([images_of(96, 16), images_of(96, 16, seed=2)])
    for side in (64, 128, 96):
        for budget in (0.6, 0.8):
            assert spent_by(model.set_budget(budget), images_of(side)) == pytest.approx(budget, rel=0.05), side
    assert spent_by(model.set_budget(0.7), images_of(128)) == pytest.approx(0.7, rel=0.02)
    model.calibrations = {
        (256, model.start): replace(model.calibrations[64, model.start], patches=256)
    }  # the thresholds of another size
    assert abs(spent_by(model.set_budget(0.7), images_of(128)) - 0.7) > 0.05


@pytest.mark.parametrize("size", [(120, 120), (136, 136), (112, 144)])
def test_thresholds_serve_sizes_with_about_as_many_patches(size: tuple[int, int]) -> None:
    """Scores are shares of an image, so thresholds are scaled by the number of patches."""
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=128, patch_size=8, embed_dim=48, num_heads=3, dynamic_img_size=True
    )
    model = wrap(liven(vit).eval(), LifeConfig(mode="adaptive", budget=0.7)).calibrate([images_of(128)])
    images = torch.nn.functional.interpolate(images_of(128), size, mode="nearest")
    assert spent_by(model, images) == pytest.approx(0.7, rel=0.04)
    with pytest.raises(ConfigError, match=r"96 x 96 pixels \(144 patches; calibrated for: 256\).*model\.calibrate"):
        model(images_of(96))
    model.calibrations = {
        (256, model.start): replace(
            model.calibrations[256, model.start], threshold=model.calibrations[256, model.start].threshold * 1.25
        )
    }
    assert abs(spent_by(model, images) - 0.7) > 0.04


def test_images_of_different_sizes_are_calibrated_together() -> None:
    """Each meets the budget at its own size on average; far apart sizes get thresholds of their own."""
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=128, patch_size=8, embed_dim=48, num_heads=3, dynamic_img_size=True
    )
    model = wrap(liven(vit).eval(), LifeConfig(mode="adaptive", budget=0.7))
    sizes = [(128, 128), (112, 144), (120, 128), (64, 64), (56, 72)]
    images = [
        torch.nn.functional.interpolate(images_of(64, 8, seed), size)[:, :, : size[0], : size[1]]
        for seed, size in enumerate(sizes)
    ]
    lists = [[batch[i] for batch in images] for i in range(8)]
    model.calibrate(lists)
    found = {key: calibration.images for key, calibration in model.calibrations.items()}
    assert found == {(patches, start): n for start in model.starts for patches, n in ((249, 24), (64, 16))}
    for first, end in ((0, 3), (3, 5)):
        spent = [spent_by(model, batch) for batch in images[first:end]]
        assert sum(spent) / len(spent) == pytest.approx(0.7, rel=0.02)


class OtherScale(AttentionScorer):
    """Its scores are not known to be shares of an image."""

    gives_shares = False


def test_thresholds_of_scores_on_another_scale_serve_their_own_number_of_patches_only() -> None:
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=128, patch_size=8, embed_dim=48, num_heads=3, dynamic_img_size=True
    )
    model = wrap(liven(vit).eval(), LifeConfig(mode="adaptive", budget=0.7), OtherScale())
    model.calibrate([images_of(128, 4)])
    with pytest.raises(ConfigError, match=r"120 x 120 pixels \(225 patches; calibrated for: 256\)"):
        model(images_of(120, 1))
    model.calibrate([[images_of(128, 1)[0], images_of(120, 1)[0]]])
    assert {patches for patches, _ in model.calibrations} == {256, 225}


def test_stated_flops_of_another_size_are_those_of_its_own_calibration() -> None:
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=48, num_heads=3, dynamic_img_size=True
    )
    model = wrap(liven(vit).eval(), LifeConfig(mode="adaptive", budget=0.7)).calibrate([images_of(64), images_of(128)])
    size, cost, counts = (128, 128), model.cost((128, 128)), model.schedule((128, 128)).kept
    assert flops(model, size).slimmed == round(model.calibrations[256, model.start].mean_flops(cost, counts))
    assert flops(model, size).slimmed != round(model.calibrations[64, model.start].mean_flops(cost, counts))


class Batch(dict):
    """A subclass of dict, which some libraries use for batches."""


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x, None],
        lambda x: {"pixel_values": x, "labels": 0},
        lambda x: Batch(image=x),
    ],
)
def test_batches_may_be_tensors_tuples_or_dicts(form: Callable[[Tensor], Any]) -> None:
    images = photos("vit", 8, seed=1)
    model = slim("vit").calibrate(map(form, images.split(3)))
    assert model.calibration.images == 8
    assert torch.allclose(model.calibration.threshold, slim("vit", "adaptive").calibration.threshold)


def test_calibration_accepts_a_data_loader() -> None:
    data = torch.utils.data.TensorDataset(photos("vit", 8, seed=1), torch.arange(8))
    model = slim("vit").calibrate(torch.utils.data.DataLoader(data, batch_size=4))
    assert torch.allclose(model.calibration.threshold, slim("vit", "adaptive").calibration.threshold)


@pytest.mark.parametrize("batch", [torch.zeros(3, 48, 48), "photo.jpg", {"labels": torch.zeros(3)}, [], (1, 2), None])
def test_batches_without_images_are_refused(batch: Any) -> None:
    with pytest.raises(ConfigError, match=r"expected .*\(batch, channels, height, width\).*; got "):
        slim("vit").calibrate([batch])


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("name", ["vit", "siglip", "dinov3"])
def test_gradients_flow_through_an_adaptive_run(name: str, merge: bool) -> None:
    """In eval mode, for saliency maps for example; they equal those of the slow reference."""
    model, images = slim(name, "adaptive, merge" if merge else "adaptive", fresh(name)), photos(name)
    plan = model.plan(images)
    gradients = []
    with torch.enable_grad():
        for run in (model, lambda x: masked(model, x, plan.lives())[0]):
            pixels = images.clone().requires_grad_()
            model.zero_grad(set_to_none=True)
            run(pixels).square().sum().backward()
            gradients.append((pixels.grad, model.wrapped.blocks[-1].mlp.fc1.weight.grad.clone()))
    for actual, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        assert_close(actual / expected.abs().max(), expected / expected.abs().max(), 1e-4)
