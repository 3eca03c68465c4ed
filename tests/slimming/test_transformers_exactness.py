"""Fixed and adaptive runs of transformers' models equal the slow reference: its own model with patches masked out."""

from __future__ import annotations

import copy

import pytest
import torch
from reference import GivenScores, assert_close, restored_tokens, targets_of
from slim_models import assert_some_dropped, far_apart
from transformers_families import (
    ANY_SIZE,
    FAMILIES,
    FEW,
    OTHER_SIZE,
    VARIANTS,
    arguments,
    built,
    fresh,
    main_output,
    photos,
    slim,
    tensors,
)
from transformers_reference import assert_same_outputs, dropping, masked

from patchlife import LifeConfig, SlimModel, wrap
from patchlife.backbones.transformers_models import CORES, HEADS


def test_every_supported_class_has_a_family() -> None:
    assert {family.kind for family in FAMILIES.values()} == {*CORES, *HEADS}


def check(model: SlimModel, name: str, images: torch.Tensor, variant: str) -> None:
    """All outputs, with and without hidden states, equal those of the reference, and differ from the dense model's."""
    lives = model.lives(images)
    assert_some_dropped(lives, variant)
    for more in ({}, {"output_hidden_states": True}):
        given = arguments(name, images, **more)
        expected = masked(model, lives, given)
        assert_same_outputs(model(**given), expected)
        dense = tensors(model.wrapped(**given))
        assert any(far_apart(tensor, dense[place]) for place, tensor in tensors(expected).items())


@pytest.mark.contract("{variant}", library="transformers")
@pytest.mark.contract("features", library="transformers")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_all_outputs(name: str, variant: str) -> None:
    check(slim(name, variant, drops=(2, 4)), name, photos(name), variant)


@pytest.mark.parametrize("kept", [(36, 36, 29, 21, 14), (36, 36, 20, 20, 1), (36, 36, 36, 36, 12)])
@pytest.mark.parametrize("name", FEW)
def test_any_schedule(name: str, kept: tuple[int, ...]) -> None:
    check(slim(name, "fixed, merge", kept=kept), name, photos(name), "fixed, merge")


@pytest.mark.parametrize("variant", ["fixed, merge", "adaptive"])
@pytest.mark.parametrize("name", ANY_SIZE)
def test_other_image_sizes(name: str, variant: str) -> None:
    model, images = slim(name, variant), photos(name, size=OTHER_SIZE)
    if variant.startswith("adaptive"):
        model.calibrate([photos(name, 8, seed=1, size=OTHER_SIZE)])
    check(model, name, images, variant)
    assert model.lives(images).grid == (5, 7)


@pytest.mark.parametrize("name", FEW)
def test_images_that_are_not_a_multiple_of_the_patch_size(name: str) -> None:
    model = slim(name)
    check(model, name, photos(name, size=(51, 44)), "fixed")
    assert model.lives(photos(name, size=(51, 44))).grid == (6, 5)


@pytest.mark.parametrize("variant", ["fixed", "adaptive, merge"])
@pytest.mark.parametrize("name", FAMILIES)
def test_output_and_predict_give_logits_or_embedding_of_the_same_run(name: str, variant: str) -> None:
    model, images = slim(name, variant), photos(name)
    output, lives = model.predict(images)
    assert torch.equal(output, model.output(images))
    assert torch.equal(lives.life, model.lives(images).life)
    given = arguments(name, images)
    expected = main_output(model(**given))
    if expected is None:  # a backbone, MAE, SigLIP without head: the class token, or the mean of the patches, or all
        tokens = masked(model, lives, {**given, "output_hidden_states": True}).hidden_states[-1]
        tokens = model.backbone.norm(tokens)
        expected = tokens if not model.backbone.pools else tokens[:, 0] if model.backbone.prefix else tokens.mean(dim=1)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FEW)
def test_merging_changes_the_output_and_not_the_lives(name: str) -> None:
    plain, images = slim(name, kept=(36, 36, 9, 9, 9)), photos(name)
    merging = slim(name, "fixed, merge", kept=(36, 36, 9, 9, 9))
    assert torch.equal(plain.lives(images).life, merging.lives(images).life)
    assert far_apart(plain.output(images), merging.output(images))


# ---- what the places of dropped patches hold


@pytest.mark.parametrize("how", ["target", "residual"])
@pytest.mark.parametrize("variant", ["fixed, merge", "adaptive, merge"])
@pytest.mark.parametrize("name", ["vit-classifier", "siglip", "dinov2-backbone"])
def test_dropped_patches_are_restored_in_hidden_states_and_feature_maps(name: str, variant: str, how: str) -> None:
    model, images = slim(name, variant, drops=(2, 4), restore=how), photos(name)
    plan, backbone = model.plan(images), model.backbone
    life, given = plan.lives().life, arguments(name, images, output_hidden_states=True)
    with dropping(backbone.blocks, backbone.prefix, life, model.start, True, targets_of(plan)) as dropper:
        backbone.model(**given)
    expected = [restored_tokens(dropper, block, how) for block in range(backbone.depth)]
    outputs = model(**given)
    for state, wanted in zip(outputs.hidden_states[1:-1], expected[:-1], strict=True):
        assert_close(state, wanted)
    if name == "dinov2-backbone":
        for feature_map, block in zip(outputs.feature_maps, (1, 3, 4), strict=True):
            assert_close(feature_map.flatten(2).transpose(1, 2), backbone.norm(expected[block])[:, 1:])
    else:
        assert_close(model.output(images), backbone.classify(backbone.norm(expected[-1])))
    with model.temporarily(restore="last"):
        assert far_apart(model(**given).hidden_states[4], outputs.hidden_states[4])


# ---- one image among others, ties, defects


@pytest.mark.contract("batch", library="transformers")
@pytest.mark.parametrize("variant", ["fixed", "adaptive, merge"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_alone_equals_the_image_in_a_batch(name: str, variant: str) -> None:
    model, images = slim(name, variant), photos(name, 4)
    together = tensors(model(**arguments(name, images, output_hidden_states=True)))
    lives = model.lives(images)
    for image in (0, 3):
        alone = images[image : image + 1]
        assert torch.equal(model.lives(alone).life[0], lives.life[image])
        for place, tensor in tensors(model(**arguments(name, alone, output_hidden_states=True))).items():
            torch.testing.assert_close(tensor[0], together[place][image], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
@pytest.mark.parametrize("variant", ["fixed, merge", "adaptive, merge"])
@pytest.mark.parametrize("name", FEW)
def test_a_broken_image_does_not_change_the_others(name: str, variant: str, fault: float) -> None:
    model, images = slim(name, variant), photos(name, 4)
    broken = images.clone()
    broken[1, :, 10:20, 10:20] = fault
    output, lives = model.predict(broken)
    others = [0, 2, 3]
    torch.testing.assert_close(output[others], model.output(images)[others])
    assert torch.equal(lives.life[others], model.lives(images).life[others])
    assert not torch.isfinite(output[1]).all(), "a broken image must not get a finite output"


@pytest.mark.parametrize("name", ["vit-classifier", "dinov3"])
def test_of_equal_and_undefined_scores_the_lower_patch_stays(name: str) -> None:
    score = torch.zeros(2, 36)
    score[1, ::2] = torch.nan
    model = wrap(built(name), LifeConfig(kept=(36, 36, 6, 6, 6), start=2), GivenScores(score))
    lives = model.lives(photos(name, 2))
    expected = torch.full((36,), 2)
    expected[:6] = 5
    assert torch.equal(lives.life[0], expected)
    stays = lives.life[1] == 5
    assert not stays[::2].any()
    assert stays[1:13:2].all()


# ---- precision


@pytest.mark.parametrize("variant", ["fixed, merge", "adaptive, merge"])
@pytest.mark.parametrize("name", ["vit-classifier", "deit-teacher", "dinov3", "clip", "siglip", "dinov2-backbone"])
def test_float64(name: str, variant: str) -> None:
    """Not for eager attention: transformers computes its softmax in float32."""
    model, images = slim(name, variant, fresh(name).double()), photos(name).double()
    given = arguments(name, images, output_hidden_states=True)
    assert_same_outputs(model(**given), masked(model, model.lives(images), given), 1e-10)


@pytest.mark.contract("half", library="transformers")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["fixed, merge", "adaptive, merge"])
@pytest.mark.parametrize(
    "name", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in FEW)]
)
def test_half_precision(name: str, variant: str, dtype: torch.dtype) -> None:
    """The errors are those of half precision: not larger than those of the reference in half precision."""
    half = fresh(name).to(dtype)
    model, images = slim(name, variant, half), photos(name).to(dtype)
    given = arguments(name, images, output_hidden_states=True)
    outputs, lives, plan = tensors(model(**given)), model.lives(images), model.plan(images)
    single = slim(name, variant, copy.deepcopy(half).float())
    exact = tensors(masked(single, lives, {**given, "pixel_values": images.float()}, plan))
    rounded = tensors(masked(model, lives, given, plan))
    for place, tensor in outputs.items():
        assert tensor.dtype == rounded[place].dtype
        allowed = 3 * (rounded[place].float() - exact[place]).abs().max() + 0.01 * exact[place].abs().max()
        assert (tensor.float() - exact[place]).abs().max() <= allowed, place
