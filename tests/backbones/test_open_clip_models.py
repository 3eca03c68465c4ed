"""Whole CLIP models of open_clip with a slimmed image tower: similarities, zero-shot, checkpoints; what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from open_clip_models import BUDGET, SMALL, START, assert_close, built, far_apart, liven, open_clip, small_clip
from torch import Tensor

from patchlife import LifeConfig, wrap
from patchlife.backbones import adapt
from patchlife.data import Preprocess
from patchlife.errors import UnsupportedModelError

TEXTS = ["a diagram", "a dog", "a cat"]
IMAGES = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def tokens(texts: list[str]) -> Tensor:
    return open_clip.SimpleTokenizer()(texts)


def slimmed(clip: Any, budget: float) -> Any:
    """A copy of ``clip`` with a slimmed image tower."""
    other = copy.deepcopy(clip)
    other.visual = wrap(other.visual, LifeConfig(budget=budget, start=START))
    return other


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
def test_similarities_at_budget_one_are_unchanged(kind: str) -> None:
    clip, texts = small_clip(kind=getattr(open_clip, kind), output_dict=True), tokens(TEXTS)
    other = slimmed(clip, 1.0)
    assert_close(other.encode_image(IMAGES, normalize=True), clip.encode_image(IMAGES, normalize=True))
    assert_close(other(IMAGES, texts), clip(IMAGES, texts))
    assert_close(other.get_logits(IMAGES, texts), clip.get_logits(IMAGES, texts))
    expected = clip.forward_intermediates(IMAGES, texts, output_logits=True)
    assert_close(other.forward_intermediates(IMAGES, texts, output_logits=True), expected)
    other.visual.set_budget(BUDGET)
    assert far_apart(other(IMAGES, texts), clip(IMAGES, texts))
    actual = other.forward_intermediates(IMAGES, texts, image_indices=[1, 4])
    expected = clip.forward_intermediates(IMAGES, texts, image_indices=[1, 4])
    assert [x.shape for x in actual["image_intermediates"]] == [x.shape for x in expected["image_intermediates"]]


def test_zero_shot_classification() -> None:
    clip = small_clip()
    build = open_clip.build_zero_shot_classifier
    arguments = (open_clip.SimpleTokenizer(), ["dog", "cat"], open_clip.OPENAI_IMAGENET_TEMPLATES[:3])
    expected, other = build(clip, *arguments), slimmed(clip, BUDGET)
    assert_close(build(other, *arguments), expected)
    logits = 100 * other.encode_image(IMAGES, normalize=True) @ expected
    assert logits.shape == (4, 2)
    assert_close(other.visual.output(IMAGES), other.encode_image(IMAGES))


def test_a_coca_model() -> None:
    multimodal = {"width": 24, "heads": 2, "layers": 1, "context_length": 76, "vocab_size": 49408}
    vision = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 4, "output_tokens": True}
    clip = liven(
        open_clip.CoCa(
            24,
            multimodal_cfg=multimodal,
            text_cfg={"width": 24, "heads": 2, "layers": 1, "embed_cls": True, "output_tokens": True},
            vision_cfg={"layers": 5, "width": 48, "head_width": 12, "patch_size": 8, "image_size": 48, **vision},
        )
    ).eval()
    texts = tokens([*TEXTS, "a bird"])[:, :76]
    expected = clip(IMAGES, texts)
    assert_close(slimmed(clip, 1.0)(IMAGES, texts), expected)
    actual = slimmed(clip, BUDGET)(IMAGES, texts)
    assert actual.keys() == expected.keys()
    assert far_apart(actual["image_features"], expected["image_features"])


@pytest.mark.parametrize("pool", ["map", "avg"])
def test_a_model_with_an_image_tower_of_timm(pool: str) -> None:
    """SigLIP models of open_clip hold timm's models: the trunk is wrapped in its place."""
    vision = {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear", "image_size": 160}
    clip = small_clip(vision, kind=open_clip.CustomTextCLIP, init_logit_bias=-10.0)
    if pool == "map":
        trunk = timm.create_model("vit_base_patch16_siglip_224", depth=4, embed_dim=64, num_heads=4, img_size=160)
        clip.visual.trunk = trunk.eval()
        trunk.reset_classifier(0)
    images, texts = torch.randn(2, 3, 160, 160), tokens(TEXTS)
    expected = clip(images, texts)
    features = clip.visual.forward_intermediates(images, 2)
    with pytest.raises(UnsupportedModelError, match=r"visual\.trunk = patchlife\.wrap\(visual\.trunk\)"):
        wrap(clip.visual)
    clip.visual.trunk = wrap(clip.visual.trunk, LifeConfig(budget=1.0))
    assert_close(clip(images, texts), expected)
    assert_close(clip.visual.forward_intermediates(images, 2), features)
    clip.visual.trunk.set_budget(0.7)
    assert far_apart(clip(images, texts)[0], expected[0])


# ---- what open_clip's training and checkpoint code uses


def test_state_dicts_of_the_whole_model() -> None:
    clip = small_clip()
    other = slimmed(clip, BUDGET)
    state = other.state_dict()
    assert set(state) - set(clip.state_dict()) == {"visual._extra_state"}
    fresh = slimmed(liven(small_clip(), seed=1), 0.8)
    fresh.load_state_dict(state)
    assert fresh.visual.settings == other.visual.settings
    assert_close(fresh.encode_image(IMAGES), other.encode_image(IMAGES))
    fresh = slimmed(liven(small_clip(), seed=1), BUDGET)
    fresh.load_state_dict(clip.state_dict())  # a checkpoint without patchlife
    assert_close(fresh.encode_image(IMAGES), other.encode_image(IMAGES))
    other.visual = other.visual.unwrap()
    assert_close(other.encode_image(IMAGES), clip.encode_image(IMAGES))


def test_checkpoints_are_loaded_by_open_clip(tmp_path: Any) -> None:
    clip = small_clip()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    other = slimmed(liven(small_clip(), seed=1), 1.0)
    open_clip.load_checkpoint(other, str(tmp_path / "clip.pt"))
    assert_close(other.encode_image(IMAGES), clip.encode_image(IMAGES))


@pytest.mark.parametrize("groups", [0, 1, 3])
def test_locking_checkpointing_and_weight_decay(groups: int) -> None:
    clip = small_clip()
    other = slimmed(clip, BUDGET)
    assert other.no_weight_decay() == clip.no_weight_decay()
    for model in (clip, other):
        model.lock_image_tower(unlocked_groups=groups)
        model.set_grad_checkpointing()
    trainable = {name for name, parameter in other.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, parameter in clip.named_parameters() if parameter.requires_grad}
    assert other.visual.transformer.grad_checkpointing


def test_a_training_step_of_the_whole_model() -> None:
    """With open_clip's loss; gradients reach both towers."""
    from open_clip.loss import ClipLoss

    clip = slimmed(small_clip(output_dict=True), BUDGET).train()
    with torch.enable_grad():
        output = clip(IMAGES, tokens([*TEXTS, "a bird"]))
        ClipLoss()(**output).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in clip.parameters())


# ---- preprocessing and refusals


def test_preprocessing_that_the_factory_stored() -> None:
    clip = small_clip()
    assert adapt(clip.visual).preprocess is None
    stored = {"size": 48, "mode": "RGB", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.3), "interpolation": "bicubic"}
    open_clip.set_model_preprocess_cfg(clip, {**stored, "resize_mode": "shortest", "fill_color": 0})
    expected = Preprocess((48, 48), 1.0, "center", "bicubic", (0.4, 0.5, 0.6), (0.2, 0.2, 0.3))
    assert adapt(clip.visual).preprocess == expected
    open_clip.set_model_preprocess_cfg(clip, {**stored, "resize_mode": "squash"})
    assert adapt(clip.visual).preprocess.crop_mode == "squash"
    open_clip.set_model_preprocess_cfg(clip, {**stored, "resize_mode": "longest"})
    assert adapt(clip.visual).preprocess is None  # it pads with a colour of its own


def test_the_description_of_a_model() -> None:
    backbone = adapt(built("plain"))
    assert backbone.family == "VisionTransformer, 1 prefix tokens, reads the class token"
    assert (backbone.dim, backbone.depth, backbone.prefix, backbone.num_classes) == (48, 5, 1, 0)
    assert (backbone.grid, backbone.channels, backbone.any_size) == ((6, 6), 3, False)
    assert adapt(built("not square")).grid == (4, 8)
    assert not adapt(built("unpooled")).pools
    assert "pools patches (attention, tok), norm last" in adapt(built("attentional pool")).family
    assert "CustomResidualAttentionBlock" in adapt(built("custom, scales")).family


def resnet() -> Any:
    return open_clip.CLIP(24, {"layers": (1, 1, 1, 1), "width": 8, "image_size": 64}, {"width": 32, "layers": 1}).visual


def scaled_cosine() -> Any:
    return open_clip.transformer.VisionTransformer(**SMALL, scaled_cosine_attn=True)


REFUSED = {
    "whole model": (small_clip, r"one inside a CLIP: .*model\.visual = patchlife\.wrap\(model\.visual\)"),
    "custom text": (
        lambda: small_clip(kind=open_clip.CustomTextCLIP),
        r"one inside a CustomTextCLIP: .*model\.visual",
    ),
    "resnet": (resnet, "got ModifiedResNet: it is a convolutional network"),
    "text": (lambda: small_clip(kind=open_clip.CustomTextCLIP).text, "got TextTransformer: it has no patches"),
    "scaled cosine": (scaled_cosine, r"resblocks\.0\.attn uses scaled_cosine_attn"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_models_are_refused_with_the_reason(what: str) -> None:
    make, message = REFUSED[what]
    with pytest.raises(UnsupportedModelError, match=message):
        wrap(make())
