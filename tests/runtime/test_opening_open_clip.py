"""Opening models of open_clip: architectures, tags, files, folders; what is refused, and why."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from saved_models import ARCH, lively, open_clip_config, open_clip_weights, register_open_clip
from small import photo

import patchlife
from patchlife.backbones import Origin, rebuild
from patchlife.config import ModelConfig
from patchlife.errors import CheckpointError, ConfigError, MissingExtraError, UnsupportedModelError
from patchlife.io.files import sha256_of
from patchlife.runtime.opening import open_pipeline

DENSE = {"budget": 1.0, "start": 2}
TRUNKS = {  # a tower of a timm model: its class token is projected by the model's head, or its patches are pooled
    "projected": {"trunk": "test_vit"},
    "pooled": {"trunk": "test_vit", "timm_pool": "avg", "timm_proj": "none"},
    "without a trunk": {},
}
SIZES = {"projected": 160, "pooled": 160, "without a trunk": 48}


@pytest.fixture(params=TRUNKS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def model(kind, tmp_path):
    """The whole model, registered as `ARCH`; its weights are in weights.safetensors."""
    register_open_clip(tmp_path / "configs", **TRUNKS[kind])
    whole = lively(open_clip.create_model(ARCH))
    open_clip_weights(tmp_path / "weights.safetensors", whole)
    return whole


def images(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_an_architecture_and_a_file(model, kind, tmp_path):
    file = tmp_path / "weights.safetensors"
    for config in (
        ModelConfig(f"open_clip:{ARCH}/{file}", life=DENSE),
        ModelConfig(f"open_clip:{ARCH}", file, life=DENSE),
    ):
        pipeline = open_pipeline(config)
        x = images(SIZES[kind])
        torch.testing.assert_close(pipeline.model.output(x), model.encode_image(x), rtol=0, atol=1e-5)
        assert pipeline.name == ARCH
        assert pipeline.labels.names == ()
        assert pipeline.model.backbone.num_classes == 0
        assert pipeline.model.origin == Origin(f"open_clip:{ARCH}", checkpoint=str(file), sha256=sha256_of(file))
    rebuilt = patchlife.wrap(rebuild(pipeline.model.origin))
    assert torch.equal(rebuilt.set_budget(1.0).output(x), pipeline.model.output(x))


def test_a_file_of_the_image_tower_alone(model, kind, tmp_path):
    open_clip_weights(tmp_path / "tower.safetensors", model.visual)
    pipeline = open_pipeline(ModelConfig(f"open_clip:{ARCH}/{tmp_path / 'tower.safetensors'}", life=DENSE))
    x = images(SIZES[kind])
    torch.testing.assert_close(pipeline.model.output(x), model.encode_image(x), rtol=0, atol=1e-5)


def test_preprocessing_is_open_clips(model, kind, tmp_path):
    pipeline = open_pipeline(ModelConfig(f"open_clip:{ARCH}/{tmp_path / 'weights.safetensors'}"))
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(size=SIZES[kind]), is_train=False
    )
    for size in ((90, 70), (71, 200)):
        picture = photo(3, *size)
        torch.testing.assert_close(pipeline.preprocess(picture), transform(picture))


def test_a_tag_brings_weights_preprocessing_and_its_activation(model, kind, tmp_path, monkeypatch):
    tag = {
        "file": str(tmp_path / "weights.safetensors"),
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.6, 0.7],
        "interpolation": "bilinear",
        "resize_mode": "squash",
        "quick_gelu": True,
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, ARCH, {"own": tag})
    pipeline = open_pipeline(ModelConfig(f"open_clip:{ARCH}/own", life=DENSE))
    assert (pipeline.preprocess.mean, pipeline.preprocess.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert (pipeline.preprocess.crop_mode, pipeline.preprocess.interpolation) == ("squash", "bilinear")
    assert pipeline.model.origin == Origin(f"open_clip:{ARCH}/own", pretrained=True)
    reference = open_clip.create_model(ARCH, force_quick_gelu=True).eval()
    reference.load_state_dict(model.state_dict())
    x = images(SIZES[kind])
    torch.testing.assert_close(pipeline.model.output(x), reference.encode_image(x), rtol=0, atol=1e-5)
    tag["resize_mode"] = "longest"
    with pytest.raises(UnsupportedModelError, match="resizes photos by the mode 'longest', which is not supported"):
        open_pipeline(ModelConfig(f"open_clip:{ARCH}/own"))


def test_another_image_size(model, kind, tmp_path):
    """Positions are interpolated as open_clip does; schedule and forward pass agree."""
    size = SIZES[kind] + 32
    config = ModelConfig(f"open_clip:{ARCH}/{tmp_path / 'weights.safetensors'}", image_size=size, life=DENSE)
    pipeline = open_pipeline(config)
    reference = open_clip.create_model(ARCH, str(tmp_path / "weights.safetensors"), force_image_size=size).eval()
    x = images(size)
    if kind == "without a trunk":  # open_clip cannot load a timm tower at another size than that of its weights
        torch.testing.assert_close(pipeline.model.output(x), reference.encode_image(x), rtol=0, atol=1e-5)
    assert pipeline.preprocess.size == pipeline.model.backbone.image_size == (size, size)
    _, lives = pipeline.model.set_budget(0.6).predict(x)
    assert lives.kept[0].tolist() == list(pipeline.model.schedule().kept)
    with pytest.raises(ConfigError, match="image_size must be a multiple of the patches"):
        open_pipeline(ModelConfig(config.model, image_size=size + 1))


def test_an_adapter_opens_its_model(model, kind, tmp_path):
    pipeline = open_pipeline(ModelConfig(f"open_clip:{ARCH}/{tmp_path / 'weights.safetensors'}", life={"budget": 0.7}))
    patchlife.save(pipeline.model, tmp_path / "adapter")
    opened = open_pipeline(ModelConfig(str(tmp_path / "adapter")))
    x = images(SIZES[kind])
    assert torch.equal(opened.model.output(x), pipeline.model.output(x))
    assert opened.name == ARCH
    assert opened.preprocess == pipeline.preprocess
    moved = (tmp_path / "weights.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(CheckpointError, match="give their present location with --checkpoint FILE"):
        open_pipeline(ModelConfig(str(tmp_path / "adapter")))
    assert torch.equal(
        open_pipeline(ModelConfig(str(tmp_path / "adapter"), moved)).model.output(x), opened.model.output(x)
    )


# ---- folders and the hub


@pytest.fixture
def folder(model, kind, tmp_path) -> Path:
    """A folder as open_clip's push_to_hf_hub writes it."""
    content = {"model_cfg": open_clip_config(**TRUNKS[kind]), "preprocess_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3}}
    path = tmp_path / "folder"
    path.mkdir()
    (path / "open_clip_config.json").write_text(json.dumps(content))
    open_clip_weights(path / "open_clip_model.safetensors", model)
    return path


def test_a_folder_and_a_model_of_the_hub(folder, model, kind, monkeypatch):
    asked = []

    def snapshot_download(repository, allow_patterns):
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    x = images(SIZES[kind])
    for name in (f"open_clip:local-dir:{folder}", "open_clip:hf-hub:some-org/clip"):
        pipeline = open_pipeline(ModelConfig(name, life=DENSE))
        torch.testing.assert_close(pipeline.model.output(x), model.encode_image(x), rtol=0, atol=1e-5)
        assert pipeline.preprocess.mean == (0.1, 0.1, 0.1)
        assert pipeline.model.origin == Origin(name, pretrained=True)
        assert pipeline.name == ("folder" if "local-dir" in name else "clip")
    assert not any(pattern.endswith(".bin") for pattern in asked[0])


def test_a_folder_with_missing_or_damaged_files(folder):
    name = f"open_clip:local-dir:{folder}"
    weights = (folder / "open_clip_model.safetensors").read_bytes()
    (folder / "open_clip_model.safetensors").write_bytes(weights[:4000])
    with pytest.raises(CheckpointError, match=r"is not a readable safetensors file .* is the download complete"):
        open_pipeline(ModelConfig(name))
    (folder / "open_clip_model.safetensors").rename(folder / "open_clip_pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"no open_clip_model.safetensors; pickles .* not opened.* convert it once"
    ):
        open_pipeline(ModelConfig(name))
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"expected a model of open_clip with open_clip_config\.json, got none or"
    ):
        open_pipeline(ModelConfig(name))


# ---- what is refused


def test_random_weights_must_be_allowed():
    with pytest.raises(ConfigError, match=r"open_clip:ViT-B-32 would have random weights; give open_clip:ViT-B-32/TAG"):
        open_pipeline(ModelConfig("open_clip:ViT-B-32"))


def test_names_that_open_clip_does_not_have():
    with pytest.raises(
        UnsupportedModelError, match="open_clip has no model named 'ViT-B-33'; did you mean one of ViT-B-32"
    ):
        open_pipeline(ModelConfig("open_clip:ViT-B-33"))
    with pytest.raises(
        UnsupportedModelError, match="no weights 'nonsense' for ViT-B-32; its tags are openai, laion400m"
    ):
        open_pipeline(ModelConfig("open_clip:ViT-B-32/nonsense"))
    with pytest.raises(CheckpointError, match=r"expected a \.safetensors file after ViT-B-32/, got weights.pt"):
        open_pipeline(ModelConfig("open_clip:ViT-B-32/weights.pt"))
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*none.safetensors"):
        open_pipeline(ModelConfig("open_clip:ViT-B-32/none.safetensors"))


def test_a_tag_that_cannot_be_downloaded(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(CheckpointError, match=r"ViT-B-32/openai could not be loaded \(no route to host\); check the"):
        open_pipeline(ModelConfig("open_clip:ViT-B-32/openai"))


def test_pretrained_without_a_tag():
    with pytest.raises(ConfigError, match="several weights for ViT-B-32; give open_clip:ViT-B-32/TAG: its tags are"):
        open_pipeline(ModelConfig("open_clip:ViT-B-32", pretrained=True))


def test_two_files_and_arguments_of_timm(model, tmp_path):
    file = tmp_path / "weights.safetensors"
    with pytest.raises(ConfigError, match=r"names its weights, got --checkpoint as well; give one of the two"):
        open_pipeline(ModelConfig(f"open_clip:{ARCH}/{file}", file))
    with pytest.raises(ConfigError, match=r"--model-args are arguments of timm's models; open_clip:.* takes none"):
        open_pipeline(ModelConfig(f"open_clip:{ARCH}/{file}", model_args={"num_classes": 3}))


def test_weights_of_another_model(model, tmp_path):
    weights = {f"visual.{name}": tensor for name, tensor in model.visual.state_dict().items()}
    name = sorted(weights)[0]
    save_file({n: t.clone() for n, t in weights.items() if n != name}, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit .*missing: "):
        open_pipeline(ModelConfig(f"open_clip:{ARCH}/{tmp_path / 'part.safetensors'}"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [1, 1, 1, 1], "width": 16}, "expected open_clip's VisionTransformer, got ModifiedResNet"),
        ({"trunk": "test_convnext", "timm_pool": "", "timm_proj": "none"}, "patches can be dropped only where"),
        (
            {"trunk": "test_vit", "timm_proj": "linear"},
            r"a layer of its own; slim it in Python: visual.trunk = patchlife",
        ),
    ],
)
def test_towers_whose_patches_cannot_be_dropped(settings, message, tmp_path):
    register_open_clip(tmp_path, **settings)
    with pytest.raises(UnsupportedModelError, match=message):
        open_pipeline(ModelConfig(f"open_clip:{ARCH}"), random_weights=True)


def test_open_clip_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(MissingExtraError, match=r"needs open_clip, .*: pip install 'patchlife\[open_clip\]'"):
        open_pipeline(ModelConfig("open_clip:ViT-B-32"))
