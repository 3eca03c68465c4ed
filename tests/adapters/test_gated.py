"""Adapters with a gated weight delta: saved, loaded, crossing between libraries, and nothing at budget 1.0."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from converted import PAIRS, pair
from families import built, photos
from gated_deltas import GATES, WALK, delta_of, gated_model
from torch import Tensor, nn

import patchlife
from patchlife import SlimModel
from patchlife.adapters import read_adapter
from patchlife.backbones import adapt
from patchlife.backbones.gates import ramps_of
from patchlife.errors import AdapterError

SOME = [
    pytest.param(name, marks=() if name in ("vit", "dinov2-swiglu", "siglip") else pytest.mark.slow) for name in PAIRS
]


def images() -> Tensor:
    return photos("vit", 4)


def assert_original(model: SlimModel, original: nn.Module) -> None:
    """At budget 1.0 the weights are bit for bit those of the original, and outputs are equal."""
    model.set_budget(1.0)
    own = original.state_dict()
    assert [n for n, value in model.unwrap().state_dict().items() if not torch.equal(value, own[n])] == []
    torch.testing.assert_close(model.output(images()), adapt(original).output(images()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("direction", ["from timm", "from transformers"])
@pytest.mark.parametrize("name", SOME)
def test_a_gated_delta_crosses(tmp_path: Path, name: str, direction: str) -> None:
    one, other = pair(name) if direction == "from timm" else pair(name)[::-1]
    model = gated_model(one)
    loaded = patchlife.load(patchlife.save(model, tmp_path / "adapter"), other)
    for budget in WALK:
        a, b = (side.set_budget(budget).output(images()) for side in (model, loaded))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert_original(model, one)
    assert_original(loaded, other)


@pytest.mark.parametrize("name", ["vit", "dinov2-swiglu"])
def test_parts_of_a_weight_keep_the_gates_of_their_channels(name: str) -> None:
    """In transformers q, k and v are three layers; ranks that the number of gates does not divide are padded."""
    _, model = pair(name)
    for rank in (1, 3, 4, 6):
        delta = delta_of(model, 2, rank)
        up = delta.tensors["blocks.2.attn.qkv.weight.up"]
        assert up.shape == (144, 3 * len(GATES) * -(-rank // len(GATES)))
        assert (up.abs().sum(0) > 0).sum() == 3 * rank


def test_a_saved_adapter_records_its_gates(tmp_path: Path) -> None:
    model = gated_model(built("vit"))
    manifest, tensors = read_adapter(patchlife.save(model, tmp_path / "adapter"))
    assert manifest["format"] == 4, "versions that do not know gates must refuse it"
    assert ramps_of(manifest["gates"]) == GATES
    delta = {name: value for name, value in tensors.items() if name.startswith("weight_delta.")}
    assert {name.rpartition(".")[2] for name in delta} == {"up", "down", "shift"}
    assert {value.dtype for value in delta.values()} == {torch.float16}
    assert model.delta.size == sum(2 * value.numel() for value in delta.values())


@pytest.mark.parametrize(
    "gates", [[0.2], [[0.4, 0.2, 1]], [[0, 0.3]], [[-0.1, 0.3, 1]], [[0.5, 1.5, 1]], [[0, 1, 0]], "text", 3]
)
def test_gates_that_are_no_ramps_are_refused(gates: object) -> None:
    with pytest.raises(AdapterError, match="must be ramps"):
        ramps_of(gates)


def test_an_adapter_without_gates_keeps_the_format_of_older_versions(tmp_path: Path) -> None:
    config = patchlife.LifeConfig(start=2)
    manifest, _ = read_adapter(patchlife.save(patchlife.wrap(built("vit"), config), tmp_path / "adapter"))
    assert (manifest["format"], manifest["gates"]) == (3, None)


@pytest.mark.parametrize("budget", [1.0, 0.7])
def test_weights_trained_on_top_are_saved_without_the_delta(tmp_path: Path, budget: float) -> None:
    model = gated_model(built("vit")).set_budget(budget)
    for parameter in (model.unwrap().blocks[3].mlp.fc1.weight, model.unwrap().head.bias):
        parameter.add_(0.5)
    folder = patchlife.save(model, tmp_path / "adapter")
    whole = {name for name in read_adapter(folder)[1] if name.endswith(".whole")}
    assert whole == {"weight_delta.blocks.3.mlp.fc1.weight.whole", "weight_delta.head.bias.whole"}
    loaded = patchlife.load(folder, built("vit"))
    for other in (budget, 0.62, 1.0):
        a, b = (side.set_budget(other)(images()) for side in (model, loaded))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert (a - built("vit")(images())).abs().max() > 0.1


def test_a_user_model_is_not_changed_by_loading(tmp_path: Path) -> None:
    own = copy.deepcopy(built("vit"))
    loaded = patchlife.load(patchlife.save(gated_model(own), tmp_path / "adapter"), own)
    loaded.set_budget(0.62)
    assert all(torch.equal(value, built("vit").state_dict()[name]) for name, value in own.state_dict().items())


def test_saving_does_not_depend_on_the_budget(tmp_path: Path) -> None:
    model = gated_model(built("vit"))
    first = read_adapter(patchlife.save(model, tmp_path / "a"))
    second = read_adapter(patchlife.save(copy.deepcopy(model).set_budget(1.0), tmp_path / "b"))
    assert first[0]["backbone"] == second[0]["backbone"]
    assert all(torch.equal(value, second[1][name]) for name, value in first[1].items())


def test_a_delta_of_a_weight_that_is_missing_is_refused(tmp_path: Path) -> None:
    model = gated_model(built("vit"))
    broken: dict[str, Any] = {**model.delta.tensors, "blocks.9.norm1.weight.shift": torch.zeros(4, 48)}
    model.delta = dataclasses.replace(model.delta, tensors=broken)
    patchlife.save(model, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"blocks\.9\.norm1\.weight"):
        patchlife.load(tmp_path / "adapter", built("vit"))
