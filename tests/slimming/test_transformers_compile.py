"""A slimmed model of transformers compiles to one graph with its library's outputs, and its output can be exported."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from reference import assert_close
from slim_models import far_apart
from torch import Tensor, nn
from transformers_families import FAMILIES, FEW, arguments, fresh, photos, slim, tensors
from transformers_reference import assert_same_outputs

from patchlife.errors import ConfigError

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def check(name: str, backend: str, variant: str = "fixed, merge") -> None:
    model, images = slim(name, variant, model=fresh(name)), photos(name)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    for budget in (0.65, 0.8):
        model.set_budget(budget)
        for more in ({}, {"output_hidden_states": True}):
            given = arguments(name, images, **more)
            assert_same_outputs(compiled(**given), model(**given))
    dense = tensors(model.unwrap()(**given))
    assert any(far_apart(t, dense[place]) for place, t in tensors(compiled(**given)).items())


@pytest.mark.contract("compile", library="transformers")
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_compiles_to_one_graph(name: str) -> None:
    check(name, "aot_eager")


@pytest.mark.parametrize("name", ["vit-classifier", "dinov3"])
def test_generated_code_equals_eager_mode(name: str) -> None:
    check(name, "inductor")


def test_a_new_classifier_and_training_mode_reach_the_graph() -> None:
    model, images = slim("vit-classifier", model=fresh("vit-classifier")), photos("vit-classifier")
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    assert compiled(images).logits.shape == (3, 10)
    model.reset_classifier(7)
    assert_close(compiled(images).logits, model(images).logits)
    model.unwrap().loss_function = lambda labels, logits, *_, **__: logits.sum()
    outputs = model(images, labels=torch.tensor([1, 2, 3]))
    assert_close(outputs.loss, outputs.logits.sum())
    assert_close(compiled(images, labels=torch.tensor([1, 2, 3])).loss, outputs.loss)
    model.train()
    model.set_budget(0.7)
    with torch.enable_grad():
        compiled(images, labels=torch.tensor([1, 2, 3])).loss.backward()
    assert model.wrapped.classifier.weight.grad is not None


def test_a_copy_must_be_called_once_before_it_is_compiled() -> None:
    model, images = copy.deepcopy(slim("vit-classifier")), photos("vit-classifier")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises((ConfigError, RuntimeError), match="called once before"):
        compiled(images)
    torch.compiler.reset()
    model(images)
    assert_close(compiled(images).logits, model(images).logits)


class Output(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.output(images)


@pytest.mark.parametrize("name", FEW)
def test_the_output_exports(name: str) -> None:
    model, images = slim(name, "fixed, merge"), photos(name)
    program = torch.export.export(Output(model), (images,))
    assert_close(program.module()(images), model.output(images))


@pytest.mark.parametrize("name", ["vit-classifier", "dinov3"])
def test_the_librarys_forward_is_exported(name: str) -> None:
    """Where a graph is exported, transformers makes a mask of its own for some models."""
    model, images = slim(name), photos(name)
    program = torch.export.export(model, (images,))
    assert_same_outputs(program.module()(images), model(images))


def test_an_attention_mask_is_refused_in_an_export() -> None:
    images = photos("vit-classifier")
    mask = torch.ones(len(images), 37, dtype=torch.long)
    with pytest.raises(ConfigError, match="takes no attention_mask"):
        torch.export.export(slim("vit-classifier"), (images,), {"attention_mask": mask})


def test_a_call_while_another_thread_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's flag for an export is set in all threads; the calls must not share their state then."""
    model, images = slim("vit-classifier", model=fresh("vit-classifier")), photos("vit-classifier")
    expected = model(images).logits
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    model.backbone._traced = None  # would refuse the call
    assert_close(model(images).logits, expected)
