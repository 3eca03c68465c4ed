"""Images of different sizes in one call, for models of transformers that interpolate their positions."""

from __future__ import annotations

import pytest
import torch
from reference import assert_close
from transformers_families import fresh, slim

from patchlife.errors import ConfigError

SIZES = [(40, 56), (48, 48), (56, 72), (40, 56)]


def pictures() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(3, *size, generator=draw) for size in SIZES]


@pytest.mark.parametrize("variant", ["fixed, merge", "adaptive"])
@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3", "clip", "siglip"])
def test_each_image_gets_its_solo_result(name: str, variant: str) -> None:
    model, images = slim(name, "fixed, merge", fresh(name)), pictures()
    if variant == "adaptive":
        model.calibrate([[image, image * 0.5] for image in images]).set_mode("adaptive")
    outputs, lives = model.predict(images)
    assert_close(outputs, torch.cat([model.output(image[None]) for image in images]))
    assert [own.grid for own in lives] == [(h // 8, w // 8) for h, w in SIZES]
    dense = torch.cat([model.backbone.output(image[None]) for image in images])
    assert not torch.allclose(outputs, dense, atol=1e-3)


def test_forward_names_the_methods_that_take_lists() -> None:
    with pytest.raises(ConfigError, match=r"expected pixel_values .*, got list; .*output\(images\)"):
        slim("vit", "fixed")(pictures())


def test_a_model_that_cannot_interpolate_is_refused() -> None:
    with pytest.raises(ConfigError, match="only, because transformers interpolates square tables"):
        slim("vit-not-square", "fixed").output(pictures())
