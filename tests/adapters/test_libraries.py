"""An adapter belongs to weights: it crosses between a model of timm and one of transformers with the same weights."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from converted import PAIRS, output, pair, to_vit
from families import photos
from torch import Tensor, nn
from ungated import add_low_rank, delta_between

import patchlife
from patchlife import LifeConfig, SlimModel
from patchlife.adapters import read_adapter
from patchlife.backbones import adapt, signature
from patchlife.backbones.comparison import differences
from patchlife.backbones.weight_delta import (
    WeightDelta,
    apply_delta,
    delta_since,
    revert_delta,
)
from patchlife.errors import AdapterError
from patchlife.runtime.demo_model import demo_backbone, demo_folder
from patchlife.slimming.regressor import LifeRegressor

CONFIG = LifeConfig(budget=0.7, start=2, drops=(2, 3))
SOME = [
    pytest.param(name, marks=() if name in ("vit", "dinov2-swiglu", "siglip") else pytest.mark.slow) for name in PAIRS
]
"""All pairs, of which a few run in the fast suite."""

CLASSIFIERS = [name for name in PAIRS if "num_classes" not in PAIRS[name][1]]
DIRECTIONS = ("from timm", "from transformers")


def sides(name: str, direction: str) -> tuple[Any, Any]:
    """(model that the adapter is saved from, model that it is loaded onto)."""
    vit, model = pair(name)
    return (vit, model) if direction == "from timm" else (model, vit)


def images(count: int = 4) -> Tensor:
    return photos("vit", count)


def assert_equal_outputs(one: SlimModel, other: SlimModel, atol: float = 2e-5) -> None:
    """The same outputs at several budgets, in both modes, without a new calibration."""
    for mode in ("fixed", "adaptive"):
        for budget in (1.0, 0.8, 0.65):
            a, b = (model.set_mode(mode).set_budget(budget).output(images()) for model in (one, other))
            torch.testing.assert_close(a, b, rtol=0, atol=atol)
            assert a.std(dim=0).max() > 0.1, "the outputs do not depend on the image"


def saved(model: SlimModel, folder: Path) -> Path:
    return patchlife.save(model.calibrate([images(8)]), folder)


@pytest.mark.parametrize("name", PAIRS)
def test_the_conversion_gives_the_same_outputs(name: str) -> None:
    """The test of the tests' own conversion."""
    vit, model = pair(name)
    torch.testing.assert_close(output(model, images()), output(vit, images()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PAIRS)
def test_equal_weights_have_equal_signatures(name: str) -> None:
    one, other = (signature(adapt(model)) for model in pair(name))
    assert one["weights"] == other["weights"]
    assert differences(one, other) == []


@pytest.mark.parametrize("name", PAIRS)
def test_other_weights_of_one_matrix_are_noticed(name: str) -> None:
    vit, model = pair(name)
    for path, parameter in copy.deepcopy(model).named_parameters():
        if parameter.ndim < 2 or "mask_token" in path or re.search(r"layers?\.[1-4]\.", path):
            continue
        changed = copy.deepcopy(model)
        changed.get_parameter(path).mul_(1.01)
        assert differences(signature(adapt(vit)), signature(adapt(changed))), path


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", PAIRS)
def test_a_scorer_crosses(tmp_path: Path, name: str, direction: str) -> None:
    one, other = sides(name, direction)
    torch.manual_seed(0)
    model = patchlife.wrap(one, CONFIG, scorer=LifeRegressor(48, adapt(one).prefix))
    loaded = patchlife.load(saved(model, tmp_path / "adapter"), other)
    assert_equal_outputs(loaded, model)
    assert loaded.delta is None
    assert isinstance(loaded, SlimModel)


def with_low_rank_delta(base: nn.Module) -> SlimModel:
    """A model with a low-rank weight delta merged into its late blocks, as after stage 2 of a fit."""
    student = copy.deepcopy(base)
    add_low_rank(adapt(student).blocks[2:], rank=2)
    for index, parameter in enumerate(p for n, p in student.named_parameters() if n.endswith(".up")):
        parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(index))
    adapt(student).final_norm.bias.add_(0.1)
    delta = delta_between(adapt(student), adapt(base))
    model = patchlife.wrap(apply_delta(base, delta), CONFIG, LifeRegressor(48, adapt(base).prefix)).eval()
    model.delta = WeightDelta(delta, signature(adapt(base)))
    torch.testing.assert_close(output(model.unwrap(), images()), output(student, images()), rtol=0, atol=5e-3)
    return model


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", SOME)
def test_a_low_rank_delta_crosses(tmp_path: Path, name: str, direction: str) -> None:
    one, other = sides(name, direction)
    model = with_low_rank_delta(one)
    loaded = patchlife.load(saved(model, tmp_path / "adapter"), other)
    assert_equal_outputs(loaded, model)
    assert not torch.allclose(output(loaded.unwrap(), images()), output(other, images()), atol=1e-2)
    again = patchlife.load(patchlife.save(loaded, tmp_path / "again"), one)
    assert_equal_outputs(again, model)


@pytest.mark.parametrize("name", ["vit", "deit-distilled", "dinov2-swiglu", "siglip", "dinov3-gated"])
def test_a_delta_of_transformers_can_be_reverted(name: str) -> None:
    _, base = pair(name)
    model = with_low_rank_delta(base)
    assert model.delta is not None
    reverted = revert_delta(model.unwrap(), model.delta.tensors)
    changed = [path for path, p in model.unwrap().named_parameters() if not torch.equal(p, base.get_parameter(path))]
    assert len(changed) > 12
    for path, parameter in reverted.named_parameters():
        torch.testing.assert_close(parameter, base.get_parameter(path), rtol=0, atol=1e-6)


@torch.enable_grad()
def train(model: nn.Module) -> None:
    """Two steps on all weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        output(model, images()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", PAIRS)
def test_weights_that_were_trained_cross(tmp_path: Path, name: str, direction: str) -> None:
    one, other = sides(name, direction)
    model = patchlife.wrap(copy.deepcopy(one), CONFIG)
    train(model.unwrap())
    loaded = patchlife.load(saved(model, tmp_path / "adapter"), other)
    assert len(read_adapter(tmp_path / "adapter")[1]) > 50
    assert_equal_outputs(loaded, model)
    assert not torch.allclose(output(loaded.unwrap(), images()), output(other, images()), atol=1e-3)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_adapter_for_other_weights_is_refused(tmp_path: Path, direction: str) -> None:
    one, other = sides("vit", direction)
    folder = saved(patchlife.wrap(one, CONFIG), tmp_path / "adapter")
    changed = copy.deepcopy(other)
    next(p for path, p in changed.named_parameters() if "patch_embed" in path).mul_(1.01)
    with pytest.raises(AdapterError, match="other weights"):
        patchlife.load(folder, changed)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("classes", [3, 25])
def test_a_replaced_classifier_crosses(tmp_path: Path, name: str, direction: str, classes: int) -> None:
    one, other = sides(name, direction)
    model = patchlife.wrap(copy.deepcopy(one), CONFIG)
    model.reset_classifier(classes)
    for parameter in (p for n, p in model.named_parameters() if "head" in n or "classifier" in n):
        parameter.normal_()
    loaded = patchlife.load(saved(model, tmp_path / "adapter"), other)
    assert loaded.output(images()).shape == (4, classes)
    assert_equal_outputs(loaded, model)
    assert loaded.backbone.num_classes == classes


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_can_be_removed_and_put_back(name: str) -> None:
    _, base = pair(name)
    backbone = adapt(copy.deepcopy(base))
    backbone.reset_classifier(0)
    assert backbone.num_classes == 0
    assert backbone.output(images()).shape == (4, 48)
    backbone.reset_classifier(6)
    assert backbone.output(images()).shape == (4, 6)


def test_delta_since_names_weights_as_timm_does() -> None:
    _, base = pair("vit")
    model = patchlife.wrap(copy.deepcopy(base), CONFIG)
    assert delta_since(model.backbone, model.base) is None
    model.unwrap().vit.layers[3].attention.k_proj.weight[0, 0] += 1
    delta = delta_since(model.backbone, model.base)
    assert delta is not None
    assert set(delta.tensors) == {"blocks.3.attn.qkv.weight.whole"}
    assert delta.tensors["blocks.3.attn.qkv.weight.whole"].shape == (144, 48)


def test_a_whole_pooling_head_crosses(tmp_path: Path) -> None:
    """Its input projection is one weight in transformers and two in timm."""
    vit, base = pair("siglip")
    model = patchlife.wrap(copy.deepcopy(base), CONFIG)
    model.unwrap().head.attention.in_proj_weight[100:].mul_(2)  # keys and values
    loaded = patchlife.load(saved(model, tmp_path / "adapter"), vit)
    assert {key for key in read_adapter(tmp_path / "adapter")[1] if key.endswith(".whole")} == {
        "weight_delta.attn_pool.kv.weight.whole"
    }
    assert_equal_outputs(loaded, model)


def test_the_adapter_of_the_demo_crosses() -> None:
    vit = demo_backbone()
    settings = {"hidden_size": 112, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 448}
    model = to_vit(vit, **settings, image_size=112, patch_size=8)
    one, other = (patchlife.load(demo_folder() / "adapter", side) for side in (vit, model))
    draw = torch.Generator().manual_seed(0)
    batch = torch.randn(4, 3, 112, 112, generator=draw)
    for mode in ("fixed", "adaptive"):
        a, b = (side.set_mode(mode).set_budget(0.5).output(batch) for side in (one, other))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
