"""Checkpoints of training scripts: keys with prefixes, other image sizes, any number of classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from families import liven
from safetensors.torch import save_file
from torch import Tensor, nn

from patchlife.backbones import build, rebuild
from patchlife.errors import CheckpointError, ConfigError, UnsupportedModelError

SMALL = {"depth": 2}
CLASS = "vit_tiny_patch16_224"
NAMES = {
    CLASS: "class token with a position",
    "deit_tiny_distilled_patch16_224": "two prefix tokens, two heads",
    "deit3_small_patch16_224": "class token without a position",
    "vit_small_patch14_reg4_dinov2": "registers without positions, 518 pixels",
    "vit_base_patch16_siglip_224": "no class token, attention pool",
    "eva02_tiny_patch14_224": "RoPE and positions",
    "vit_small_patch16_rope_224": "RoPE, no positions",
    "vit_small_patch16_dinov3": "RoPE, registers",
}


def model(name: str = CLASS, **arguments: Any) -> Any:
    """The model that a checkpoint is saved from."""
    return liven(timm.create_model(name, **{**SMALL, "num_classes": 5, **arguments}), 0).eval()


def saved(weights: dict[str, Tensor], folder: Path) -> Path:
    save_file({key: value.clone() for key, value in weights.items()}, folder / "w.safetensors")
    return folder / "w.safetensors"


def images(size: tuple[int, int], channels: int = 3) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))


def same_outputs(vit: Any, trained: nn.Module, size: tuple[int, int]) -> bool:
    with torch.no_grad():
        return vit.num_classes == 5 and torch.allclose(vit(images(size)), trained(images(size)), atol=1e-6)


# ---- prefixes


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "backbone.",
        "state_dict.",
        "net.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "state_dict.model.",
        "state_dict.module._orig_mod.model.backbone.",
        "visual.trunk.",
        "encoder.0.",
    ],
)
def test_a_prefix_of_all_keys_is_removed(prefix: str, tmp_path: Path) -> None:
    trained = model()
    file = saved({prefix + key: value for key, value in trained.state_dict().items()}, tmp_path)
    vit, origin = build(CLASS, file, model_args=SMALL)
    assert same_outputs(vit, trained, (224, 224))
    assert origin.options == {**SMALL, "num_classes": 5}


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
@pytest.mark.parametrize("prefix", ["", "model.", "module."])
def test_wrappers_of_single_blocks_are_removed_from_keys(wrapper: str, prefix: str, tmp_path: Path) -> None:
    trained = model()
    keys = {key: key.replace("blocks.1.", f"blocks.1.{wrapper}.") for key in trained.state_dict()}
    file = saved({prefix + keys[key]: value for key, value in trained.state_dict().items()}, tmp_path)
    assert same_outputs(build(CLASS, file, model_args=SMALL)[0], trained, (224, 224))


def test_a_classifier_outside_the_prefix_is_loaded(tmp_path: Path) -> None:
    trained = model()
    weights = {k if k.startswith("head.") else f"backbone.{k}": v for k, v in trained.state_dict().items()}
    assert same_outputs(build(CLASS, saved(weights, tmp_path), model_args=SMALL)[0], trained, (224, 224))


def test_other_keys_outside_the_prefix_are_named(tmp_path: Path) -> None:
    weights = {f"model.{key}": value for key, value in model().state_dict().items()}
    weights["criterion.weight"] = torch.ones(5)
    with pytest.raises(CheckpointError, match=r"not of this model: criterion\.weight$"):
        build(CLASS, saved(weights, tmp_path), model_args=SMALL)


@pytest.mark.parametrize(
    ("prefixes", "named"),
    [
        (("student.", "teacher."), "'student.', 'teacher.'"),
        (("", "ema."), "none, 'ema.'"),
        (("", "module."), "none, 'module.'"),
        (("model.", "model_ema.module."), "'model.', 'model_ema.'"),
    ],
)
def test_two_models_in_one_file_are_refused(prefixes: tuple[str, ...], named: str, tmp_path: Path) -> None:
    weights = {prefix + key: value for prefix in prefixes for key, value in model().state_dict().items()}
    with pytest.raises(CheckpointError, match=f"holds 2 models, whose keys have the prefixes {named}; save one"):
        build(CLASS, saved(weights, tmp_path), model_args=SMALL)


def test_missing_keys_behind_a_prefix_are_named(tmp_path: Path) -> None:
    weights = {f"module.{key}": value for key, value in model().state_dict().items()}
    weights["module.norm.scale"] = weights.pop("module.norm.weight")
    with pytest.raises(CheckpointError, match=r"missing: norm\.weight; not of this model: norm\.scale"):
        build(CLASS, saved(weights, tmp_path), model_args=SMALL)


# ---- image sizes


def sizes_of(name: str) -> tuple[int, int]:
    """(image size of the fine-tuned model, another size to ask for); neither is the model's default."""
    patch = 14 if "patch14" in name else 16
    return 6 * patch, 9 * patch


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "asked",
    [
        "nothing",
        "another",
        pytest.param("the file's", marks=pytest.mark.slow),
        pytest.param("the model's own", marks=pytest.mark.slow),
    ],
)
def test_a_file_of_another_image_size(name: str, asked: str, tmp_path: Path) -> None:
    own = timm.get_pretrained_cfg(name).input_size[1]
    made_for, other = sizes_of(name)
    positions = name not in ("vit_small_patch16_rope_224", "vit_small_patch16_dinov3")
    trained = model(name, img_size=made_for)
    size = {"nothing": None, "the file's": made_for, "another": other, "the model's own": own}[asked]
    vit, origin = build(name, saved(trained.state_dict(), tmp_path), image_size=size, model_args=SMALL)
    expected = size or (made_for if positions else own)
    assert vit.patch_embed.img_size == (expected, expected)
    trained.set_input_size(img_size=(expected, expected))
    assert same_outputs(vit, trained, (expected, expected))
    assert same_outputs(rebuild(origin), trained, (expected, expected))


@pytest.mark.parametrize("name", [CLASS, "eva02_tiny_patch14_224"])
def test_a_file_of_the_default_size_at_another_size(name: str, tmp_path: Path) -> None:
    trained = model(name)
    size = sizes_of(name)[1]
    vit, origin = build(name, saved(trained.state_dict(), tmp_path), image_size=size, model_args=SMALL)
    trained.set_input_size(img_size=(size, size))
    assert same_outputs(vit, trained, (size, size))
    assert same_outputs(rebuild(origin), trained, (size, size))


@pytest.mark.parametrize("made_for", [(64, 144), (112, 448)])  # 36 patches would be a square, 196 the model's own
@pytest.mark.parametrize("asked", [None, 96])
def test_a_file_for_images_that_are_not_square(made_for: tuple[int, int], asked: int | None, tmp_path: Path) -> None:
    trained = model(img_size=made_for)
    args = {**SMALL, "img_size": made_for}
    vit, origin = build(CLASS, saved(trained.state_dict(), tmp_path), image_size=asked, model_args=args)
    size = (asked, asked) if asked else made_for
    trained.set_input_size(img_size=size)
    assert vit.patch_embed.img_size == size
    assert same_outputs(vit, trained, size)
    assert same_outputs(rebuild(origin), trained, size)


def test_a_file_for_square_images_at_a_size_that_is_not_square(tmp_path: Path) -> None:
    trained = model(img_size=96)
    args = {**SMALL, "img_size": (64, 128)}
    vit, origin = build(CLASS, saved(trained.state_dict(), tmp_path), model_args=args)
    trained.set_input_size(img_size=(64, 128))
    assert same_outputs(vit, trained, (64, 128))
    assert same_outputs(rebuild(origin), trained, (64, 128))


def test_positions_of_unknown_height_and_width_are_refused(tmp_path: Path) -> None:
    file = saved(model(img_size=(64, 128)).state_dict(), tmp_path)
    with pytest.raises(CheckpointError, match=r"of another shape: pos_embed .* --model-args img_size=HEIGHT,WIDTH$"):
        build(CLASS, file, model_args=SMALL)


@pytest.mark.parametrize("shape", [(192,), (197, 192), (1, 14, 14, 192), (1, 1, 192), (1, 198, 192), (1, 197, 191)])
def test_positions_of_a_wrong_shape_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    weights = model().state_dict() | {"pos_embed": torch.zeros(shape)}
    with pytest.raises(CheckpointError, match="of another shape: pos_embed"):
        build(CLASS, saved(weights, tmp_path), model_args=SMALL)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_any_number_format_is_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = {key: value.to(dtype) for key, value in model().state_dict().items()}
    vit, _ = build(CLASS, saved(weights, tmp_path), model_args=SMALL)
    assert torch.equal(vit.norm.weight, weights["norm.weight"].float())


@pytest.mark.parametrize("size", [170, (160, 170)])
def test_an_image_size_that_is_no_multiple_of_the_patch_size_is_refused(size: Any) -> None:
    with pytest.raises(ConfigError, match=r"img_size must be a multiple of the patches' 16 x 16 pixels, got"):
        build(CLASS, model_args={**SMALL, "img_size": size})


@pytest.mark.parametrize("size", [0, -16, (224,), (224, 0), (2, 2, 2), "large", 224.5])
def test_an_invalid_image_size_is_refused(size: Any) -> None:
    with pytest.raises(ConfigError, match="img_size"):
        build(CLASS, model_args={**SMALL, "img_size": size})


def test_a_model_with_dynamic_image_size(tmp_path: Path) -> None:
    trained = model(img_size=96, dynamic_img_size=True)
    args = {**SMALL, "dynamic_img_size": True}
    vit, _ = build(CLASS, saved(trained.state_dict(), tmp_path), model_args=args)
    for size in [(96, 96), (64, 128)]:
        assert same_outputs(vit, trained, size)


# ---- classes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("classes", [0, 5])
def test_the_number_of_classes_is_that_of_the_file(name: str, classes: int, tmp_path: Path) -> None:
    trained = model(name, num_classes=classes)
    vit, origin = build(name, saved(trained.state_dict(), tmp_path), model_args=SMALL)
    assert vit.num_classes == origin.options["num_classes"] == classes
    assert vit.state_dict().keys() == trained.state_dict().keys()
    assert rebuild(origin).num_classes == classes


def test_another_number_of_classes_than_the_files_is_refused(tmp_path: Path) -> None:
    args = {**SMALL, "num_classes": 7}
    with pytest.raises(CheckpointError, match=r"of another shape: head.bias \(5,\) for \(7,\)"):
        build(CLASS, saved(model().state_dict(), tmp_path), model_args=args)


# ---- how the model was built


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        ({"global_pool": "avg"}, "global_pool=avg"),
        ({"global_pool": "map"}, "global_pool=map"),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, "class_token=false global_pool=avg"),
        ({"in_chans": 1}, "in_chans=1"),
        ({"patch_size": 8}, "patch_size=8,8"),
        ({"init_values": 0.1}, "init_values=1e-5"),
        ({"qk_norm": True}, "qk_norm=true"),
        ({"reg_tokens": 4, "no_embed_class": True}, "reg_tokens=4"),
        ({"global_pool": "avg", "in_chans": 1}, "global_pool=avg in_chans=1"),
    ],
)
def test_the_error_suggests_the_arguments_that_the_model_was_built_with(
    args: dict[str, Any], hint: str, tmp_path: Path
) -> None:
    trained = model(**args)
    file = saved(trained.state_dict(), tmp_path)
    with pytest.raises(CheckpointError, match=r"does not fit VisionTransformer.* --model-args .*") as caught:
        build(CLASS, file, model_args=SMALL)
    assert hint in str(caught.value)
    vit, origin = build(CLASS, file, model_args={**SMALL, **args})
    batch = images((224, 224), args.get("in_chans", 3))
    with torch.no_grad():
        for loaded in (vit, rebuild(origin)):
            assert torch.equal(loaded(batch), trained(batch))
    assert {**SMALL, **args}.items() <= origin.options.items()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"global_pol": "avg"}, "takes no model argument 'global_pol'; did you mean global_pool"),
        ({"zzz": 1}, "takes no model argument 'zzz'$"),
        ({"global_pool": "average"}, "cannot build .* with the model arguments global_pool=average: "),
        ({"class_token": False}, "with the model arguments class_token=False: "),
        ({"depth": "two"}, "cannot build .* depth=two"),
        ({"act_layer": "nope"}, "cannot build .* act_layer=nope"),
        ({"checkpoint_path": "x.pth"}, "checkpoint_path is not an argument of the model; weights come from"),
        ({"pretrained": True}, "pretrained is not an argument of the model"),
        ({"pretrained_cfg": "x"}, "pretrained_cfg is not an argument of the model"),
    ],
)
@pytest.mark.parametrize("pretrained", [False, True])
def test_arguments_that_the_model_does_not_take_are_refused(
    args: dict[str, Any], message: str, pretrained: bool
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(CLASS, model_args=args, pretrained=pretrained)


def test_features_only_is_refused() -> None:
    from patchlife.backbones import adapt

    with pytest.raises(UnsupportedModelError):
        adapt(build("test_vit", model_args={"features_only": True})[0])
