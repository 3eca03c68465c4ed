"""The adapters that are committed: whole, small, and free of local paths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import patchlife
from patchlife.backbones import build
from patchlife.life.adapter import read_adapter
from patchlife.life.regressor import LifeRegressor

HOME = Path(__file__).parents[2] / "recipes" / "vit_tiny"
ADAPTERS = ("head", "adapter")


@pytest.mark.parametrize("name", ADAPTERS)
def test_it_is_whole_and_small(name: str) -> None:
    about, tensors = read_adapter(HOME / name)
    assert about["head"]["kind"] == LifeRegressor.kind
    assert about["origin"]["checkpoint"] is None
    assert sum(file.stat().st_size for file in (HOME / name).iterdir()) <= 2_000_000
    assert any(key.startswith("change.") for key in tensors) == (name != "head")


@pytest.mark.shared
@pytest.mark.parametrize("name", ADAPTERS)
def test_it_answers_as_the_dense_model_mostly_does(name: str, shared: Path) -> None:
    from patchlife.images import Preprocess, list_photos, read_photo

    vit, _ = build("vit_tiny_patch16_224", shared / "weights" / "vit_tiny_patch16_224.safetensors")
    preprocess = Preprocess.from_timm_cfg(vit.pretrained_cfg)
    images = torch.stack([preprocess(read_photo(path)) for path in list_photos(shared / "data" / "in1k-samples")[::50]])
    model = patchlife.load(HOME / name, vit).set_budget(0.6)
    with torch.inference_mode():
        same = (model(images).argmax(dim=1) == vit(images).argmax(dim=1)).double().mean()
    assert same >= 0.7
