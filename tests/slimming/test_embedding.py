"""`SlimModel.embedding` is the vector that the classifier reads, in every library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from families import PRESENT, built, liven, photos
from torch import Tensor, nn

import patchlife
from patchlife import LifeConfig
from patchlife.errors import ConfigError

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 48,
    "patch_size": 8,
}
SETTINGS = {"start": 1, "drops": (1, 2)}
POOLED = {  # models of transformers with a pooler_output
    "ViT": lambda: transformers.ViTModel(transformers.ViTConfig(**SIZES)),
    "DeiT": lambda: transformers.DeiTModel(transformers.DeiTConfig(**SIZES)),
    "Dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)),
    "DINOv3": lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SIZES, num_register_tokens=4)),
    "CLIP": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES)),
    "SigLIP": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES)),
}
CLASSIFIERS = {  # with the names of the classifiers
    "ViT": (lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES)), ["classifier"]),
    "DeiT": (
        lambda: transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**SIZES)),
        ["cls_classifier", "distillation_classifier"],
    ),
    "Dinov2": (lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SIZES)), ["classifier"]),
    "registers": (
        lambda: transformers.Dinov2WithRegistersForImageClassification(transformers.Dinov2WithRegistersConfig(**SIZES)),
        ["classifier"],
    ),
    "CLIP": (
        lambda: transformers.CLIPForImageClassification(transformers.CLIPConfig(vision_config=SIZES)),
        ["classifier"],
    ),
    "SigLIP": (
        lambda: transformers.SiglipForImageClassification(transformers.SiglipConfig(vision_config=SIZES)),
        ["classifier"],
    ),
}


def ready(make: Callable[[], Any]) -> Any:
    model = liven(make()).eval()
    for name, parameter in model.named_parameters():
        if "lambda1" in name:
            parameter.data.fill_(0.5)
    return model


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def inputs_of(model: Any, classifiers: list[str], run: Callable[[], object]) -> list[Tensor]:
    """What the classifiers of ``model`` read during ``run``."""
    seen: list[Tensor] = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        for name in classifiers
    ]
    run()
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", POOLED)
def test_the_embedding_is_the_pooler_output_of_transformers(name):
    model = ready(POOLED[name])
    dense = model(images()).pooler_output
    found, _ = patchlife.wrap(model, LifeConfig(budget=1.0, **SETTINGS)).embedding(images())
    assert (found - dense).abs().max() < 1e-5
    slim = patchlife.wrap(model, LifeConfig(budget=0.6, **SETTINGS))
    found, lives = slim.embedding(images())
    assert lives.kept[:, -1].max() < 36
    assert torch.equal(found, slim.output(images()))
    assert (found - slim(images()).pooler_output).abs().max() < 1e-5
    assert (found - dense).abs().max() > 1e-3


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("budget", [1.0, 0.6])
def test_the_embedding_is_what_the_classifiers_of_transformers_read(name, budget):
    make, classifiers = CLASSIFIERS[name]
    model = ready(make)
    slim = patchlife.wrap(model, LifeConfig(budget=budget, **SETTINGS))
    dense = inputs_of(model, classifiers, lambda: model(images()))
    slimmed = inputs_of(model, classifiers, lambda: slim(images()))
    assert len(dense) == len(slimmed) == len(classifiers)
    expected = sum(dense if budget == 1.0 else slimmed) / len(classifiers)
    assert (slim.embedding(images())[0] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", [name for name in PRESENT if name != "unpooled"])
def test_the_embedding_is_what_the_classifier_of_timm_reads(name):
    vit, batch = built(name), photos(name)
    slim = patchlife.wrap(vit, LifeConfig(budget=0.7, start=1))
    heads = [head for head in ("head", "head_dist") if isinstance(getattr(vit, head, None), nn.Linear)]
    read = inputs_of(vit, heads, lambda: slim(batch))
    expected = sum(read) / len(read) if heads else slim(batch)
    found, lives = slim.embedding(batch)
    assert (found - expected).abs().max() < 1e-5
    assert len(lives) == len(batch)


def test_a_model_without_pooling_has_no_embedding():
    import timm

    vit = timm.create_model("test_vit", num_classes=0, global_pool="")
    with pytest.raises(ConfigError, match="a vector for each patch, not one for the image"):
        patchlife.wrap(vit).embedding(torch.zeros(1, 3, 160, 160))
