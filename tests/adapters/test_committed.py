"""The adapters that are committed: the dense model at budget 1.0, better than nothing below it, small and portable."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import patchlife
from patchlife import SlimModel
from patchlife.adapters import read_adapter
from patchlife.backbones import build
from patchlife.config import ModelConfig
from patchlife.data import list_photos, read_photo
from patchlife.errors import AdapterError
from patchlife.io.files import sha256_of
from patchlife.runtime.demo_model import demo_backbone, demo_folder
from patchlife.runtime.opening import open_pipeline
from patchlife.runtime.pipeline import Pipeline
from patchlife.slimming.regressor import LifeRegressors

ROOT = Path(__file__).parents[2]
VIT_TINY = ROOT / "recipes" / "vit_tiny"
ADAPTERS = ("adapter", "head")
FOLDERS = sorted(
    path.parent for place in ("recipes", "src") for path in (ROOT / place).rglob("adapter.json") if path.is_file()
)
NAMES = [
    pytest.param(folder, id=str(folder.relative_to(ROOT)), marks=() if "demo" in folder.parts else pytest.mark.shared)
    for folder in FOLDERS
]


@cache
def opened(folder: Path, weights: Path | None) -> Pipeline[SlimModel]:
    return open_pipeline(ModelConfig("demo") if weights is None else ModelConfig(str(folder), checkpoint=weights))


@pytest.fixture
def pipeline(folder: Path, request: pytest.FixtureRequest) -> Pipeline[SlimModel]:
    if "demo" in folder.parts:
        return opened(folder, None)
    return opened(folder, request.getfixturevalue("shared") / "weights" / "vit_tiny_patch16_224.safetensors")


def images_of(pipeline: Pipeline[SlimModel], folder: Path, count: int) -> Tensor:
    photos = list_photos([folder])
    return torch.stack([pipeline.preprocess(read_photo(path)) for path in photos[:: max(1, len(photos) // count)]])


def test_all_committed_adapters_are_found() -> None:
    found = {str(folder.relative_to(ROOT)) for folder in FOLDERS}
    assert {"recipes/vit_tiny/adapter", "recipes/vit_tiny/head", "src/patchlife/assets/demo/adapter"} <= found


@torch.inference_mode()
@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
@pytest.mark.parametrize("folder", NAMES)
def test_at_budget_1_the_model_is_the_backbone(folder: Path, mode: str, pipeline: Pipeline[SlimModel]) -> None:
    model, images = pipeline.model, images_of(pipeline, demo_folder() / "photos", 8)
    dense = demo_backbone() if "demo" in folder.parts else model.dense_backbone().model
    with model.temporarily(mode=mode, budget=0.45):
        slimmed = model(images)
    with model.temporarily(mode=mode, budget=1.0):
        own = dict(dense.named_parameters())
        assert [name for name, p in model.unwrap().named_parameters() if not torch.equal(p, own[name])] == []
        torch.testing.assert_close(model(images), dense(images), rtol=0, atol=1e-5)
        assert (slimmed - model(images)).abs().max() > 0.01, "nothing was dropped, so this test shows nothing"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_it_is_complete_small_and_names_no_file_of_a_machine(folder: Path) -> None:
    manifest, tensors = read_adapter(folder)
    assert manifest["format"] == 5, "fit it again: shapes and start blocks follow the budget"
    assert manifest["scorer"]["kind"] == LifeRegressors.kind
    assert not (manifest["origin"] or {}).get("checkpoint")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2_000_000
    assert any(key.startswith("weight_delta.") for key in tensors) == (folder == VIT_TINY / "adapter")


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
    assert_belongs_to(VIT_TINY / name, build("vit_tiny_patch16_224", weights)[0])
    assert read_adapter(VIT_TINY / name)[0]["origin"]["sha256"] == sha256_of(weights)


@torch.inference_mode()
@pytest.mark.shared
def test_of_vit_tiny_the_weight_delta_is_better_than_the_scorer_and_the_scorer_than_nothing(shared: Path) -> None:
    """KL divergence from the dense model on photos that no weights were trained on."""
    weights = shared / "weights" / "vit_tiny_patch16_224.safetensors"
    folders = [VIT_TINY / name for name in ADAPTERS]
    pipelines = [opened(folder, weights) for folder in folders]
    pipelines.append(open_pipeline(ModelConfig("vit_tiny_patch16_224", checkpoint=weights)))
    images = images_of(pipelines[0], shared / "data" / "in1k-samples", 50)
    dense = pipelines[-1].model.unwrap()(images).log_softmax(1)
    for budget in (0.61, 0.45):
        divergences = []
        for pipeline in pipelines:
            with pipeline.model.temporarily(budget=budget):
                logits = pipeline.model(images).log_softmax(1)
            divergences.append(torch.nn.functional.kl_div(logits, dense, reduction="batchmean", log_target=True).item())
        assert divergences == sorted(divergences), budget
