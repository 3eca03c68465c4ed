"""Opening a MODEL argument: what is accepted, what is refused, and the messages."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small import CLASSES, NAME, checkpoint, weights
from versions import needs_timm

import patchlife
from patchlife.config import LifeConfig, ModelConfig
from patchlife.data.labels import imagenet_labels
from patchlife.errors import AdapterError, CheckpointError, ConfigError, PatchLifeError, UnsupportedModelError
from patchlife.runtime import demo_model, opening
from patchlife.runtime.opening import open_pipeline
from patchlife.runtime.pipeline import pick_device


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("weights") / "vit.safetensors")


@pytest.fixture
def adapter(vit_file, tmp_path) -> Path:
    """An adapter with its own backbone file, which tests may move or damage."""
    backbone = shutil.copy(vit_file, tmp_path / "backbone.safetensors")
    pipeline = open_pipeline(ModelConfig(NAME, checkpoint=backbone, life={"budget": 0.7, "drops": (2, 4)}))
    generator = torch.Generator().manual_seed(0)
    pipeline.model.calibrate([torch.randn(8, 3, 160, 160, generator=generator)])
    return patchlife.save(pipeline.model, tmp_path / "adapter")


# ---- timm names


def test_a_timm_name_and_a_file(vit_file):
    pipeline = open_pipeline(ModelConfig(NAME, checkpoint=vit_file, life={"budget": 0.5}))
    assert pipeline.name == NAME
    assert pipeline.model.settings == LifeConfig(budget=0.5)
    assert not pipeline.model.training
    assert pipeline.preprocess.size == (160, 160)
    assert pipeline.preprocess.mean == (0.5, 0.5, 0.5)
    assert pipeline.labels.names == tuple("0123456789")
    assert pipeline.model.origin.checkpoint == str(vit_file)
    for name, tensor in load_file(vit_file).items():
        assert torch.equal(pipeline.model.backbone.model.state_dict()[name], tensor)


def test_random_weights_must_be_allowed():
    with pytest.raises(ConfigError, match=f"{NAME} would have random weights; .*--checkpoint FILE.*--pretrained"):
        open_pipeline(ModelConfig(NAME))
    pipeline = open_pipeline(ModelConfig(NAME), random_weights=True)
    assert len(pipeline.labels.names) == 1000


def test_weights_from_two_places(vit_file):
    with pytest.raises(ConfigError, match="from --checkpoint or from --pretrained, not from both"):
        open_pipeline(ModelConfig(NAME, checkpoint=vit_file, pretrained=True))


def test_an_unknown_tag(vit_file):
    for config in (ModelConfig(f"{NAME}.x"), ModelConfig(f"{NAME}.x", checkpoint=vit_file)):
        with pytest.raises(UnsupportedModelError, match=f"no weights tagged 'x' for {NAME}; .*{NAME}.r160_in1k"):
            open_pipeline(config)


def test_an_exported_file_or_bundle(tmp_path):
    (tmp_path / "vit.onnx").touch()
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/bundle.json").touch()
    for name in ("vit.onnx", "bundle"):
        with pytest.raises(
            ConfigError, match=f"got the file or bundle .*{name}; only predict, embed, eval, explore and serve run"
        ):
            open_pipeline(ModelConfig(str(tmp_path / name)), random_weights=True)


def test_an_unknown_name():
    with pytest.raises(UnsupportedModelError, match="timm has no model named 'vit_tiny_patch15'"):
        open_pipeline(ModelConfig("vit_tiny_patch15"), random_weights=True)


@pytest.mark.parametrize("name", ["test_convnext", "resnet18"])
def test_a_model_whose_patches_cannot_be_dropped(name):
    with pytest.raises(
        UnsupportedModelError, match=r"expected a Vision Transformer of timm, got timm\.models\..*Supported: ViT"
    ):
        open_pipeline(ModelConfig(name), random_weights=True)


def test_pretrained_weights_that_cannot_be_downloaded(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route to the hub\nand a long trace")

    monkeypatch.setattr(opening, "build", unreachable)
    with pytest.raises(CheckpointError, match=r"could not be loaded \(no route to the hub\); check the network"):
        open_pipeline(ModelConfig(NAME, pretrained=True))


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route to the hub\nand a long trace")

    monkeypatch.setattr("timm.models._factory.load_model_config_from_hf", unreachable)
    expected = (
        r"me/mine could not be loaded \(no route to the hub\); .*Without network: copy its config.json and "
        "model.safetensors into a folder and give local-dir:FOLDER"
    )
    for config in (ModelConfig("hf-hub:me/mine"), ModelConfig("hf_hub:me/mine", model_args={"drop_rate": 0.1})):
        with pytest.raises(CheckpointError, match=expected):
            open_pipeline(config)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model as timm writes it for the hub."""
    trained = timm.create_model(NAME, num_classes=3, in_chans=1)
    metadata = {"label_names": ["ant", "bee", "cow"], "pretrained_cfg": {"crop_pct": 0.8}}
    timm.models.save_for_hf(trained, tmp_path / "local", metadata, {"in_chans": 1}, safe_serialization=True)
    return tmp_path / "local"


def test_a_folder_has_its_own_weights_labels_and_preprocessing(folder, tmp_path):
    needs_timm("1.0.31", "safetensors in a local folder")
    pipeline = open_pipeline(ModelConfig(f"local-dir:{folder}", life={"budget": 0.5}))
    assert pipeline.name == NAME
    assert pipeline.labels.names == ("ant", "bee", "cow")
    assert (pipeline.preprocess.crop_fraction, pipeline.preprocess.channels) == (0.8, 1)
    saved = load_file(folder / "model.safetensors")
    assert torch.equal(pipeline.model.backbone.model.head.weight, saved["head.weight"])
    adapter = patchlife.save(pipeline.model, tmp_path / "adapter")
    again = open_pipeline(ModelConfig(str(adapter)))
    assert torch.equal(again.model.backbone.model.head.weight, saved["head.weight"])
    assert again.labels == pipeline.labels
    assert patchlife.load(adapter).origin == again.model.origin == pipeline.model.origin


def test_a_folder_of_weights_that_do_not_fit(folder):
    needs_timm("1.0.31", "safetensors in a local folder")
    save_file(weights(in_chans=1, depth=3, num_classes=3), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"could not be loaded \(Error.* the folder must hold config.json and"):
        open_pipeline(ModelConfig(f"local-dir:{folder}"))


# ---- arguments of the model


def test_arguments_reach_the_model_the_photos_and_the_adapter(tmp_path):
    args = {"global_pool": "avg", "in_chans": 1, "img_size": (96, 128)}
    file = checkpoint(tmp_path / "w.safetensors", **args)
    pipeline = open_pipeline(ModelConfig(NAME, checkpoint=file, model_args=args))
    assert (pipeline.preprocess.size, pipeline.preprocess.channels) == ((96, 128), 1)
    assert pipeline.preprocess.mean == (0.5,)
    logits = pipeline.model(torch.ones(1, 1, 96, 128))
    adapter = patchlife.save(pipeline.model, tmp_path / "adapter")
    for again in (open_pipeline(ModelConfig(str(adapter))).model, patchlife.load(adapter)):
        assert torch.equal(again(torch.ones(1, 1, 96, 128)), logits)
        assert again.origin.options == {**args, "num_classes": CLASSES}
    larger = open_pipeline(ModelConfig(str(adapter), image_size=160))
    assert larger.preprocess.size == (160, 160)
    assert open_pipeline(ModelConfig(str(patchlife.save(larger.model, tmp_path / "larger")))).preprocess.size == (
        160,
        160,
    )


def test_a_number_of_channels_that_photos_do_not_have():
    with pytest.raises(ConfigError, match=r"so in_chans must be 3 or 1, got 4"):
        open_pipeline(ModelConfig(NAME, model_args={"in_chans": 4}), random_weights=True)


def test_an_argument_that_the_model_does_not_take(vit_file):
    with pytest.raises(ConfigError, match=f"{NAME} takes no model argument 'globalpool'; did you mean global_pool"):
        open_pipeline(ModelConfig(NAME, checkpoint=vit_file, model_args={"globalpool": "avg"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.3.attn.qkv.weight"), "missing: blocks.3.attn.qkv.weight"),
        (lambda w: w.update(extra=torch.zeros(1)), "not of this model: extra"),
        (lambda w: w.update(pos_embed=torch.zeros(1, 6, 64)), r"of another shape: pos_embed \(1, 6, 64\) for"),
        (lambda w: w["norm.weight"].fill_(torch.nan), "holds NaN or infinite weights in norm.weight"),
    ],
)
def test_a_checkpoint_that_does_not_fit(change, message, tmp_path):
    tensors = weights()
    change(tensors)
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_pipeline(ModelConfig(NAME, checkpoint=tmp_path / "w.safetensors"))


def test_files_that_are_no_checkpoint(tmp_path, vit_file):
    torch.save(weights(), tmp_path / "w.pth")
    (tmp_path / "cut.safetensors").write_bytes(vit_file.read_bytes()[:5000])
    for file, message in [
        ("w.pth", "is a pickle, which can run code when it is opened"),
        ("cut.safetensors", "is not a readable safetensors file"),
        ("none.safetensors", "no checkpoint at"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            open_pipeline(ModelConfig(NAME, checkpoint=tmp_path / file))


def test_another_image_size(vit_file):
    pipeline = open_pipeline(ModelConfig(NAME, checkpoint=vit_file, image_size=192))
    assert pipeline.preprocess.size == (192, 192)
    assert pipeline.model.schedule().kept[0] == 144
    with torch.no_grad():
        assert pipeline.model(torch.zeros(1, 3, 192, 192)).shape == (1, CLASSES)
    with pytest.raises(ConfigError, match="image_size must be a multiple of the patches' 16 x 16 pixels, got 170"):
        open_pipeline(ModelConfig(NAME, checkpoint=vit_file, image_size=170))


def test_settings_are_checked_before_any_model_is_built():
    for life, message in [
        ({"budget": 60}, "did you mean 0.6"),
        ({"speed": 1}, "unknown settings"),
        ({"budget": 0.5, "kept": (1, 1)}, "budget and kept are alternatives"),
    ]:
        with pytest.raises(ConfigError, match=message):
            ModelConfig("no such model", life=life)


# ---- adapters


def test_an_adapter_names_its_backbone(adapter):
    pipeline = open_pipeline(ModelConfig(str(adapter)))
    assert pipeline.name == NAME
    assert (pipeline.model.settings.budget, pipeline.model.drops) == (0.7, (2, 4))
    assert pipeline.model.calibration.images == 8


def test_given_settings_replace_those_of_the_adapter(adapter):
    pipeline = open_pipeline(ModelConfig(str(adapter), life={"budget": 0.6, "mode": "adaptive"}))
    assert (pipeline.model.settings.budget, pipeline.model.settings.mode) == (0.6, "adaptive")
    assert pipeline.model.drops == (2, 4)
    assert pipeline.model.calibration.images == 8
    moved = open_pipeline(ModelConfig(str(adapter), life={"start": 1, "drops": (1,)}))
    assert moved.model.calibration is None  # scores of another block


def test_given_settings_keep_the_thresholds_of_every_image_size(tmp_path, vit_file):
    options = {"checkpoint": vit_file, "model_args": {"dynamic_img_size": True}}
    pipeline = open_pipeline(ModelConfig(NAME, **options))
    pipeline.model.calibrate([torch.randn(4, 3, side, side) for side in (160, 240)])
    saved = patchlife.save(pipeline.model, tmp_path / "sizes")
    opened = open_pipeline(ModelConfig(str(saved), life={"budget": 0.5})).model
    found = {key: calibration.images for key, calibration in opened.calibrations.items()}
    assert found == {(patches, start): 4 for start in opened.starts for patches in (100, 225)}


def test_an_adapters_backbone_has_moved(adapter, tmp_path):
    moved = tmp_path / "elsewhere.safetensors"
    (tmp_path / "backbone.safetensors").rename(moved)
    with pytest.raises(PatchLifeError, match=r"needs the weights of test_vit.*--checkpoint FILE"):
        open_pipeline(ModelConfig(str(adapter)))
    assert open_pipeline(ModelConfig(str(adapter), checkpoint=moved)).name == NAME


def test_an_adapters_backbone_is_another_file(adapter, tmp_path):
    other = checkpoint(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(CheckpointError, match=r"other.safetensors \(sha256 \w+\.\.\.\) is not the backbone that"):
        open_pipeline(ModelConfig(str(adapter), checkpoint=other))
    shutil.copy(other, tmp_path / "backbone.safetensors")
    with pytest.raises(CheckpointError, match=r"backbone.safetensors \(sha256 \w+\.\.\.\) is not the backbone that"):
        open_pipeline(ModelConfig(str(adapter)))


def test_an_adapter_without_the_name_of_its_file_checks_the_weights(vit_file, tmp_path):
    folder = patchlife.save(
        opening.wrap(opening.build(NAME, vit_file)[0]), tmp_path / "adapter"
    )  # no origin: wrapped in Python
    assert open_pipeline(ModelConfig(str(folder), checkpoint=vit_file)).name == NAME
    other = checkpoint(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(AdapterError, match=f"adapter was made for other weights of {NAME}"):
        open_pipeline(ModelConfig(str(folder), checkpoint=other))


@pytest.mark.parametrize("file", ["adapter.json", "adapter.safetensors", "SHA256SUMS"])
def test_an_adapter_with_a_flipped_byte(file, adapter):
    content = bytearray((adapter / file).read_bytes())
    content[len(content) // 2] ^= 1
    (adapter / file).write_bytes(content)
    with pytest.raises(AdapterError, match=r"is damaged|lacks|cover"):
        open_pipeline(ModelConfig(str(adapter)))


def test_a_folder_that_is_no_adapter(tmp_path):
    for folder in (tmp_path, f"{tmp_path}/none", "./none"):
        with pytest.raises(AdapterError, match=r"is not a patchlife adapter: it has no adapter\.json"):
            open_pipeline(ModelConfig(str(folder)))


def test_suggestions_for_a_name_that_is_no_adapter(tmp_path):
    with pytest.raises(AdapterError, match=r"it has no adapter\.json; .*give hf-hub:timm/vit_x\.y"):
        open_pipeline(ModelConfig("timm/vit_x.y"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AdapterError, match=f"give local-dir:{tmp_path}"):
        open_pipeline(ModelConfig(str(tmp_path)))


def test_a_folder_beside_a_timm_name_does_not_hide_it(adapter, vit_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()
    assert open_pipeline(ModelConfig(NAME, checkpoint=vit_file)).model.settings.budget == 0.6
    assert open_pipeline(ModelConfig("adapter")).model.settings.budget == 0.7


# ---- demo


def test_the_demo_model():
    pipeline = open_pipeline(ModelConfig("demo"))
    assert pipeline.name == "demo"
    assert pipeline.preprocess.size == (112, 112)
    assert len(pipeline.labels.names) == 10
    assert pipeline.model.schedule().kept[0] == 196


def test_the_demo_model_is_checked(tmp_path, monkeypatch):
    for name in ("model.json", "model.safetensors"):
        shutil.copy(demo_model.demo_folder() / name, tmp_path / name)
    monkeypatch.setattr(demo_model, "demo_folder", lambda: tmp_path)
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-100] ^= 4
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: its sha256 is not the one in model\.json; reinstall"):
        open_pipeline(ModelConfig("demo"))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is incomplete"):
        open_pipeline(ModelConfig("demo"))


def test_the_demo_model_accepts_no_other_weights(vit_file):
    with pytest.raises(ConfigError, match="demo has its own weights"):
        open_pipeline(ModelConfig("demo", checkpoint=vit_file))
    with pytest.raises(ConfigError, match=r"remove .* --model-args"):
        open_pipeline(ModelConfig("demo", model_args={"in_chans": 1}))


def test_an_adapter_of_the_demo_model_is_opened_by_its_folder(tmp_path):
    own = open_pipeline(ModelConfig("demo")).model
    folder = str(patchlife.save(own.set_budget(0.5), tmp_path / "adapter"))
    opened = open_pipeline(ModelConfig(folder)).model
    images = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(opened(images), own(images))
    assert open_pipeline(ModelConfig(folder, life={"budget": 0.7})).model.settings.budget == 0.7
    with pytest.raises(ConfigError, match="demo has its own weights"):
        open_pipeline(ModelConfig(folder, pretrained=True))


# ---- devices and labels


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="torch finds no cuda device, only cpu; choose --device auto"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")


def test_imagenet_names():
    labels = imagenet_labels()
    assert (labels.names[217], labels.ids[217]) == ("English springer", "n02102040")
    assert len(set(labels.names)) == 1000
    assert labels.names[134] == "crane (n02012849)"
    assert labels.classes_of([Path("in20/n02102040/x.jpg"), Path("tench/y.jpg")]) == [217, 0]


def test_own_names(tmp_path, vit_file):
    file = tmp_path / "names.txt"
    file.write_text("\n".join("abcdefghij") + "\n\n")
    assert open_pipeline(ModelConfig(NAME, checkpoint=vit_file, labels=file)).labels.names == tuple("abcdefghij")
    file.write_text("a\nb\n")
    with pytest.raises(ConfigError, match="has 2 class names, but the model has 10 classes"):
        open_pipeline(ModelConfig(NAME, checkpoint=vit_file, labels=file))
    file.write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ConfigError, match="expected a UTF-8 text file"):
        open_pipeline(ModelConfig(NAME, checkpoint=vit_file, labels=file))
