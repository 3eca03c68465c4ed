"""Images of different sizes in one call: each gets what it gets alone, in the order of the list."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import families
import pytest
import torch
from families import OTHER_SIZE, Family, liven
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_close, masked
from slim_models import START, VARIANTS, far_apart, slim
from torch import Tensor, nn

from patchlife import LifeConfig, SlimModel, wrap
from patchlife.errors import ConfigError, UnsupportedModelError
from patchlife.slimming.run import mixed

NAMES = (
    "dynamic",
    "dynamic-distilled",
    "dynamic-registers",
    "dynamic-siglip",
    "gap",
    "no-classifier",
    "dynamic-eva02",
    "dynamic-rope-mixed",
    "dynamic-dinov3",
)
OWN = {
    "gap": Family("vit_little_patch16_reg4_gap_256", {"dynamic_img_size": True}, OTHER_SIZE),
    "no-classifier": Family("vit_tiny_patch16_224", {"dynamic_img_size": True, "num_classes": 0}, OTHER_SIZE),
}
"""Models that only this file tests."""

SIZES = [(40, 56), (48, 48), (40, 56), (32, 72), (32, 40), (48, 40), (72, 16)]


@cache
def built(name: str) -> nn.Module:
    """The small model of a family, or of `OWN`, which is shared by all tests."""
    if name not in OWN:
        return families.built(name)
    return liven(OWN[name].make(OWN[name].entry, **OWN[name].arguments)).eval()


def fresh(name: str) -> nn.Module:
    """A copy of `built` that tests may change."""
    return copy.deepcopy(built(name))


def pictures(sizes: list[tuple[int, int]], seed: int = 0) -> list[Tensor]:
    """Random images (channels, height, width) of these sizes and of different contrasts."""
    draw = torch.Generator().manual_seed(seed)
    contrasts = torch.linspace(0.3, 1.5, len(sizes))
    return [torch.randn(3, *size, generator=draw) * contrast for size, contrast in zip(sizes, contrasts, strict=True)]


def model_of(name: str, variant: str, **changes: Any) -> SlimModel:
    """A small model for any image size. In adaptive mode it is calibrated for every number of patches of the tests."""
    model = slim(name, variant.replace("adaptive", "fixed"), **{"vit": built(name), **changes})
    if "adaptive" in variant:
        model.calibrate([pictures([size] * 4, seed=7) for size in dict.fromkeys(SIZES)]).set_mode("adaptive")
    return model


def solo(model: SlimModel, images: list[Tensor]) -> Tensor:
    """The results of runs on one image each."""
    return torch.cat([model.output(image[None]) for image in images])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_each_image_gets_its_solo_result(name: str, variant: str) -> None:
    model, images = model_of(name, variant), pictures(SIZES)
    logits, lives = model.predict(images)
    assert_close(logits, solo(model, images))
    assert_close(model(images), logits)
    assert far_apart(logits, torch.cat([model.backbone.output(image[None]) for image in images]))
    for image, own, alone in zip(images, lives, model.lives(images), strict=True):
        expected = model.lives(image[None])
        assert own.grid == expected.grid == (image.shape[1] // 8, image.shape[2] // 8)
        assert torch.equal(own.life, expected.life)
        assert torch.equal(own.kept, expected.kept)
        assert torch.equal(alone.life, expected.life)
    assert len({own.kept[0, -1].item() for own in lives}) > 1


@settings(max_examples=25)
@given(
    st.sampled_from(["dynamic", "gap", "dynamic-registers", "dynamic-rope-mixed"]),
    st.sampled_from([*VARIANTS]),
    st.lists(st.tuples(st.integers(3, 7), st.integers(3, 7)), min_size=2, max_size=5),
    st.sampled_from([(2,), (2, 3), (3, 4), (2, 3, 4)]),
    st.sampled_from([0.8, 0.9, 1.0]),
    st.integers(0, 2**31),
)
def test_any_sizes_and_settings(
    name: str, variant: str, grids: list[tuple[int, int]], drops: tuple[int, ...], budget: float, seed: int
) -> None:
    with torch.no_grad():
        config = LifeConfig(**{**VARIANTS[variant], "mode": "fixed"}, start=START, drops=drops, budget=budget)
        sizes = [(8 * rows, 8 * columns) for rows, columns in grids]
        model, images = wrap(built(name), config), pictures(sizes, seed)
        try:
            if "adaptive" in variant:  # on other images: a threshold lies on a score if its image is there twice
                model.calibrate([[image] * 2 for image in pictures(sizes, seed + 1)]).set_mode("adaptive")
            together = model(images)
        except ConfigError:  # few patches, late drop points: one of the images cannot reach the budget alone either
            with pytest.raises(ConfigError, match=r"budget 0\.\d is out of reach"):
                solo(model, images)
            return
        assert_close(together, solo(model, images))


def test_the_solo_result_is_the_one_of_the_slow_reference() -> None:
    model, images = model_of("dynamic", "fixed, merge"), pictures(SIZES)
    logits, lives = model.predict(images)
    for row, own, image in zip(logits, lives, images, strict=True):
        assert_close(row[None], masked(model, image[None], own)[0])


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
@pytest.mark.parametrize("name", NAMES)
def test_budget_1_is_the_dense_model_on_each_image(name: str, mode: str) -> None:
    images = pictures(SIZES)
    logits, lives = slim(name, budget=1.0, vit=built(name)).set_mode(mode).predict(images)
    assert_close(logits, torch.cat([built(name)(image[None]) for image in images]))
    assert all((own.life == own.depth).all() for own in lives)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_image_does_not_depend_on_the_others_nor_on_its_place(variant: str) -> None:
    model, images = model_of("dynamic", variant), pictures(SIZES)
    logits = model(images)
    order = [3, 0, 6, 2, 5, 4, 1]
    assert_close(model([images[i] for i in order]), logits[order])
    assert_close(model(images[:2] + pictures([(48, 40), (72, 16)], seed=9))[:2], logits[:2])
    broken = [images[0], torch.full_like(images[1], torch.nan), *images[2:]]
    found = model(broken)
    others = [0, 2, 3, 4, 5, 6]
    assert_close(found[others], logits[others])
    assert found[1].isnan().any()


@pytest.mark.parametrize("budget", [0.65, 0.8])
def test_fixed_mode_spends_the_budget_at_each_size(budget: float) -> None:
    model, sizes = slim("dynamic", budget=budget), [(96, 96), (128, 64), (64, 112)]
    images = pictures(sizes)
    for own, size in zip(model.predict(images)[1], sizes, strict=True):
        assert own.kept[0].tolist() == list(model.schedule(size).kept)
        assert 0.96 * budget < model.flops_of(own, size)[0] / model.cost(size).dense <= budget


def test_images_of_one_size_run_as_a_batch() -> None:
    """Also on models that take one size only, and in training mode; lives are a list in either case."""
    model, images = slim("vit"), pictures([(48, 48)] * 3)
    logits, lives = model.predict(images)
    assert torch.equal(logits, model(torch.stack(images)))
    assert [type(own).__name__ for own in lives] == ["Lives"] * 3
    assert torch.equal(lives[2].life, model.lives(torch.stack(images)).life[2:])
    assert torch.equal(model(tuple(image[None] for image in images)), logits)
    vit = fresh("vit")
    assert wrap(vit.train())(images).shape == (3, 10)


def test_embeddings_of_different_sizes() -> None:
    model, images = model_of("gap", "fixed, merge"), pictures(SIZES)
    vectors, lives = model.embedding(images)
    assert_close(vectors, torch.cat([model.embedding(image[None])[0] for image in images]))
    assert len(lives) == len(images)


def test_each_size_is_embedded_and_scored_once() -> None:
    """All blocks run once on the tokens of all images."""
    model, images = slim("dynamic", vit=fresh("dynamic")), pictures(SIZES)
    rows: dict[str, list[tuple[int, ...]]] = {"embed": [], "score": [], "block 0": [], "block 4": []}
    hooked = {"embed": model.patch_embed, "block 0": model.blocks[0].norm1, "block 4": model.blocks[4].norm1}
    for name, module in {**hooked, "score": model.scorer}.items():
        module.register_forward_hook(lambda _, args, __, name=name: rows[name].append(tuple(args[0].shape)))
    _, lives = model.predict(images)
    assert len(rows["embed"]) == len(rows["score"]) == len(set(SIZES))
    tokens = sum(1 + h // 8 * w // 8 for h, w in SIZES)
    assert rows["block 0"] == [(tokens, 48)]
    assert rows["block 4"] == [(sum(1 + int(own.kept[0, 4]) for own in lives), 48)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = slim("dynamic", vit=fresh("dynamic").to(dtype))
    images = [image.to(dtype) for image in pictures(SIZES)]
    tolerance = 1e-12 if dtype == torch.float64 else 0.05
    assert_close(model(images).double(), solo(model, images).double(), tolerance)


def test_gradients_flow_to_every_image() -> None:
    model, images = model_of("dynamic", "fixed, merge", vit=fresh("dynamic")), pictures(SIZES[:4])
    gradients = []
    with torch.enable_grad():
        for run in (model, lambda given: solo(model, given)):
            pixels = [image.clone().requires_grad_() for image in images]
            run(pixels).square().sum().backward()
            gradients.append([image.grad for image in pixels])
    for found, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        assert_close(found / expected.abs().max(), expected / expected.abs().max(), 1e-4)


# ---- errors

ERRORS = {
    "empty": ([], "got an empty one"),
    "not images": ("photo.jpg", "as a list of images, got str"),
    "a path": (["photo.jpg"], "got str at position 0"),
    "a batch in the list": ([torch.zeros(3, 48, 48), torch.zeros(2, 3, 48, 48)], r"\(2, 3, 48, 48\) at position 1"),
    "grey": ([torch.zeros(1, 48, 48), torch.zeros(3, 40, 48)], r"takes images of 3 channel\(s\), got 1"),
    "cut": ([torch.zeros(3, 48, 48), torch.zeros(3, 44, 48)], "44 x 48 pixels cannot be cut into patches of 8 x 8"),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("call", ["output", "predict", "lives", "embedding"])
def test_images_that_do_not_fit_are_refused(case: str, call: str) -> None:
    images, message = ERRORS[case]
    with pytest.raises(ConfigError, match=message):
        getattr(slim("dynamic"), call)(images)


def test_a_model_of_one_size_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"takes images of 48 x 48 pixels, got 40 x 56.*dynamic_img_size=True"):
        slim("vit")(pictures([(48, 48), (40, 56)]))


def test_training_mode_is_refused() -> None:
    model = wrap(fresh("dynamic").train())
    with pytest.raises(ConfigError, match=r"one size in training mode, got several; call \.eval\(\) first"):
        model(pictures(SIZES))


def test_a_prediction_for_each_patch_is_refused() -> None:
    vit = fresh("dynamic")
    vit.global_pool = ""
    with pytest.raises(ConfigError, match=r"a prediction for each patch.*one batch for each size"):
        wrap(vit, LifeConfig(start=START, budget=0.7))(pictures(SIZES))


def test_a_size_without_thresholds_is_refused() -> None:
    model = slim("dynamic", "adaptive")
    with pytest.raises(ConfigError, match=r"64 x 64 pixels \(64 patches; calibrated for: 35\).*calibrate\(batches\)"):
        model(pictures([(40, 56), (64, 64)]))


def test_other_calls_do_not_take_lists() -> None:
    for call in ("plan", "forward_features"):
        with pytest.raises(ConfigError, match=r"must be a tensor .*, got list; only output, predict"):
            getattr(slim("dynamic"), call)(pictures(SIZES))


def test_attachments_that_would_have_no_effect_are_refused() -> None:
    """Blocks are not called as modules then, in fixed mode either; images of one size still run."""
    vit = fresh("dynamic")
    model, images = slim("dynamic", vit=vit), pictures(SIZES)
    vit.blocks[3].register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match=r"blocks\.3 would have no effect.*images of one size"):
        model(images)
    assert model(images[1][None]).shape == (1, 10)


def test_places_are_those_of_the_list() -> None:
    groups = mixed.by_size(pictures([(8, 8), (16, 8), (8, 8)]))
    assert [(places, tuple(batch.shape)) for places, batch in groups] == [([0, 2], (2, 3, 8, 8)), ([1], (1, 3, 16, 8))]


@pytest.mark.parametrize("restore", ["target", "residual"])
@pytest.mark.parametrize("variant", ["fixed, merge", "adaptive, merge"])
def test_dropped_patches_are_restored_before_pooling(variant: str, restore: str) -> None:
    model, images = model_of("gap", variant, restore=restore), pictures(SIZES)
    assert_close(model(images), solo(model, images))
    with model.temporarily(restore="last"):
        last = model(images)
    assert far_apart(model(images), last)
