"""Vision encoders inside transformers' vision-language models: wrapped in place, or refused by name.

The reference is the library's own model. Below budget 1.0 hooks on its own layers mask dropped patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import liven
from torch import Tensor, nn
from torch.nn.functional import normalize
from vision_language_models import (
    DEPTH,
    IMAGE_TOKEN,
    LLAMA,
    MODELS,
    PATCH,
    SIZE,
    TOWER,
    fresh,
    inputs,
    set_tower,
    tower_of,
    transformers,
)

import patchlife
from patchlife import LifeConfig, Scorer, SlimModel, wrap
from patchlife.errors import ConfigError, UnsupportedModelError
from patchlife.slimming.scorers import Scores

START = 1
PADDED = ("idefics2", "idefics3", "smolvlm")


class GivenScores(Scorer):
    """Random scores; their spread differs from image to image."""

    kind = "given-scores-vision-language"

    def forward(self, tokens: Tensor, rope: Tensor | None, backbone: Any, start: int) -> Scores:
        """The same scores for any tokens."""
        patches = tokens[:, backbone.prefix :]
        score = torch.randn(patches.shape[1], generator=torch.Generator().manual_seed(3))
        spread = torch.linspace(0.5, 1.5, len(patches))[:, None]
        return Scores(score * spread, normalize(patches, dim=-1))


def slimmed(name: str, model: nn.Module, scorer: Scorer | None = None, **settings: Any) -> SlimModel:
    """Wrap the vision encoder of ``model`` in its place. Returns the slimmed encoder."""
    tower = wrap(tower_of(name, model), LifeConfig(**{"budget": 0.65, "start": START, **settings}), scorer)
    if tower.settings.mode == "adaptive":
        tower.calibrate([torch.randn(8, 3, SIZE, SIZE)])
    set_tower(name, model, tower)
    return tower


def generated(model: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Eight new tokens for each prompt (batch, 8), and their logits (8, batch, words)."""
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    found = model.generate(**given, **options, return_dict_in_generate=True, output_logits=True)
    return found.sequences[:, -8:], torch.stack(found.logits)


def read_by_the_projector(model: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(logits, input of the module between the vision encoder and the language model)."""
    seen: list[Tensor] = []
    connectors = ("multi_modal_projector", "connector")
    connector = next(module for name, module in model.named_modules() if name.rpartition(".")[2] in connectors)
    handle = connector.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["image_hidden_states"]), with_kwargs=True
    )
    logits = model(**given).logits
    handle.remove()
    return logits, seen[0]


@contextmanager
def dropping(tower: Any, life: Tensor) -> Iterator[None]:
    """Within it, a patch takes part in layer ``l`` of ``tower`` while ``l < life``; then it keeps its last state."""
    handles = []
    for index, layer in enumerate(tower.encoder.layers):

        def mask(_: nn.Module, args: tuple, kwargs: dict, index: int = index) -> tuple:
            bias = torch.where(_kept(life, index, args[0]), 0.0, -torch.inf)
            return (args[0], bias[:, None, None]), {}

        def restore(_: nn.Module, args: tuple, out: Tensor, index: int = index) -> Tensor:
            return torch.where(_kept(life, index, out)[..., None], out, args[0])

        handles += [layer.register_forward_pre_hook(mask, with_kwargs=True), layer.register_forward_hook(restore)]
    yield
    for handle in handles:
        handle.remove()


def _kept(life: Tensor, index: int, tokens: Tensor) -> Tensor:
    kept = life > index
    return torch.cat((kept.new_ones(len(kept), tokens.shape[1] - kept.shape[1]), kept), dim=1)


@pytest.mark.contract("identity", library="vision-language models of transformers")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_at_budget_one_logits_and_generation_do_not_change(name: str, attention: str) -> None:
    model, given = fresh(name, attention), inputs(name)
    logits, (tokens, of_tokens) = model(**given).logits, generated(model, given)
    without_photo = model(**{**given, "pixel_values": given["pixel_values"].flip(0)}).logits
    assert (without_photo - logits).abs().max() > 0.1, "the photo has no effect"
    slimmed(name, model, budget=1.0)
    assert (model(**given).logits - logits).abs().max() <= 1e-5
    found, of_found = generated(model, given)
    assert torch.equal(found, tokens)
    assert (of_found - of_tokens).abs().max() <= 1e-5


@pytest.mark.contract("{mode}", library="vision-language models of transformers")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
@pytest.mark.parametrize("name", MODELS)
def test_the_projector_reads_patches_in_grid_order_and_dropped_ones_at_their_last_state(
    name: str, mode: str, attention: str
) -> None:
    model, given = fresh(name, attention), inputs(name)
    tower = slimmed(name, model, GivenScores(), mode=mode, merge=False)
    life = tower.lives(given["pixel_values"].flatten(0, -4)).life
    assert len(life.unique()) >= 3
    assert (mode == "fixed") == bool((life.sum(1) == life.sum(1)[0]).all())
    logits, tokens = read_by_the_projector(model, given)
    reference = fresh(name, attention)
    with dropping(tower_of(name, reference), life):
        expected_logits, expected = read_by_the_projector(reference, given)
    assert tokens.shape == expected.shape
    assert (tokens - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (logits - expected_logits).abs().max() <= 1e-4 * expected_logits.abs().max()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_below_budget_one_generation_is_that_of_the_librarys_model_without_the_dropped_patches(
    name: str, attention: str
) -> None:
    model, given, calls = fresh(name, attention), inputs(name), []
    tower = slimmed(name, model, GivenScores(), merge=False)
    life = tower.lives(given["pixel_values"].flatten(0, -4)).life
    tower.register_forward_hook(lambda *_: calls.append(1))
    tokens, logits = generated(model, given)
    assert len(calls) == 1, "the cache holds the photo, which is encoded once"
    reference = fresh(name, attention)
    with dropping(tower_of(name, reference), life):
        expected, expected_logits = generated(reference, given)
    assert torch.equal(tokens, expected)
    assert (logits - expected_logits).abs().max() <= 1e-4 * expected_logits.abs().max()
    assert (logits - generated(reference, given)[1]).abs().max() > 1e-2, "the dropped patches have no effect"


@pytest.mark.parametrize("name", ["llava-clip", "paligemma", "idefics3"])
def test_the_budget_of_the_encoder_can_be_set_in_place(name: str) -> None:
    model, given = fresh(name), inputs(name)
    dense = model(**given).logits
    tower = slimmed(name, model)
    assert tower_of(name, model) is tower
    assert not torch.equal(model(**given).logits, dense)
    tower.set_budget(1.0)
    assert torch.equal(model(**given).logits, dense)
    set_tower(name, model, tower.set_budget(0.65).unwrap())
    assert torch.equal(model(**given).logits, dense)


@pytest.mark.parametrize("name", ["llava-clip", "paligemma", "idefics3"])
def test_a_model_in_bfloat16_generates_with_a_slimmed_encoder(name: str) -> None:
    model, given = fresh(name).bfloat16(), inputs(name)
    tower = slimmed(name, model)
    assert generated(model, {**given, "pixel_values": given["pixel_values"].bfloat16()})[0].shape == (2, 8)
    assert tower.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llava-clip", "smolvlm"])
def test_a_checkpoint_of_the_whole_model_is_the_dense_one_after_unwrap(name: str, tmp_path: Any) -> None:
    model, given = fresh(name), inputs(name)
    dense = model(**given).logits
    tower = slimmed(name, model)
    set_tower(name, model, tower.unwrap())
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert (loaded(**given).logits - dense).abs().max() <= 1e-5


@pytest.mark.parametrize("budget", [1.0, 0.65])
def test_gradients_of_the_whole_models_loss_reach_the_encoder(budget: float) -> None:
    model, given = fresh("llava-clip"), inputs("llava-clip")
    given["labels"] = given["input_ids"].masked_fill(given["input_ids"] == IMAGE_TOKEN, -100)
    tower = tower_of("llava-clip", model)
    with torch.enable_grad():
        model(**given).loss.backward()
        dense = [parameter.grad.clone() for parameter in tower.encoder.parameters() if parameter.grad is not None]
        model.zero_grad()
        slimmed("llava-clip", model, budget=budget).train()
        model(**given).loss.backward()
    found = [parameter.grad for parameter in tower.encoder.parameters() if parameter.grad is not None]
    close = [torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(found, dense, strict=True)]
    assert all(close) == (budget == 1)
    assert all(gradient.abs().max() > 0 for gradient in found[:2])


@pytest.mark.parametrize("name", ["llava-clip", "paligemma", "idefics3"])
def test_an_adapter_of_the_encoder_is_loaded_in_its_place(name: str, tmp_path: Any) -> None:
    model, given = fresh(name), inputs(name)
    patchlife.save(slimmed(name, model), tmp_path / "adapter")
    expected = model(**given).logits
    other = fresh(name)
    set_tower(name, other, patchlife.load(tmp_path / "adapter", tower_of(name, other)))
    assert torch.equal(other(**given).logits, expected)


def test_an_image_that_is_no_multiple_of_the_patch_is_cut_as_the_library_cuts_it() -> None:
    """As SigLIP-so400m/14 at 384 px: pixels beyond the last whole patch are not read."""
    config = transformers.SiglipVisionConfig(**TOWER | {"image_size": SIZE + 5})
    encoder, images = liven(transformers.SiglipVisionModel(config)).eval(), torch.randn(2, 3, SIZE + 5, SIZE + 5)
    expected = encoder(images)
    model = wrap(encoder, LifeConfig(budget=1.0, start=START))
    assert (model(images).last_hidden_state - expected.last_hidden_state).abs().max() <= 1e-5
    assert (model.output(images) - expected.pooler_output).abs().max() <= 1e-5
    model.set_budget(0.65)
    assert model.lives(images).grid == (SIZE // PATCH, SIZE // PATCH)
    assert (model.output(images) - model(images).pooler_output).abs().max() <= 1e-5
    with pytest.raises(ConfigError, match="smaller than a patch"):
        model.output(images[..., : PATCH - 1])


# ---- masks of Idefics


def masked_inputs(name: str, filled: int) -> dict[str, Tensor]:
    """`inputs`, with a mask that marks all columns from ``filled`` on, in pixels, as padding in the second image."""
    given = inputs(name)
    mask = torch.ones(2, 1, SIZE, SIZE, dtype=torch.bool)
    mask[1, ..., filled:] = False
    return {**given, "pixel_attention_mask": mask}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PADDED)
def test_a_mask_without_padding_changes_nothing(name: str, attention: str) -> None:
    model = fresh(name, attention)
    dense = model(**inputs(name)).logits
    tower = slimmed(name, model, budget=1.0)
    assert (model(**masked_inputs(name, SIZE)).logits - dense).abs().max() <= 1e-5
    tower.set_budget(0.65)
    without = model(**inputs(name)).logits
    assert torch.equal(model(**masked_inputs(name, SIZE)).logits, without)
    mask = torch.ones(1, 6, 6, dtype=torch.bool)
    images = torch.randn(1, 3, SIZE, SIZE)
    assert torch.equal(tower(images, mask).last_hidden_state, tower(images).last_hidden_state)


@pytest.mark.parametrize("name", PADDED)
def test_padding_is_refused_below_budget_one_and_taken_at_budget_one(name: str) -> None:
    model, given = fresh(name), masked_inputs(name, SIZE // 2)
    dense = model(**given).logits
    assert (dense - model(**inputs(name)).logits).abs().max() > 1e-3
    tower = slimmed(name, model)
    with pytest.raises(ConfigError, match=r"marks 25% of the patches as padding.*one image at a time.*set_budget"):
        model(**given)
    tower.set_budget(1.0)
    assert (model(**given).logits - dense).abs().max() <= 1e-5


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("size", [(48, 48), (32, 56)])
def test_the_tokens_of_an_encoder_alone_are_the_librarys(name: str, size: tuple[int, int]) -> None:
    encoder, images = tower_of(name, fresh(name)), torch.randn(2, 3, *size)
    expected = encoder(images, output_hidden_states=True)
    model = wrap(encoder, LifeConfig(budget=1.0, start=START))
    assert (model.output(images) - expected.last_hidden_state).abs().max() <= 1e-5
    model.set_budget(0.65)
    found = model(images, output_hidden_states=True)
    assert [x.shape for x in found.hidden_states] == [x.shape for x in expected.hidden_states]
    assert torch.equal(found.hidden_states[START], expected.hidden_states[START])
    assert (model.output(images) - found.last_hidden_state).abs().max() <= 1e-5
    assert (model.output(images) - expected.last_hidden_state).abs().max() > 1e-3


# ---- refusals


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_is_refused_with_the_line_that_wraps_its_encoder(name: str) -> None:
    model = fresh(name)
    line = f"model.{MODELS[name].tower} = patchlife.wrap(model.{MODELS[name].tower})"
    with pytest.raises(UnsupportedModelError) as error:
        wrap(model)
    assert type(model).__name__ in str(error.value)
    assert str(error.value).endswith(line)
    exec(line, {"model": model, "patchlife": patchlife})
    assert isinstance(tower_of(name, model), SlimModel)


PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "head_dim": 16,
}


def _mistral() -> Any:
    text = {**LLAMA, "model_type": "mistral"}
    config = transformers.Mistral3Config(vision_config=PIXTRAL, text_config=text, image_token_index=IMAGE_TOKEN)
    return transformers.Mistral3ForConditionalGeneration(config)


def _pixtral() -> Any:
    config = transformers.LlavaConfig(vision_config=PIXTRAL, text_config=LLAMA, image_token_index=IMAGE_TOKEN)
    return transformers.LlavaForConditionalGeneration(config)


def _qwen() -> Any:
    text = {**LLAMA, "model_type": "qwen2_5_vl_text", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    text["rope_parameters"]["mrope_section"] = [2, 3, 3]
    config = transformers.Qwen2_5_VLConfig(
        vision_config={
            "hidden_size": 32,
            "depth": DEPTH,
            "num_heads": 2,
            "intermediate_size": 64,
            "out_hidden_size": 32,
        },
        text_config=text,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


REFUSED = {
    "pixtral": (_pixtral, "model.vision_tower", "PixtralVisionModel", "its batches are packed, with a mask per image"),
    "mistral": (_mistral, "model.vision_tower", "PixtralVisionModel", "its batches are packed, with a mask per image"),
    "qwen": (_qwen, "model.visual", "Qwen2_5_VisionTransformerPretrainedModel", "its blocks attend in windows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_encoder_whose_patches_cannot_be_dropped_is_refused_by_name(name: str) -> None:
    make, path, kind, reason = REFUSED[name]
    model = make()
    with pytest.raises(UnsupportedModelError, match=rf"{kind}.*{reason}"):
        wrap(model.get_submodule(path))
    with pytest.raises(UnsupportedModelError, match=rf"{type(model).__name__}.*{reason}"):
        wrap(model)
