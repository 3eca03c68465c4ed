"""Tiny vision-language models of transformers with random weights that have an effect, and inputs for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from families import liven
from torch import Tensor, nn
from versions import needs_transformers

transformers: Any = pytest.importorskip("transformers")

IMAGE_TOKEN = 60
SIZE, PATCH, DEPTH = 48, 8, 5  # 36 patches
TOWER = {
    "hidden_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": SIZE,
    "patch_size": PATCH,
}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 63,
}
CLIP = {"model_type": "clip_vision_model", **TOWER}
SIGLIP = {"model_type": "siglip_vision_model", **TOWER}
LLAMA = {"model_type": "llama", **TEXT}
TILES = {"image_grid_pinpoints": [[SIZE, SIZE], [2 * SIZE, SIZE]]}


@dataclass(frozen=True)
class VisionLanguage:
    """A vision-language model.

    Attributes:
        make: builds it.
        tower: path of its vision encoder.
        image_tokens: number of image tokens in the prompt for one image.
        images: shape of ``pixel_values`` for two prompts.
        extra: more inputs.
    """

    make: Callable[[], nn.Module]
    tower: str = "model.vision_tower"
    image_tokens: int = 36
    images: tuple[int, ...] = (2, 3, SIZE, SIZE)
    extra: Callable[[], dict[str, Tensor]] = dict


def _llava(name: str, **settings: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(text_config=LLAMA, image_token_index=IMAGE_TOKEN, **settings)
    config.image_token_id = IMAGE_TOKEN
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def _paligemma() -> nn.Module:
    config = transformers.PaliGemmaConfig(
        vision_config={**SIGLIP, "vision_use_head": False, "projection_dim": 32},
        text_config={"model_type": "gemma", **TEXT},
        projection_dim=32,
        image_token_index=IMAGE_TOKEN,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def _idefics(name: str, **settings: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(
        vision_config=TOWER, text_config=LLAMA, image_token_id=IMAGE_TOKEN, pad_token_id=0, **settings
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def _gemma3() -> nn.Module:
    config = transformers.Gemma3Config(
        vision_config={**SIGLIP, "vision_use_head": False},
        text_config={**TEXT, "model_type": "gemma3_text"},
        mm_tokens_per_image=9,
        image_token_index=IMAGE_TOKEN,
    )
    config.image_token_id = IMAGE_TOKEN
    return transformers.Gemma3ForConditionalGeneration(config)


def _cohere(name: str, **settings: Any) -> nn.Module:
    text = {**TEXT, "model_type": "cohere2"}
    config = getattr(transformers, f"{name}Config")(
        vision_config=SIGLIP, text_config=text, image_token_id=IMAGE_TOKEN, downsample_factor=2, **settings
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


_PERCEIVER = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16}
_WHOLE = (2, 1, 3, SIZE, SIZE)  # one image, or one tile, for each prompt


def _sizes() -> dict[str, Tensor]:
    return {"image_sizes": torch.tensor([[SIZE, SIZE], [SIZE, SIZE]])}


MODELS = {
    "llava-clip": VisionLanguage(lambda: _llava("Llava", vision_config=CLIP)),
    "llava-siglip": VisionLanguage(
        lambda: _llava("Llava", vision_config=SIGLIP, vision_feature_select_strategy="full", vision_feature_layer=-1)
    ),
    "llava-two-layers": VisionLanguage(lambda: _llava("Llava", vision_config=CLIP, vision_feature_layer=[1, -2])),
    "llava-next": VisionLanguage(
        lambda: _llava("LlavaNext", vision_config=CLIP, **TILES),
        image_tokens=36 + 36 + 6,
        images=(2, 2, 3, SIZE, SIZE),
        extra=_sizes,
    ),
    "llava-onevision": VisionLanguage(
        lambda: _llava("LlavaOnevision", vision_config=SIGLIP, vision_feature_select_strategy="full", **TILES),
        image_tokens=36 + 36 + 6,
        images=(2, 2, 3, SIZE, SIZE),
        extra=_sizes,
    ),
    "paligemma": VisionLanguage(_paligemma),
    "vip-llava": VisionLanguage(lambda: _llava("VipLlava", vision_config=CLIP, vision_feature_layers=[-2, 2])),
    "gemma3": VisionLanguage(_gemma3, image_tokens=9),
    "aya-vision": VisionLanguage(lambda: _cohere("AyaVision", vision_feature_select_strategy="full"), image_tokens=9),
    "cohere2-vision": VisionLanguage(lambda: _cohere("Cohere2Vision", alignment_intermediate_size=64), image_tokens=9),
    "idefics2": VisionLanguage(
        lambda: _idefics("Idefics2", perceiver_config={"hidden_size": 32, **_PERCEIVER, "num_key_value_heads": 2}),
        "model.vision_model",
        image_tokens=4,
        images=_WHOLE,
    ),
    "idefics3": VisionLanguage(lambda: _idefics("Idefics3", scale_factor=2), "model.vision_model", 9, _WHOLE),
    "smolvlm": VisionLanguage(lambda: _idefics("SmolVLM", scale_factor=2), "model.vision_model", 9, _WHOLE),
}
"""By name."""


@cache
def _built(name: str) -> nn.Module:
    if name in ("idefics2", "idefics3", "smolvlm"):
        needs_transformers("5.24.0", "counting the FLOPs of Idefics encoders")
    return liven(MODELS[name].make()).eval()


def fresh(name: str, attention: str = "sdpa") -> Any:
    """A copy of the model in eval mode, which a test may change."""
    model: Any = copy.deepcopy(_built(name))
    model.set_attn_implementation(attention)
    return model


def inputs(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Two prompts with one image each. The images differ in contrast, so that the lives of their patches differ."""
    model, generator = MODELS[name], torch.Generator().manual_seed(seed)
    images = torch.randn(model.images, generator=generator)
    contrast = torch.tensor([0.4, 1.5]).view(2, *[1] * (images.ndim - 1))
    image = torch.full((2, model.image_tokens), IMAGE_TOKEN)
    words = torch.randint(2, 50, (2, 5), generator=generator)
    tokens = torch.cat((torch.ones(2, 1, dtype=torch.long), image, words), dim=1)
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": images * contrast}
    return given | model.extra()


def tower_of(name: str, model: nn.Module) -> Any:
    """The vision encoder."""
    return model.get_submodule(MODELS[name].tower)


def set_tower(name: str, model: nn.Module, tower: nn.Module) -> None:
    """Put ``tower`` in the place of the vision encoder."""
    path, _, last = MODELS[name].tower.rpartition(".")
    setattr(model.get_submodule(path), last, tower)
