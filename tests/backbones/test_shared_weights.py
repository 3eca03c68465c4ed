"""The same CLIP weights in open_clip, timm and transformers: one signature, and one adapter for all three."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import timm
import torch
from gated_deltas import GATES, delta_of, gated_model, student_of
from open_clip_models import SMALL, START, VisionTransformer, far_apart, fresh, liven
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor
from ungated import add_low_rank, delta_between

from patchlife import LifeConfig, load, save, wrap
from patchlife.backbones import adapt, signature
from patchlife.backbones.comparison import differences
from patchlife.backbones.gates import gate_values
from patchlife.backbones.weight_delta import apply_delta, begin_with
from patchlife.errors import AdapterError, ConfigError

transformers = pytest.importorskip("transformers")

IMAGES = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
LIBRARIES = ("open_clip", "timm", "transformers")
PAIRS = [(a, b) for a in LIBRARIES for b in LIBRARIES if a != b]


def in_open_clip(seed: int = 0) -> Any:
    return liven(VisionTransformer(**{**SMALL, "mlp_ratio": 4.0}), seed).eval()


def in_timm(seed: int = 0) -> Any:
    """By timm's own conversion of weights in OpenAI's layout."""
    vit = timm.create_model(
        "vit_base_patch16_clip_224", img_size=48, patch_size=8, embed_dim=48, depth=5, num_heads=4, num_classes=24
    )
    state = {f"visual.{name}": value for name, value in in_open_clip(seed).state_dict().items()}
    vit.load_state_dict(checkpoint_filter_fn(state, vit))
    return vit.eval()


def in_transformers(seed: int = 0) -> Any:
    """By the names that transformers' conversion script of CLIP uses."""
    config = transformers.CLIPVisionConfig(
        hidden_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=192,
        image_size=48,
        patch_size=8,
        projection_dim=24,
        hidden_act="gelu",
    )
    model = transformers.CLIPVisionModelWithProjection(config)
    core, vit = model.vision_model, in_open_clip(seed)
    model.visual_projection.weight.copy_(vit.proj.T)
    core.embeddings.patch_embedding.load_state_dict(vit.conv1.state_dict())
    core.embeddings.class_embedding.copy_(vit.class_embedding)
    core.embeddings.position_embedding.weight.copy_(vit.positional_embedding)
    core.pre_layrnorm.load_state_dict(vit.ln_pre.state_dict())
    core.post_layernorm.load_state_dict(vit.ln_post.state_dict())
    for block, layer in zip(vit.transformer.resblocks, core.encoder.layers, strict=True):
        pairs = [
            (layer.layer_norm1, block.ln_1),
            (layer.layer_norm2, block.ln_2),
            (layer.mlp.fc1, block.mlp.c_fc),
            (layer.mlp.fc2, block.mlp.c_proj),
            (layer.self_attn.out_proj, block.attn.out_proj),
        ]
        for to, source in pairs:
            to.load_state_dict(source.state_dict())
        weights, biases = block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3)
        attn = layer.self_attn
        for projection, weight, bias in zip((attn.q_proj, attn.k_proj, attn.v_proj), weights, biases, strict=True):
            projection.weight.copy_(weight)
            projection.bias.copy_(bias)
    return model.eval()


MAKE = {"open_clip": in_open_clip, "timm": in_timm, "transformers": in_transformers}


@cache
def model_in(library: str) -> Any:
    """The model; shared by all tests: do not change it."""
    with torch.no_grad():
        return MAKE[library]()


def embedding(model: Any, images: Tensor = IMAGES) -> Tensor:
    return adapt(model).output(images)


def assert_equal_outputs(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_the_three_models_compute_the_same() -> None:
    expected = embedding(model_in("open_clip"))
    for library in LIBRARIES:
        assert_equal_outputs(embedding(model_in(library)), expected)
    assert_equal_outputs(model_in("transformers")(IMAGES).image_embeds, expected)


def test_signatures_are_equal() -> None:
    """But for the head's bias, which is zero in timm and absent in the others."""
    by_library = {library: signature(adapt(model_in(library))) for library in LIBRARIES}
    for library, found in by_library.items():
        weights = {name: values for name, values in found["weights"].items() if name != "head.bias"}
        assert weights == by_library["open_clip"]["weights"]
        assert ("head.bias" in found["weights"]) == (library == "timm")
        assert all(not differences(found, other) for other in by_library.values())
    other = signature(adapt(in_open_clip(seed=1)))
    assert all(differences(found, other) for found in by_library.values())


def test_a_head_bias_that_is_not_zero_is_a_difference() -> None:
    vit = in_timm()
    vit.head.bias[3] = 0.5
    expected = signature(adapt(model_in("open_clip")))
    assert differences(expected, signature(adapt(vit))) == ["head.bias is not expected"]
    assert differences(signature(adapt(vit)), expected) == ["head.bias is missing"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_shared_names_are_views(library: str) -> None:
    """Writing into them writes into the model."""
    with torch.no_grad():
        model = MAKE[library]()
        expected = embedding(MAKE[library](seed=1))
        other = adapt(in_timm(seed=1)).shared_names(in_timm(seed=1).state_dict())
        for name, parts in adapt(model).shared_names(model.state_dict()).items():
            rows = [len(part) for part in parts]
            for part, value in zip(parts, other[name][0].split(rows), strict=True):
                part.copy_(value)
    assert_equal_outputs(embedding(model), expected)


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_an_adapter_of_one_library_loads_on_the_others(source: str, target: str, mode: str, tmp_path: Any) -> None:
    model = wrap(model_in(source), LifeConfig(budget=0.65, start=START, mode=mode))
    if mode == "adaptive":
        model.calibrate([torch.randn(8, 3, 48, 48, generator=torch.Generator().manual_seed(1))])
    save(model, tmp_path / "adapter")
    loaded = load(tmp_path / "adapter", model_in(target))
    assert isinstance(loaded, type(model_in(target))) or target == "timm"
    assert (loaded.schedule(), loaded.settings.mode) == (model.schedule(), mode)
    assert torch.equal(loaded.lives(IMAGES).life, model.lives(IMAGES).life)
    assert_equal_outputs(loaded.output(IMAGES), model.output(IMAGES))
    assert far_apart(loaded.output(IMAGES), embedding(model_in(target)))


def trained(library: str) -> Any:
    """The model with low-rank deltas in the blocks from the start block on."""
    model = MAKE[library]()
    add_low_rank(list(adapt(model).blocks)[START:], rank=2)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith(".up"):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_low_rank_delta_of_one_library_fits_the_others(source: str, target: str) -> None:
    student = trained(source)
    delta = delta_between(adapt(student), adapt(model_in(source)))
    assert f"blocks.{START}.attn.qkv.weight.up" in delta
    own, other = apply_delta(model_in(source), delta), apply_delta(model_in(target), delta)
    assert_equal_outputs(embedding(other), embedding(own))
    assert far_apart(embedding(other), embedding(model_in(target)))


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_an_adapter_with_changed_weights_loads_on_the_others(source: str, target: str, tmp_path: Any) -> None:
    """Weights that were trained after wrapping are in the adapter, the projection too."""
    model = wrap(MAKE[source](), LifeConfig(budget=0.65, start=START))
    weights = adapt(model.unwrap()).shared_names(model.unwrap().state_dict())
    for name in ("blocks.3.mlp.fc1.weight", "blocks.4.attn.qkv.bias", "head.weight", "cls_token"):
        for part in weights[name]:
            part.mul_(1.5)
    save(model, tmp_path / "adapter")
    loaded = load(tmp_path / "adapter", model_in(target))
    assert_equal_outputs(loaded.output(IMAGES), model.output(IMAGES))
    assert far_apart(loaded.output(IMAGES), wrap(model_in(target), model.settings).output(IMAGES))


def test_an_adapter_of_other_weights_is_refused(tmp_path: Any) -> None:
    save(wrap(model_in("timm"), LifeConfig(budget=0.65, start=START)), tmp_path / "adapter")
    with pytest.raises(AdapterError, match="other weights"):
        load(tmp_path / "adapter", in_open_clip(seed=1))
    with pytest.raises(AdapterError, match="does not fit"):
        load(tmp_path / "adapter", fresh("custom, scales"))


@pytest.mark.parametrize("source", LIBRARIES)
@pytest.mark.parametrize("target", LIBRARIES)
def test_a_gated_delta_can_be_trained_further(source: str, target: str) -> None:
    """A student that begins with it has the same weights; only where queries, keys and values become one it cannot."""
    rank, gated = 5, delta_of(MAKE[source](), START, rank=5).gated
    student, expected = student_of(MAKE[target](), START, rank), student_of(MAKE[source](), START, rank)
    if source == "transformers" != target:
        with pytest.raises(ConfigError, match=r"qkv.weight has 18 channels, others 5"):
            begin_with(student, gated)
        return
    begin_with(student, gated)
    for budget in (0.9, 0.6):
        for one in (student, expected):
            one.gated.merge(one.model, gate_values(budget, GATES))
        assert_equal_outputs(embedding(student.model), embedding(expected.model))


def test_a_delta_of_other_layers_cannot_be_trained_further() -> None:
    gated = delta_of(in_timm(), START + 1).gated
    with pytest.raises(ConfigError, match=f"other layers.*blocks.{START}.attn"):
        begin_with(student_of(in_timm(), START), gated)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_gated_delta_of_one_library_is_exact_on_the_others(source: str, target: str, tmp_path: Any) -> None:
    model = gated_model(model_in(source), START)
    save(model, tmp_path / "adapter")
    loaded = load(tmp_path / "adapter", model_in(target))
    for budget in (0.7, 0.9, 0.62):
        assert_equal_outputs(loaded.set_budget(budget).output(IMAGES), model.set_budget(budget).output(IMAGES))
    own, state = model_in(target).state_dict(), loaded.set_budget(1.0).unwrap().state_dict()
    assert [name for name, value in own.items() if not torch.equal(state[name], value)] == []
    assert_equal_outputs(loaded.output(IMAGES), embedding(model_in(target)))
    dense = wrap(MAKE[target](), LifeConfig(budget=0.62, start=START, drops=(START, START + 1)), loaded.scorer)
    assert far_apart(loaded.set_budget(0.62).output(IMAGES), dense.output(IMAGES))
