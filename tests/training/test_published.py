"""The committed adapters are complete, small and without local paths."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import patchlife
from patchlife.adapters import read_adapter
from patchlife.backbones import build
from patchlife.errors import AdapterError
from patchlife.io.files import sha256_of
from patchlife.runtime.demo_model import demo_backbone, demo_folder
from patchlife.slimming.regressor import LifeRegressor

HOME = Path(__file__).parents[2] / "recipes" / "vit_tiny"
ADAPTERS = ("head", "adapter")


@pytest.mark.parametrize("name", ADAPTERS)
def test_it_is_complete_and_small(name: str) -> None:
    manifest, tensors = read_adapter(HOME / name)
    assert manifest["scorer"]["kind"] == LifeRegressor.kind
    assert manifest["origin"]["checkpoint"] is None
    assert sum(file.stat().st_size for file in (HOME / name).iterdir()) <= 2_000_000
    assert any(key.startswith("weight_delta.") for key in tensors) == (name != "head")


def perturbed(vit: nn.Module, part: float) -> nn.Module:
    """A copy with noise on all weights, of ``part`` of their standard deviation, as after a short training."""
    other, generator = copy.deepcopy(vit), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(part * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return other


def assert_belongs_to(folder: Path, vit: nn.Module) -> None:
    """The backbone is accepted in every precision; a perturbed one is refused."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        patchlife.load(folder, copy.deepcopy(vit).to(dtype))
        for part in (0.01, 0.003) if dtype != torch.bfloat16 else (0.01,):
            with pytest.raises(AdapterError, match="was made for other weights"):
                patchlife.load(folder, perturbed(vit, part).to(dtype))


def test_the_demo_adapter_belongs_to_the_demo_backbone() -> None:
    assert_belongs_to(demo_folder() / "adapter", demo_backbone())


@pytest.mark.shared
@pytest.mark.parametrize("name", ADAPTERS)
def test_it_belongs_to_the_published_weights(name: str, shared: Path) -> None:
    weights = shared / "weights" / "vit_tiny_patch16_224.safetensors"
    assert_belongs_to(HOME / name, build("vit_tiny_patch16_224", weights)[0])
    assert read_adapter(HOME / name)[0]["origin"]["sha256"] == sha256_of(weights)


@pytest.mark.shared
@pytest.mark.parametrize("name", ADAPTERS)
def test_most_predictions_equal_those_of_the_dense_model(name: str, shared: Path) -> None:
    from patchlife.data import Preprocess, list_photos, read_photo

    vit, _ = build("vit_tiny_patch16_224", shared / "weights" / "vit_tiny_patch16_224.safetensors")
    preprocess = Preprocess.from_timm_cfg(vit.pretrained_cfg)
    images = torch.stack([preprocess(read_photo(path)) for path in list_photos(shared / "data" / "in1k-samples")[::50]])
    model = patchlife.load(HOME / name, vit).set_budget(0.6)
    with torch.inference_mode():
        same = (model(images).argmax(dim=1) == vit(images).argmax(dim=1)).double().mean()
    assert same >= 0.7
