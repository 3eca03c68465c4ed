"""Models and inputs of transformers that patchlife cannot slim are refused with the reason and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers_families import SIZES, T, arguments, fresh, photos, slim

from patchlife import LifeConfig, flops, wrap
from patchlife.errors import ConfigError, UnsupportedModelError

TEXT = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 48, "vocab_size": 40}
REFUSED = {  # class -> (class of its settings, settings, the reason)
    "BeitModel": ("BeitConfig", SIZES, "relative position bias"),
    "Data2VecVisionModel": ("Data2VecVisionConfig", SIZES, "relative position bias"),
    "SwinModel": ("SwinConfig", {"embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2], "image_size": 32}, "windows"),
    "Siglip2VisionModel": ("Siglip2VisionConfig", {**SIZES, "num_patches": 36}, "NaFlex"),
    "ConvNextModel": ("ConvNextConfig", {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}, "convolutional"),
    "DINOv3ConvNextModel": ("DINOv3ConvNextConfig", {"hidden_sizes": [8] * 4, "depths": [1] * 4}, "convolutional"),
    "ViTMAEForPreTraining": ("ViTMAEConfig", SIZES, r"model.vit = patchlife.wrap\(model.vit\)"),
    "HieraModel": (
        "HieraConfig",
        {"depths": [1, 1], "num_heads": [1, 2], "embed_dim": 12, "num_query_pool": 1},
        "pool",
    ),
    "PvtModel": (
        "PvtConfig",
        {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4},
        "convolution",
    ),
    "BertModel": ("BertConfig", TEXT, "text model"),
    "CLIPTextModel": ("CLIPTextConfig", TEXT, "text model"),
    "ViTForMaskedImageModeling": ("ViTConfig", {**SIZES, "encoder_stride": 8}, "needs every patch"),
    "ViTMSNModel": ("ViTMSNConfig", SIZES, "not known to patchlife"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_models_are_refused_by_name_with_the_reason(kind: str) -> None:
    config, settings, reason = REFUSED[kind]
    with torch.device("meta"):
        model = getattr(T, kind)(getattr(T, config)(**settings))
    with pytest.raises(UnsupportedModelError, match=f"(?s)transformers' {kind} .*{reason}.*Supported of transformers"):
        wrap(model)


@pytest.mark.parametrize("kind", ["Qwen2VisionTransformerPretrainedModel", "Qwen2_5_VisionTransformerPretrainedModel"])
def test_the_encoders_of_qwen_are_refused(kind: str) -> None:
    module = {"Qwen2V": "qwen2_vl.modeling_qwen2_vl", "Qwen2_": "qwen2_5_vl.modeling_qwen2_5_vl"}[kind[:6]]
    model_class = getattr(__import__(f"transformers.models.{module}", fromlist=[kind]), kind)
    with torch.device("meta"):
        model = model_class(model_class.config_class(depth=1))
    with pytest.raises(UnsupportedModelError, match="windows over patches of several images"):
        wrap(model)


def test_a_subclass_that_replaces_forward_is_refused_and_another_is_not() -> None:
    class Other(T.ViTForImageClassification):
        def forward(self, pixel_values: Any, **kwargs: Any) -> Any:
            return super().forward(pixel_values, **kwargs)

    class Same(T.ViTForImageClassification):
        """With another method."""

        def extra(self) -> int:
            return 1

    config = T.ViTConfig(**SIZES)
    with pytest.raises(UnsupportedModelError, match="Other replaces forward of transformers"):
        wrap(Other(config))
    model = wrap(Same(config).eval(), LifeConfig(budget=0.65, start=2))
    assert isinstance(model, Same)
    assert model.extra() == 1
    assert model(photos("vit")).logits.shape == (3, 2)
    patched = fresh("vit-classifier")
    patched.forward = lambda pixel_values: pixel_values
    with pytest.raises(UnsupportedModelError, match="replaces forward"):
        wrap(patched)


def test_a_core_that_computes_something_else_is_refused() -> None:
    """The library's forward runs the core's, which would not be what `predict` runs."""

    class Other(T.ViTModel):
        def forward(self, pixel_values: Any, **kwargs: Any) -> Any:
            return super().forward(pixel_values, **kwargs)

    model = fresh("vit-classifier")
    model.vit = Other(model.config, add_pooling_layer=False).eval()
    with pytest.raises(UnsupportedModelError, match="Other replaces forward of transformers' ViTModel"):
        wrap(model)
    model.vit = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"expected a vit of transformers inside .*, got Identity"):
        wrap(model)


def test_a_model_with_a_wrapped_core_is_refused() -> None:
    """Its core would drop patches by its own budget, and the budget of the whole would have no effect."""
    model = fresh("vit-classifier")
    model.vit = wrap(model.vit, LifeConfig(budget=0.65, start=2))
    with pytest.raises(
        UnsupportedModelError, match=r"vit of this .* wrapped already; .*: model.vit = model.vit.unwrap"
    ):
        wrap(model)
    model.vit = model.vit.unwrap()
    wrap(model)


def test_a_masking_encoder_is_refused_until_it_masks_nothing() -> None:
    model = T.ViTMAEModel(T.ViTMAEConfig(**SIZES, mask_ratio=0.75))
    with pytest.raises(UnsupportedModelError, match=r"masks 75% .* model.config.mask_ratio = 0.0"):
        wrap(model)
    model.config.mask_ratio = 0.0
    wrap(model)


def test_layers_of_another_class_are_refused() -> None:
    model = fresh("vit")
    model.layers[3] = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"expected layers of ViTLayer, .* got Identity"):
        wrap(model)


def test_models_that_hold_a_vision_transformer_are_refused_with_its_place() -> None:
    config = T.CLIPConfig(text_config=TEXT | {"bos_token_id": 0, "eos_token_id": 1}, vision_config=SIZES)
    with pytest.raises(UnsupportedModelError, match=r"model.vision_model = patchlife.wrap\(model.vision_model\)"):
        wrap(T.CLIPModel(config))
    with pytest.raises(UnsupportedModelError, match="wrapped already"):
        wrap(slim("vit"))


# ---- weights that are not there


def test_a_model_on_meta_gives_flops_and_does_not_run() -> None:
    with torch.device("meta"):
        backbone = T.ViTForImageClassification(T.ViTConfig())
    model = wrap(backbone, LifeConfig(budget=0.6))
    assert 0.58 < flops(model).budget <= 0.6
    images = torch.randn(1, 3, 224, 224)
    for run in (model, model.output, model.lives, lambda x: model.set_budget(1.0)(x)):
        with pytest.raises(ConfigError, match=r"meta device, which holds no values.*Load the weights"):
            run(images)


def test_weights_on_several_devices_are_refused() -> None:
    model = fresh("vit-classifier")
    model.vit.layers[3].mlp.to("meta")
    with pytest.raises(UnsupportedModelError, match=r"most on cpu but vit\.layers\.3\.mlp\.fc1\.weight on meta"):
        wrap(model)


@pytest.mark.filterwarnings("ignore")
def test_a_dispatched_model_is_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(fresh("vit-classifier"), execution_device="cpu")
    with pytest.raises(UnsupportedModelError, match="without device_map"):
        wrap(model)


# ---- images


@pytest.mark.parametrize("budget", [0.65, 1.0])
@pytest.mark.parametrize("name", ["vit-classifier", "dinov3", "clip"])
def test_images_that_do_not_fit(name: str, budget: float) -> None:
    model = slim(name, budget=budget)
    with pytest.raises(ConfigError, match=r"images of 3 channel\(s\), got 1"):
        model(torch.randn(2, 1, 48, 48))
    with pytest.raises(ConfigError, match=r"must be \(batch, channels, height, width\), got shape \(3, 48, 48\)"):
        model(torch.randn(3, 48, 48))
    with pytest.raises(ConfigError, match="smaller than a patch"):
        model(**arguments(name, torch.randn(2, 3, 4, 48)))
    with pytest.raises(ConfigError, match=r"expected pixel_values .*, got nothing"):
        model()
    with pytest.raises(ConfigError, match=r"expected pixel_values .*, got str"):
        model("photo.jpg")


def test_another_size_without_interpolation_gives_the_librarys_error() -> None:
    for name in ("vit-classifier", "clip"):
        images = photos(name, size=(64, 64))
        with pytest.raises((ValueError, RuntimeError)) as expected:
            slim(name).unwrap()(images)
        with pytest.raises(type(expected.value)) as found:
            slim(name)(images)
        assert str(found.value) == str(expected.value)


def test_a_model_that_is_not_square_takes_its_own_size_only() -> None:
    model = slim("vit-not-square")
    assert not model.backbone.any_size
    with pytest.raises(ConfigError, match=r"images of 32 x 56 pixels only.*got 48 x 48"):
        model(torch.randn(1, 3, 48, 48), interpolate_pos_encoding=True)


@pytest.mark.parametrize("name", ["vit-classifier", "dinov2"])
def test_an_attention_mask_is_refused(name: str) -> None:
    mask = torch.ones(3, 37)
    mask[:, 20:] = 0
    with pytest.raises(ConfigError, match=r"takes no attention_mask.*model.unwrap\(\)"):
        slim(name)(photos(name), attention_mask=mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.uint8])
def test_other_number_types_are_converted_as_by_the_library(dtype: torch.dtype) -> None:
    images = (photos("vit-classifier") * 50 + 100).clamp(0, 255).to(dtype)
    model = slim("vit-classifier")
    assert torch.equal(model(images).logits, model(images.float()).logits)


def test_models_without_a_classifier_cannot_get_another_one() -> None:
    with pytest.raises(UnsupportedModelError, match="has no classifier"):
        slim("clip-projection").reset_classifier(3)
