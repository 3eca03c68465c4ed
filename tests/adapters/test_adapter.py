"""Adapters on disk: a loaded model equals the saved one; damaged files and other backbones are refused."""

import copy
import json
import os

import families
import pytest
import torch
from safetensors.torch import save_file

import patchlife
from patchlife.backbones import Origin
from patchlife.errors import AdapterError, ConfigError
from patchlife.io.files import sha256_of
from patchlife.io.folders import SUMS
from patchlife.slimming.regressor import LifeRegressor

FILES = ("adapter.json", "adapter.safetensors")


@pytest.fixture
def saved(tmp_path):
    """(calibrated model with an untrained life regressor, folder of its adapter)."""
    vit = families.built("vit")
    torch.manual_seed(0)
    model = patchlife.wrap(vit, patchlife.LifeConfig(budget=0.55), scorer=LifeRegressor(48, 1))
    model.calibrate([families.photos("vit", 8, seed=2)])
    return model, patchlife.save(model, tmp_path / "adapter")


def update_checksums(folder):
    """Write the checksums of the changed files."""
    (folder / SUMS).write_text("".join(f"{sha256_of(folder / name)}  {name}\n" for name in FILES))


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
@torch.no_grad()
def test_a_loaded_model_equals_the_saved_one(saved, mode):
    model, folder = saved
    images = families.photos("vit", 3)
    loaded = patchlife.load(folder, families.built("vit"))
    assert loaded.settings == model.full_settings()
    assert torch.equal(loaded.set_mode(mode)(images), model.set_mode(mode)(images))
    assert torch.equal(loaded.lives(images).life, model.lives(images).life)


def test_the_backbone_is_not_saved(saved):
    _, folder = saved
    weights = sum(p.numel() * 4 for p in families.built("vit").parameters())
    assert sum(f.stat().st_size for f in folder.iterdir()) < weights / 2


def test_saving_again_replaces_in_one_step(saved):
    model, folder = saved
    patchlife.save(model.set_budget(0.7), folder)
    assert patchlife.load(folder, families.built("vit")).settings.budget == 0.7
    assert sorted(p.name for p in folder.parent.iterdir()) == ["adapter"], "temporary files are left"


def test_a_failed_save_leaves_the_old_adapter(saved, monkeypatch):
    model, folder = saved
    before = {f.name: f.read_bytes() for f in folder.iterdir()}

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        patchlife.save(model, folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    assert sorted(p.name for p in folder.parent.iterdir()) == ["adapter"]


def test_a_folder_of_other_files_is_not_overwritten(saved, tmp_path):
    model, _ = saved
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("text")
    with pytest.raises(AdapterError, match=r"thesis .* not a patchlife adapter"):
        patchlife.save(model, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "text"
    assert [file.name for file in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_flipped_bit_is_refused(saved, name, place):
    _, folder = saved
    data = bytearray((folder / name).read_bytes())
    data[place] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(AdapterError, match=rf"{name} .*sha256"):
        patchlife.load(folder, families.built("vit"))


@pytest.mark.parametrize("name", [*FILES, SUMS])
def test_a_missing_file_is_named(saved, name):
    _, folder = saved
    (folder / name).unlink()
    with pytest.raises(AdapterError, match=name):
        patchlife.load(folder, families.built("vit"))


def test_an_adapter_of_another_architecture_is_refused_by_name(saved):
    _, folder = saved
    with pytest.raises(AdapterError, match=r"vit_tiny_patch16_224 .*deit_.*distilled.*prefix"):
        patchlife.load(folder, families.built("deit-distilled"))


def with_noise(vit, part, names=""):
    """A copy with noise on parameters whose names begin with ``names``; ``part`` is the fraction of their spread."""
    vit, generator = copy.deepcopy(vit), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name.startswith(names):
                parameter.add_(part * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return vit


@pytest.mark.parametrize("names", ["", "blocks.3.", "head.weight", "norm.bias", "cls_token"])
@pytest.mark.parametrize("part", [1.0, 0.01, 0.003])
def test_an_adapter_for_other_weights_is_refused(saved, part, names):
    _, folder = saved
    with pytest.raises(AdapterError, match=r"other weights of vit_tiny_patch16_224: "):
        patchlife.load(folder, with_noise(families.built("vit"), part, names))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_backbone_in_another_precision_is_accepted(saved, dtype):
    _, folder = saved
    assert patchlife.load(folder, families.fresh("vit").to(dtype)).scorer.norm.weight.dtype == torch.float32
    with pytest.raises(AdapterError, match="other weights"):
        patchlife.load(folder, with_noise(families.built("vit"), 0.01).to(dtype))


def test_a_newer_format_is_refused_with_the_command_to_upgrade(saved):
    _, folder = saved
    manifest = json.loads((folder / "adapter.json").read_text()) | {"format": 99, "patchlife": "9.0"}
    (folder / "adapter.json").write_text(json.dumps(manifest))
    update_checksums(folder)
    with pytest.raises(AdapterError, match=r"patchlife 9\.0 in format 99; .* pip install -U patchlife"):
        patchlife.load(folder, families.built("vit"))


@pytest.mark.parametrize(
    ("number", "advice"), [(1, "format 5: fit it again"), (2, r"format 5: .*recipes/convert_adapter\.py")]
)
def test_an_older_format_is_refused_with_advice(saved, number, advice):
    _, folder = saved
    manifest = json.loads((folder / "adapter.json").read_text()) | {"format": number}
    (folder / "adapter.json").write_text(json.dumps(manifest))
    update_checksums(folder)
    with pytest.raises(AdapterError, match=rf"format {number}; .* {advice}"):
        patchlife.load(folder, families.built("vit"))


def test_without_a_model_the_origin_of_the_backbone_must_be_known(saved, tmp_path):
    model, folder = saved
    with pytest.raises(AdapterError, match=r"pass the model: load\(folder, vit\)"):
        patchlife.load(folder)
    model.origin = Origin("vit_tiny_patch16_224", checkpoint=str(tmp_path / "gone.safetensors"))
    patchlife.save(model, folder)
    with pytest.raises(AdapterError, match=r"vit_tiny_patch16_224 from .*gone\.safetensors"):
        patchlife.load(folder)


def test_a_folder_that_is_not_an_adapter_is_refused(tmp_path):
    with pytest.raises(AdapterError, match=r"not a patchlife adapter: .* adapter\.json"):
        patchlife.load(tmp_path)


def test_the_origin_rebuilds_the_same_backbone(tmp_path):
    import timm

    from patchlife.backbones import build

    torch.manual_seed(1)
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=7).state_dict(), tmp_path / "vit.safetensors")
    vit, origin = build("vit_tiny_patch16_224", tmp_path / "vit.safetensors")
    model = patchlife.wrap(vit)
    model.origin = origin
    patchlife.save(model, tmp_path / "adapter")
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(patchlife.load(tmp_path / "adapter")(images), model(images))
        assert model(images).shape == (1, 7)
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=7).state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(AdapterError, match=r"vit\.safetensors .*adapter .*\(sha256"):
        patchlife.load(tmp_path / "adapter")
    model.origin = Origin("vit_tiny_patch16_224", {"num_classes": 7})
    patchlife.save(model, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"vit_tiny_patch16_224 .*pass the model: load\(folder, vit\)"):
        patchlife.load(tmp_path / "adapter")


def test_a_loaded_scorer_is_frozen(saved):
    _, folder = saved
    vit = families.fresh("vit").train()
    model = patchlife.load(folder, vit)
    assert not any(p.requires_grad for p in model.scorer.parameters())
    assert not any(module.training for module in model.scorer.modules())
    assert vit.training
    assert all(p.requires_grad for p in vit.parameters())
    model.scorer.requires_grad_(True)
    assert all(p.requires_grad for p in model.scorer.parameters())


@pytest.mark.parametrize("pretrained_cfg", [None, {}, {"input_size": (3, 48, 48)}, "no attribute"])
def test_a_backbone_without_a_name(tmp_path, pretrained_cfg):
    """Such as one that was built from its class, not by timm.create_model."""
    vit = families.fresh("vit")
    vit.pretrained_cfg = pretrained_cfg
    if pretrained_cfg == "no attribute":
        del vit.pretrained_cfg
    model = patchlife.wrap(vit, patchlife.LifeConfig(budget=0.6)).calibrate([families.photos("vit", 8)])
    patchlife.save(model, tmp_path / "adapter")
    images = families.photos("vit", 2)
    with torch.no_grad():
        assert torch.equal(patchlife.load(tmp_path / "adapter", vit)(images), model(images))
        assert torch.equal(patchlife.load(tmp_path / "adapter", families.built("vit"))(images), model(images))
    with pytest.raises(AdapterError, match=r"VisionTransformer, 1 prefix .*deit_tiny_distilled"):
        patchlife.load(tmp_path / "adapter", families.built("deit-distilled"))


def test_an_explicit_schedule_is_saved(tmp_path):
    config = patchlife.LifeConfig(kept=(36, 36, 30, 20, 5), start=2)
    model = patchlife.wrap(families.built("vit"), config)
    with model.temporarily(budget=0.7, mode="adaptive"):
        assert model.settings.kept is None
    assert model.settings is config
    with pytest.raises(KeyError), model.temporarily(budget=0.8):
        raise KeyError
    assert model.settings is config
    with pytest.raises(ConfigError), model.temporarily(budget=0.001):
        raise AssertionError("a budget out of reach was accepted")
    assert model.settings is config
    patchlife.save(model, tmp_path / "adapter")
    loaded = patchlife.load(tmp_path / "adapter", families.built("vit"))
    assert loaded.schedule().kept == (36, 36, 30, 20, 5)
