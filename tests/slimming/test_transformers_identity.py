"""Identity: at budget 1.0 the outputs are transformers' own, in eval and training mode; wrapping changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference import assert_close
from slim_models import far_apart
from torch import Tensor, nn
from transformers_families import (
    ANY_SIZE,
    CLASSIFIERS,
    FAMILIES,
    FEW,
    OTHER_SIZE,
    arguments,
    built,
    fresh,
    photos,
    slim,
    tensors,
)
from transformers_reference import assert_same_outputs

from patchlife import LifeConfig, SlimModel, wrap
from patchlife.backbones import adapt
from patchlife.slimming.regressor import LifeRegressor


@pytest.mark.parametrize("name", FAMILIES)
def test_small_models_depend_on_content_and_position(name: str) -> None:
    """Otherwise the tests below could not fail."""
    given = arguments(name, photos(name))
    outputs = tensors(built(name)(**given))
    moved = tensors(built(name)(**{**given, "pixel_values": given["pixel_values"].roll(8, dims=-1)}))
    assert all(far_apart(t, moved[place]) for place, t in outputs.items() if place not in ("mask", "ids_restore"))


@pytest.mark.contract("identity", library="transformers")
@pytest.mark.parametrize("variant", ["fixed", "adaptive, merge"])
@pytest.mark.parametrize("name", FAMILIES)
def test_budget_one_gives_the_librarys_outputs(name: str, variant: str) -> None:
    model, images = slim(name, variant, budget=1.0), photos(name)
    given = arguments(name, images, output_hidden_states=True)
    assert_same_outputs(model(**given), built(name)(**given))
    assert isinstance(model, type(built(name)))
    assert isinstance(model, SlimModel)


@pytest.mark.parametrize("name", ANY_SIZE)
def test_budget_one_at_other_image_sizes(name: str) -> None:
    given = arguments(name, photos(name, size=OTHER_SIZE))
    assert_same_outputs(slim(name, budget=1.0)(**given), built(name)(**given))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_parts_of_the_backbone_give_the_librarys_output(name: str) -> None:
    """`Backbone.output` runs embeddings, layers, norm and classifier one by one."""
    images = photos(name)
    model = slim(name, budget=1.0)
    output, _ = model.predict(images)
    assert_close(model.backbone.output(images), output)
    outputs = built(name)(**arguments(name, images, output_hidden_states=True))
    assert_close(model.backbone.embed(images).tokens, outputs.hidden_states[0])
    if hasattr(outputs, "logits"):
        assert_close(output, outputs.logits)


# ---- labels


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_labels_give_the_librarys_loss(name: str) -> None:
    if name == "deit-teacher":
        pytest.skip("this class is for inference only")
    labels = torch.tensor([3, 0, 9])
    dense, slimmed = (slim(name, budget=budget) for budget in (1.0, 0.65))
    given = arguments(name, photos(name), labels=labels)
    assert_same_outputs(dense(**given), built(name)(**given))
    outputs = slimmed(**given)
    assert_close(outputs.loss, nn.functional.cross_entropy(outputs.logits, labels))


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_other_problem_types(problem: str) -> None:
    backbone, images = fresh("vit-classifier"), photos("vit-classifier")
    backbone.config.problem_type = problem
    labels = torch.rand(3, 10, generator=torch.Generator().manual_seed(0)).round()
    model = slim("vit-classifier", model=backbone)
    outputs = model(images, labels=labels)
    loss = nn.MSELoss() if problem == "regression" else nn.BCEWithLogitsLoss()
    assert_close(outputs.loss, loss(outputs.logits, labels))
    model.set_budget(1.0)
    assert_close(model(images, labels=labels).loss, backbone(images, labels=labels).loss)


def test_one_output_is_a_regression() -> None:
    backbone = fresh("vit-classifier")
    backbone.config.problem_type = None  # transformers sets it at the first call with labels
    model = slim("vit-classifier", model=backbone)
    model.reset_classifier(1)
    assert model.num_labels == model.config.num_labels == backbone.num_labels == 1
    outputs = model(photos("vit-classifier"), labels=torch.tensor([0.1, 0.2, 0.3]))
    assert backbone.config.problem_type == "regression"
    assert_close(outputs.loss, (outputs.logits[:, 0] - torch.tensor([0.1, 0.2, 0.3])).square().mean())


# ---- training mode


def step(model: nn.Module, backbone: nn.Module, given: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """(a loss over all outputs, gradients of ``backbone``) from one seed."""
    backbone.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    with torch.enable_grad():
        parts = [t for t in tensors(model(**given)).values() if t.is_floating_point() and t.requires_grad]
        loss = sum((t * torch.linspace(-1, 1, t.shape[-1])).square().mean() for t in parts)
        assert isinstance(loss, Tensor)
        loss.backward()
    return loss.detach(), {n: None if p.grad is None else p.grad.clone() for n, p in backbone.named_parameters()}


def checkpoint(model: Any) -> None:
    """Enable gradient checkpointing; transformers 5.24 has a new name for the method."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def assert_same_step(model: nn.Module, other: nn.Module, backbone: nn.Module, given: dict[str, Any]) -> None:
    loss, gradients = step(model, backbone, given)
    expected_loss, expected = step(other, backbone, given)
    assert_close(loss, expected_loss)
    assert any(gradient is not None for gradient in expected.values())
    for name, gradient in expected.items():
        found = gradients[name]
        assert (gradient is None) == (found is None), name
        if gradient is not None and found is not None:
            assert_close(found, gradient, 1e-4)


@pytest.mark.contract("training", library="transformers")
@pytest.mark.parametrize(
    ("name", "checkpointing", "learned"),
    [
        (name, checkpointing, False)
        for name in FAMILIES
        for checkpointing in (False, True)
        if not checkpointing or name in FEW
    ]
    + [(name, True, True) for name in FAMILIES],
)
def test_a_training_step_at_budget_one(name: str, checkpointing: bool, learned: bool) -> None:
    """With the attention scorer the model itself runs; with a learned one, its layers run one by one."""
    backbone = fresh(name).train()
    if checkpointing:
        checkpoint(backbone)
    scorer = LifeRegressor(48, adapt(backbone).prefix) if learned else None
    model = wrap(backbone, LifeConfig(budget=1.0), scorer)
    given = arguments(name, photos(name))
    random = {**FAMILIES[name].settings}.keys() & {"hidden_dropout_prob", "attention_dropout", "drop_path_rate"}
    if random:
        first, second = (next(iter(tensors(backbone(**given)).values())) for _ in range(2))
        assert far_apart(first, second), "dropout has no effect"
    assert_same_step(model, backbone, backbone, given)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("name", FEW)
def test_checkpointing_does_not_change_a_slimmed_step(name: str, merge: bool) -> None:
    backbone = fresh(name).train()
    model, plain = (slim(name, model=backbone, merge=merge) for _ in range(2))
    given = arguments(name, photos(name))
    loss, expected = step(plain, backbone, given)
    checkpoint(model)
    assert all(layer.gradient_checkpointing for layer in model.backbone.blocks)
    again, gradients = step(model, backbone, given)
    assert_close(again, loss)
    for key, gradient in expected.items():
        if gradient is not None:
            found = gradients[key]
            assert found is not None
            assert_close(found, gradient, 1e-4)


# ---- the object passed in


def structure_of(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that wrapping must not change, except the values of its weights."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "modules": {n: (id(m), type(m), m.training) for n, m in model.named_modules()},
        "parameters": {n: (id(p), p.requires_grad, p.dtype, p.grad) for n, p in model.named_parameters()},
        "buffers": {n: (id(b), b.dtype) for n, b in model.named_buffers()},
        "hooks": [len(getattr(m, h)) for m in model.modules() for h in hooks],
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": model.config._attn_implementation,
    }


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_wrapping_and_running_do_not_change_the_model(name: str, training: bool) -> None:
    backbone = fresh(name).train(training)
    before, weights = structure_of(backbone), {k: v.clone() for k, v in backbone.state_dict().items()}
    model = slim(name, model=backbone)
    images = photos(name)
    model(**arguments(name, images)), model(**arguments(name, images, output_hidden_states=True))
    model.output(images), model.lives(images), model.predict(images)
    model.calibrate([images]).set_budget(0.7)
    if not training:
        model.set_mode("adaptive")
        model(**arguments(name, images, output_hidden_states=True))
    assert structure_of(backbone) == before
    assert all(torch.equal(v, weights[k]) for k, v in backbone.state_dict().items())
    assert model.unwrap() is backbone
