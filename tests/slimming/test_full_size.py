"""Each family once at full size, with random weights: identity and exactness on two images."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from families import liven
from reference import assert_close, masked
from slim_models import VARIANTS, assert_some_dropped, far_apart

from patchlife import LifeConfig, flops, wrap

FULL: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "deit_small_patch16_224": {},
    "deit_small_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_small_patch14_dinov2": {"img_size": 224},
    "vit_small_patch14_reg4_dinov2": {},  # 518 pixels: 1369 patches
    "vit_base_patch16_clip_quickgelu_224": {},
    "vit_base_patch16_siglip_224": {},
    "vit_medium_patch16_gap_240": {},
    "vit_little_patch16_reg4_gap_256": {},
    "vit_tiny_patch16_224.qk_norm": {"qk_norm": True},
    "vit_base_patch16_xp_224": {},
    "vit_pwee_patch16_reg1_gap_256": {},
    "vit_small_patch16_18x2_224": {},
    "vit_base_patch16_rpn_224": {},
    "eva02_tiny_patch14_224": {},
    "eva02_base_patch16_clip_224": {},
    "vit_small_patch16_dinov3": {"global_pool": "token"},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_pe_core_tiny_patch16_384": {},
    "vit_small_patch16_224.not_square": {"img_size": (160, 288)},
    "vit_tiny_patch16_224.dynamic": {"dynamic_img_size": True},
}


@pytest.fixture(autouse=True)
def free_memory() -> Iterator[None]:
    yield
    gc.collect()


def build(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """(full-size model with random weights, two images of its size); a dynamic model gets another size."""
    vit = liven(timm.create_model(name.split(".")[0], **FULL[name])).eval()
    size = (192, 272) if name.endswith(".dynamic") else vit.patch_embed.img_size
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    return vit, images * torch.tensor([0.4, 1.2])[:, None, None, None]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", FULL)
def test_identity_and_exactness(name: str) -> None:
    vit, images = build(name)
    size = tuple(images.shape[-2:])
    dense, features = vit(images), vit.forward_features(images)
    model = wrap(vit, LifeConfig(budget=1.0))
    assert_close(model(images), dense)
    assert_close(model.forward_features(images), features)
    for variant in ("fixed, merge", "adaptive"):
        model = wrap(vit, LifeConfig(**VARIANTS[variant])).calibrate([images])
        logits, lives = model.predict(images)
        assert_some_dropped(lives, variant)
        assert lives.grid == vit.patch_embed.dynamic_feat_size(size)
        many = lives.life.shape[1] > 512  # the rule then compares patches in few dimensions: `test_similarity.py`
        expected, expected_features = masked(model, images, lives, model.plan(images) if many else None)
        assert far_apart(expected, dense)
        assert_close(logits, expected, 2e-5)
        # random post-norm blocks amplify rounding; `test_float64` shows that it is rounding
        assert_close(model.forward_features(images), expected_features, 2e-4)
        spent = sum(model.flops_of(lives, size)) / 2
        assert spent == pytest.approx(flops(model, size).slimmed, rel=0.02)
        assert 0.97 * 0.6 <= spent / flops(model, size).dense <= 1.02 * 0.6
