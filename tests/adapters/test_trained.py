"""An adapter holds the backbone's weights that were trained after wrapping, to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import built, fresh, photos
from torch import nn
from torch.nn.utils import parametrize, prune
from ungated import add_low_rank, delta_between

import patchlife
from patchlife import LifeConfig, SlimModel
from patchlife.adapters import read_adapter
from patchlife.backbones import adapt
from patchlife.backbones.weight_delta import WeightDelta, apply_delta
from patchlife.errors import AdapterError
from patchlife.slimming.regressor import LifeRegressor

CONFIG = LifeConfig(budget=0.7, start=2, drops=(2, 3))


@torch.enable_grad()
def train(model: nn.Module, parameters: list[nn.Parameter], rate: float = 1e-3) -> None:
    """Two plain training steps on the given parameters."""
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    images = photos("vit", 4)
    for _ in range(2):
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def saved_whole(folder: Path) -> set[str]:
    """Names of the weights that an adapter holds whole, not as a low-rank delta."""
    tensors = read_adapter(folder)[1]
    return {
        name[len("weight_delta.") : -len(".whole")]
        for name in tensors
        if name.startswith("weight_delta.") and name.endswith(".whole")
    }


@torch.no_grad()
def assert_equal_logits(one: SlimModel, other: SlimModel, name: str = "vit") -> None:
    """The same logits at every budget, in both modes."""
    images = photos(name, 3)
    for model in (one, other):
        model.calibrate([images])
    for mode in ("fixed", "adaptive"):
        for budget in (1.0, 0.8, 0.65):
            a, b = (model.set_mode(mode).set_budget(budget)(images) for model in (one, other))
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


PARTS: dict[str, Callable[[nn.Module], list[nn.Parameter]]] = {
    "all": lambda vit: list(vit.parameters()),
    "the classifier": lambda vit: list(vit.head.parameters()),
    "late blocks": lambda vit: [p for block in vit.blocks[3:] for p in block.parameters()],
    "norms": lambda vit: [p for p in vit.parameters() if p.ndim == 1],
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("rate", [1e-2, 1e-6])
def test_trained_parts_are_saved_and_loaded(tmp_path: Path, part: str, rate: float) -> None:
    model = patchlife.wrap(fresh("vit"), CONFIG)
    vit = model.backbone.model
    train(model, PARTS[part](vit), rate)
    patchlife.save(model, tmp_path / "adapter")
    trained = {id(p) for p in PARTS[part](vit)}
    changed = {name for name, p in vit.named_parameters() if not torch.equal(p, built("vit").get_parameter(name))}
    assert changed
    assert saved_whole(tmp_path / "adapter") == changed
    assert changed <= {name for name, p in vit.named_parameters() if id(p) in trained}
    original = fresh("vit")
    loaded = patchlife.load(tmp_path / "adapter", original)
    assert_equal_logits(loaded, model)
    assert all(torch.equal(value, built("vit").state_dict()[name]) for name, value in original.state_dict().items())
    patchlife.save(loaded, tmp_path / "again")
    assert saved_whole(tmp_path / "again") == changed
    assert_equal_logits(patchlife.load(tmp_path / "again", built("vit")), model)


def test_weights_that_were_not_trained_are_not_saved(tmp_path: Path) -> None:
    model = patchlife.wrap(fresh("vit"), CONFIG)
    assert saved_whole(patchlife.save(model, tmp_path / "adapter")) == set()
    for cast in (model, copy.deepcopy(model), model.double(), model.bfloat16()):
        patchlife.save(cast, tmp_path / "adapter")
        assert saved_whole(tmp_path / "adapter") == set()
        assert patchlife.load(tmp_path / "adapter", built("vit")).delta is None


@torch.no_grad()
def test_a_change_of_one_number_is_saved(tmp_path: Path) -> None:
    model = patchlife.wrap(fresh("vit"), CONFIG)
    model.backbone.model.blocks[4].mlp.fc2.weight[7, 3] += 0.25
    patchlife.save(model, tmp_path / "adapter")
    assert saved_whole(tmp_path / "adapter") == {"blocks.4.mlp.fc2.weight"}
    assert_equal_logits(patchlife.load(tmp_path / "adapter", built("vit")), model)


def test_training_can_continue_after_loading(tmp_path: Path) -> None:
    model = patchlife.wrap(fresh("vit"), CONFIG)
    train(model, PARTS["late blocks"](model.backbone.model))
    patchlife.save(model, tmp_path / "once")
    again = patchlife.load(tmp_path / "once", built("vit"))
    again.backbone.model.requires_grad_(True)
    train(again, PARTS["the classifier"](again.backbone.model))
    patchlife.save(again, tmp_path / "twice")
    names = saved_whole(tmp_path / "twice")
    assert {"head.weight", "blocks.4.attn.qkv.weight"} <= names
    assert "blocks.0.attn.qkv.weight" not in names
    assert_equal_logits(patchlife.load(tmp_path / "twice", built("vit")), again)


@torch.no_grad()
def with_low_rank_delta() -> SlimModel:
    """A model with a low-rank weight delta merged into its late blocks, as after stage 2 of a fit."""
    student = fresh("vit")
    add_low_rank(student.blocks[2:], rank=2)
    for name, parameter in student.named_parameters():
        if name.endswith(".up"):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    delta = delta_between(adapt(student), adapt(built("vit")))
    model = SlimModel(adapt(apply_delta(built("vit"), delta)), CONFIG, LifeRegressor(48, 1)).eval()
    model.delta = WeightDelta(delta, patchlife.wrap(built("vit")).base)
    return model


def test_training_after_a_low_rank_delta(tmp_path: Path) -> None:
    model = with_low_rank_delta()
    patchlife.save(model, tmp_path / "low")
    assert saved_whole(tmp_path / "low") == set()
    assert_equal_logits(patchlife.load(tmp_path / "low", built("vit")), model)
    loaded = patchlife.load(tmp_path / "low", built("vit"))
    parameters = [loaded.backbone.model.blocks[3].attn.qkv.weight, loaded.backbone.model.head.bias]
    for parameter in parameters:
        parameter.requires_grad_(True)
    train(loaded, parameters)
    patchlife.save(loaded, tmp_path / "both")
    tensors = read_adapter(tmp_path / "both")[1]
    assert saved_whole(tmp_path / "both") == {"blocks.3.attn.qkv.weight", "head.bias"}
    assert "weight_delta.blocks.3.attn.qkv.weight.up" not in tensors
    assert "weight_delta.blocks.4.attn.qkv.weight.up" in tensors
    assert_equal_logits(patchlife.load(tmp_path / "both", built("vit")), loaded)
    with pytest.raises(AdapterError, match="other weights"):
        patchlife.load(tmp_path / "both", loaded.backbone.model)


@pytest.mark.parametrize("name", ["vit", "deit-distilled", "dinov3"])
@pytest.mark.parametrize("classes", [3, 0, 25])
def test_a_new_classifier_is_saved(tmp_path: Path, name: str, classes: int) -> None:
    model = patchlife.wrap(fresh(name), CONFIG)
    model.backbone.model.reset_classifier(classes)
    patchlife.save(model, tmp_path / "adapter")
    loaded = patchlife.load(tmp_path / "adapter", fresh(name))
    assert loaded.backbone.model.num_classes == classes
    assert_equal_logits(loaded, model, name)
    other = fresh(name)
    if classes:  # a backbone that has a new classifier of this size already: it is replaced
        other.reset_classifier(classes)
        assert_equal_logits(patchlife.load(tmp_path / "adapter", other), model, name)
    half = patchlife.load(tmp_path / "adapter", fresh(name).bfloat16())
    assert {p.dtype for p in half.backbone.model.parameters()} == {torch.bfloat16}
    patchlife.save(loaded, tmp_path / "again")
    assert_equal_logits(patchlife.load(tmp_path / "again", fresh(name)), model, name)


def test_a_backbone_whose_structure_changed_is_not_saved(tmp_path: Path) -> None:
    model = patchlife.wrap(fresh("vit"), CONFIG)
    model.backbone.model.set_input_size(img_size=(64, 64))
    with pytest.raises(AdapterError, match=r"pos_embed .*1x37x48.*1x65x48"):
        patchlife.save(model, tmp_path / "adapter")
    model = patchlife.wrap(fresh("vit"), CONFIG)
    model.backbone.model.blocks[1].extra = nn.Linear(2, 2)
    with pytest.raises(AdapterError, match=r"blocks\.1\.extra\.weight was missing, is 2x2"):
        patchlife.save(model, tmp_path / "adapter")
    del model.backbone.model.blocks[1].extra, model.backbone.model.norm.bias
    with pytest.raises(AdapterError, match=r"norm\.bias was 48, is missing"):
        patchlife.save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_parametrised_and_pruned_weights_are_saved_as_computed(tmp_path: Path) -> None:
    model = patchlife.wrap(fresh("vit"), CONFIG)
    parametrize.register_parametrization(model.backbone.model.blocks[4].mlp.fc1, "weight", Doubled())
    prune.l1_unstructured(model.backbone.model.blocks[1].attn.qkv, "weight", 0.5)
    patchlife.save(model, tmp_path / "adapter")
    assert saved_whole(tmp_path / "adapter") == {"blocks.4.mlp.fc1.weight", "blocks.1.attn.qkv.weight"}
    plain = patchlife.load(tmp_path / "adapter", built("vit")).backbone.model
    assert torch.equal(plain.blocks[4].mlp.fc1.weight, 2 * built("vit").blocks[4].mlp.fc1.weight)
    assert torch.equal(plain.blocks[1].attn.qkv.weight, model.backbone.model.blocks[1].attn.qkv.weight)


def test_scorer_and_backbone_trained_together_are_saved(tmp_path: Path) -> None:
    model = patchlife.wrap(fresh("vit"), CONFIG, scorer=LifeRegressor(48, 1))
    train(model, [*model.backbone.model.parameters(), *model.scorer.parameters()])
    patchlife.save(model, tmp_path / "adapter")
    assert_equal_logits(patchlife.load(tmp_path / "adapter", built("vit")), model)


def test_weights_trained_before_wrapping_are_not_saved(tmp_path: Path) -> None:
    """The adapter is then for a backbone with the trained weights."""
    first = patchlife.wrap(fresh("vit"), CONFIG)
    train(first, list(first.backbone.model.parameters()))
    model = patchlife.wrap(first.backbone.model, CONFIG)
    patchlife.save(model, tmp_path / "adapter")
    assert saved_whole(tmp_path / "adapter") == set()
    assert_equal_logits(patchlife.load(tmp_path / "adapter", first.backbone.model), model)
    with pytest.raises(AdapterError, match="other weights"):
        patchlife.load(tmp_path / "adapter", built("vit"))
