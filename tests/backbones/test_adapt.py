"""Which models are accepted, how they are described, and which errors others raise."""

from __future__ import annotations

import pytest
import timm
import torch
from families import FAMILIES, SMALL, built, fresh, photos
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from versions import needs_timm

from patchlife import wrap
from patchlife.backbones import FAMILIES as KNOWN
from patchlife.backbones import adapt
from patchlife.errors import ConfigError, PatchLifeError, UnsupportedModelError


@pytest.mark.parametrize("name", FAMILIES)
def test_depth_width_prefix_and_grid_of_a_family(name: str) -> None:
    vit, backbone = built(name), adapt(built(name))
    features = vit.forward_features(photos(name))
    rows, cols = backbone.grid_of(photos(name))
    assert features.shape[1:] == (backbone.prefix + rows * cols, backbone.dim)
    assert backbone.embed(photos(name)).grid == (rows, cols)
    assert backbone.depth == len(vit.blocks) == SMALL["depth"]
    assert type(vit).__name__ in backbone.family


@pytest.mark.parametrize(
    ("name", "prefix", "reads_class", "description"),
    [
        ("vit", 1, True, "VisionTransformer, 1 prefix tokens, reads the class token"),
        ("deit-distilled", 2, True, "VisionTransformerDistilled, 2 prefix tokens"),
        ("dinov2-registers", 5, True, "5 prefix tokens"),
        ("siglip", 0, False, "no class token, pools patches (map)"),
        ("class-and-gap", 1, False, "pools patches (avg)"),
        ("refined-pool", 1, False, "pools patches (prr)"),
        ("parallel-things", 1, True, "ParallelThingsBlock"),
        ("dinov3", 5, True, "Eva, RoPE, 5 prefix tokens"),
    ],
)
def test_the_description_of_a_model(name: str, prefix: int, reads_class: bool, description: str) -> None:
    backbone = adapt(built(name))
    assert (backbone.prefix, backbone.reads_class) == (prefix, reads_class)
    assert description in backbone.family


def test_patch_size_image_size_grid_and_channels() -> None:
    backbone = adapt(built("not-square-patches"))
    assert backbone.patch_size == (8, 6)
    assert backbone.image_size == (48, 48)
    assert backbone.grid == (6, 8)
    assert adapt(built("qk-norm")).channels == 1


class ReplacedForward(VisionTransformer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class ReplacedFeatures(VisionTransformer):
    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(self.patch_embed(x)))


class ReplacedPositions(VisionTransformer):
    def _pos_embed(self, x: Tensor) -> Tensor:
        return super()._pos_embed(x).flip(1)


def small(kind: type[VisionTransformer]) -> VisionTransformer:
    return kind(**SMALL)


REFUSED = {
    "swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", embed_dim=12, num_heads=(1,) * 4),
        "SwinTransformer",
    ),
    "convnext": (lambda: timm.create_model("test_convnext"), "ConvNeXt"),
    "relative positions": (
        lambda: timm.create_model("vit_relpos_small_patch16_224", **SMALL),
        "VisionTransformerRelPos",
    ),
    "beit": (lambda: timm.create_model("beit_base_patch16_224", **SMALL), "Beit"),
    "differential attention": (
        lambda: timm.create_model("vit_dwee_patch16_reg1_gap_256", **SMALL),
        "Block with DiffAttention",
    ),
    "differential parallel": (
        lambda: timm.create_model("vit_dpwee_patch16_reg1_gap_256", **SMALL),
        "DiffParallelScalingBlock",
    ),
    "not a vit": (lambda: nn.Linear(3, 3), "Linear"),
    "replaced forward": (
        lambda: small(ReplacedForward),
        "ReplacedForward replaces forward of timm's VisionTransformer",
    ),
    "replaced features": (lambda: small(ReplacedFeatures), "ReplacedFeatures replaces forward_features"),
    "replaced positions": (lambda: small(ReplacedPositions), "ReplacedPositions replaces _pos_embed"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_models_are_refused_by_name(what: str) -> None:
    make, message = REFUSED[what]
    if what.startswith("differential"):
        needs_timm("1.0.23", "differential attention")
    with pytest.raises(UnsupportedModelError) as caught:
        wrap(make())
    assert message in str(caught.value)
    assert isinstance(caught.value, PatchLifeError)
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize("what", ["swin", "convnext", "relative positions", "beit", "not a vit", "replaced forward"])
def test_refusals_name_the_families_that_work(what: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        wrap(REFUSED[what][0]())
    assert KNOWN in str(caught.value)


def test_a_forward_set_on_the_instance_is_refused() -> None:
    """Libraries that patch models do this. Without the refusal the patch would have no effect."""
    vit = fresh("vit")
    vit.forward = lambda x: x
    with pytest.raises(UnsupportedModelError, match="replaces forward"):
        wrap(vit)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("vit", (3, 48, 48), r"images must be \(batch, channels, height, width\), got shape \(3, 48, 48\)"),
        ("vit", (2, 3, 48, 40), "takes images of 48 x 48 pixels, got 48 x 40; resize them, or build"),
        ("not-square", (2, 3, 56, 32), "takes images of 32 x 56 pixels, got 56 x 32"),
        ("vit", (2, 1, 48, 48), r"takes images of 3 channel\(s\), got 1"),
        ("qk-norm", (2, 3, 48, 48), r"takes images of 1 channel\(s\), got 3"),
        ("dynamic", (2, 3, 44, 48), "44 x 48 pixels cannot be cut into patches of 8 x 8"),
    ],
)
def test_images_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrap(built(name))(torch.zeros(shape))


def test_a_padding_model_takes_any_image_size() -> None:
    assert wrap(built("dynamic-padded"))(torch.zeros(1, 3, 44, 50)).shape == (1, 10)
