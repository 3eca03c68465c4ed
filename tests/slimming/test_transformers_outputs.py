"""A slimmed model of transformers takes the library's arguments and gives its outputs; hooks work or are refused."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from reference import assert_close
from slim_models import far_apart
from torch import nn
from transformers_families import T, arguments, fresh, photos, slim, tensors
from transformers_reference import assert_same_outputs

from patchlife import wrap
from patchlife.errors import ConfigError, UnsupportedModelError


def test_the_outcome_is_of_the_models_class_with_its_signature_and_config() -> None:
    backbone = fresh("vit-classifier")
    model = slim("vit-classifier", model=backbone)
    assert isinstance(model, T.ViTForImageClassification)
    assert type(model).__name__ == "ViTForImageClassification"
    assert inspect.signature(model.forward) == inspect.signature(backbone.forward)
    assert model.config is backbone.config
    assert model.dtype == torch.float32
    assert model.device == torch.device("cpu")
    assert model.num_parameters() == backbone.num_parameters()


@pytest.mark.parametrize("variant", ["fixed, merge", "adaptive"])
@pytest.mark.parametrize("name", ["vit-classifier", "clip-projection", "dinov3", "siglip"])
def test_hidden_states_can_be_selected(name: str, variant: str) -> None:
    model, images = slim(name, variant), photos(name)
    every = model(**arguments(name, images, output_hidden_states=True)).hidden_states
    assert len(every) == 6
    dense = model.unwrap()(**arguments(name, images, output_hidden_states=True)).hidden_states
    for place, (own, others) in enumerate(zip(every, dense, strict=True)):
        assert far_apart(own, others) == (place > model.start)
    if T.__version__ < "5.20":
        return  # the count began at the first layer
    for chosen in (2, -1, 5, [0], [0, 3, -2]):
        found = model(**arguments(name, images, output_hidden_states=chosen)).hidden_states
        wanted = {index % 6 for index in (chosen if isinstance(chosen, list) else [chosen])}
        for index, state in enumerate(found):
            assert (state is not None) == (index in wanted)
            if state is not None:
                assert_close(state, every[index])


def test_hidden_states_by_the_config() -> None:
    backbone = fresh("vit-classifier")
    backbone.config.output_hidden_states = True
    model, images = slim("vit-classifier", model=backbone), photos("vit-classifier")
    assert_same_outputs(model(images), slim("vit-classifier")(images, output_hidden_states=True))


@pytest.mark.parametrize("name", ["vit-classifier", "dinov2", "clip-projection", "dinov2-backbone"])
def test_tuples_instead_of_output_objects(name: str) -> None:
    model, images = slim(name), photos(name)
    plain = model(**arguments(name, images, return_dict=False))
    assert isinstance(plain, tuple)
    for found, expected in zip(
        tensors(plain).values(), tensors(model(**arguments(name, images))).values(), strict=True
    ):
        assert_close(found, expected)


def test_positional_arguments() -> None:
    model, images = slim("vit-classifier"), photos("vit-classifier")
    assert_same_outputs(
        model(images, torch.tensor([1, 2, 3])), model(pixel_values=images, labels=torch.tensor([1, 2, 3]))
    )


def test_masked_positions_are_embedded_as_by_the_library() -> None:
    """A mask token takes the place of patches before the first block, so nothing else changes."""
    images, name = photos("vit-no-pooler"), "vit-no-pooler"
    masked = torch.rand(3, 36, generator=torch.Generator().manual_seed(0)) < 0.5
    dense, slimmed = slim(name, budget=1.0), slim(name)
    assert_same_outputs(dense(images, bool_masked_pos=masked), dense.unwrap()(images, bool_masked_pos=masked))
    given = {"bool_masked_pos": masked, "output_hidden_states": True}
    states, expected = (m(images, **given).hidden_states for m in (slimmed, slimmed.unwrap()))
    assert_close(states[0], expected[0])
    assert far_apart(states[0], slimmed(images, output_hidden_states=True).hidden_states[0])
    assert far_apart(states[5], expected[5])


def test_attention_implementations() -> None:
    model, images = slim("vit-classifier", model=fresh("vit-classifier")), photos("vit-classifier")
    fused = model(images).logits
    model.set_attn_implementation("eager")
    assert model.unwrap().config._attn_implementation == "eager"
    assert_close(model(images).logits, fused)
    with pytest.raises(ConfigError, match="attention maps"):
        model(images, output_attentions=True)
    model.set_budget(1.0)
    maps = model(images, output_attentions=True).attentions
    assert [attention.shape for attention in maps] == [(3, 3, 37, 37)] * 5
    model.set_budget(0.65)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="'flex_attention' is not supported"):
        model(images)
    with pytest.raises(UnsupportedModelError, match="'flex_attention' is not supported"):
        wrap(model.unwrap())


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_hooks_take_effect_or_are_refused_by_name(mode: str) -> None:
    images = photos("vit-classifier")

    def double(module: nn.Module, args: Any, output: Any) -> Any:
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

    expected = slim("vit-classifier", mode)(images).logits
    for path in ("vit.layers.3", "vit.layers.3.attention", "vit.layers.3.mlp", "vit.layers.3.attention.v_proj"):
        backbone = fresh("vit-classifier")
        model = slim("vit-classifier", mode, backbone)
        backbone.get_submodule(path).register_forward_hook(double)
        if mode == "adaptive" and path in ("vit.layers.3", "vit.layers.3.attention"):
            with pytest.raises(UnsupportedModelError, match="a forward hook on layer 3"):
                model(images)
        else:
            assert far_apart(model(images).logits, expected), path
    for path in ("", "vit", "vit.layers"):
        backbone = fresh("vit-classifier")
        backbone.get_submodule(path).register_forward_hook(double)
        with pytest.raises(UnsupportedModelError, match="forward hook on " + (path or "the model itself")):
            slim("vit-classifier", mode, backbone)
    model = slim("vit-classifier", mode)
    model.register_forward_hook(lambda module, args, output: output.logits)
    assert_close(model(images), expected)


def test_hidden_state_hooks_of_the_dense_model_do_not_count_as_attached() -> None:
    """transformers leaves hooks on layers and attention after it recorded their outputs."""
    backbone, images = fresh("vit-classifier"), photos("vit-classifier")
    backbone.set_attn_implementation("eager")
    backbone(images, output_hidden_states=True, output_attentions=True)
    model = slim("vit-classifier", "adaptive", backbone)
    states = model(images, output_hidden_states=True).hidden_states
    assert len(states) == 6
    assert all(state.shape == (3, 37, 48) for state in states)


@pytest.mark.parametrize("budget", [0.65, 1.0])
def test_the_loss_function_can_be_replaced(budget: float) -> None:
    model, images = slim("vit-classifier", model=fresh("vit-classifier"), budget=budget), photos("vit-classifier")

    def half_of_the_sum(labels: torch.Tensor, logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return logits.sum() / 2

    model.loss_function = half_of_the_sum
    assert model.loss_function is half_of_the_sum
    outputs = model(images, labels=torch.zeros(len(images), dtype=torch.long))
    torch.testing.assert_close(outputs.loss, outputs.logits.sum() / 2)
