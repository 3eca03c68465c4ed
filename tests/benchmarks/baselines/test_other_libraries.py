"""Methods of the comparison on a backbone of transformers: they run, or say that they are written for timm's blocks."""

from __future__ import annotations

import pytest
import torch
from transformers_families import built, photos

from patchlife.backbones import adapt
from patchlife.benchmarks.baselines import METHODS
from patchlife.errors import UnsupportedModelError

FOR_TIMM = ("evit", "tome", "ats", "diffrate", "ppt", "mame")


@pytest.mark.parametrize("name", [name for name in METHODS if name not in FOR_TIMM])
def test_a_method_runs_on_transformers_and_meets_its_flops(name: str) -> None:
    backbone, images = adapt(built("vit-classifier")), photos("vit-classifier")
    dense = METHODS["dense"].build(backbone, 1.0, images)
    assert torch.equal(dense(images), built("vit-classifier")(images).logits)
    method = METHODS[name].build(backbone, 0.7, images)
    assert method(images).shape == dense(images).shape
    assert method.flops(images) / dense.flops(images) == pytest.approx(1.0 if name == "dense" else 0.7, abs=0.06)


@pytest.mark.parametrize("name", FOR_TIMM)
def test_a_method_that_opens_timms_blocks_refuses_other_models_by_name(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="timm's blocks only, got ViTForImageClassification"):
        METHODS[name].build(adapt(built("vit-classifier")), 0.7, photos("vit-classifier"))
