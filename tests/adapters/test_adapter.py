"""Adapters on disk: what comes back is what was saved, and nothing damaged or foreign is loaded."""

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
from patchlife.io.files import SUMS, sha256_of
from patchlife.slimming.regressor import LifeRegressor

FILES = ("adapter.json", "adapter.safetensors")


@pytest.fixture
def saved(tmp_path):
    """A calibrated model with a learned head, and the folder of its adapter."""
    vit = families.built("vit")
    torch.manual_seed(0)
    model = patchlife.wrap(vit, patchlife.LifeConfig(budget=0.55), scorer=LifeRegressor(48, 1))
    model.calibrate([families.photos("vit", 8, seed=2)])
    return model, patchlife.save(model, tmp_path / "adapter")


def seal(folder):
    """Write the checksums anew, as somebody who meant to change the folder would."""
    (folder / SUMS).write_text("".join(f"{sha256_of(folder / name)}  {name}\n" for name in FILES))


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
@torch.no_grad()
def test_what_comes_back_is_what_was_saved(saved, mode):
    model, folder = saved
    images = families.photos("vit", 3)
    again = patchlife.load(folder, families.built("vit"))
    assert again.config == model.config.replace(start=model.start, drops=model.drops)
    assert torch.equal(again.set_mode(mode)(images), model.set_mode(mode)(images))
    assert torch.equal(again.lives(images).life, model.lives(images).life)


def test_the_backbone_is_not_saved(saved):
    _, folder = saved
    weights = sum(p.numel() * 4 for p in families.built("vit").parameters())
    assert sum(f.stat().st_size for f in folder.iterdir()) < weights / 2


def test_saving_again_replaces_in_one_step(saved):
    model, folder = saved
    patchlife.save(model.set_budget(0.7), folder)
    assert patchlife.load(folder, families.built("vit")).config.budget == 0.7
    assert sorted(p.name for p in folder.parent.iterdir()) == ["adapter"], "no leftovers beside it"


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


def test_other_folders_are_left_alone(saved, tmp_path):
    model, _ = saved
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(AdapterError, match="is not a patchlife adapter; nothing was written"):
        patchlife.save(model, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_flipped_bit_is_noticed(saved, name, place):
    _, folder = saved
    data = bytearray((folder / name).read_bytes())
    data[place] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(AdapterError, match=rf"{name} is damaged: its sha256"):
        patchlife.load(folder, families.built("vit"))


@pytest.mark.parametrize("name", [*FILES, SUMS])
def test_a_missing_file_is_named(saved, name):
    _, folder = saved
    (folder / name).unlink()
    with pytest.raises(AdapterError, match=name):
        patchlife.load(folder, families.built("vit"))


def test_an_adapter_for_another_architecture_says_which(saved):
    _, folder = saved
    with pytest.raises(AdapterError, match=r"is for vit_tiny_patch16_224 .* this backbone is deit_.*distilled.*prefix"):
        patchlife.load(folder, families.built("deit-distilled"))


def noisy(vit, part, names=""):
    """A copy with every parameter whose name begins so moved by ``part`` of its own spread."""
    vit, generator = copy.deepcopy(vit), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name.startswith(names):
                parameter.add_(part * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return vit


@pytest.mark.parametrize("names", ["", "blocks.3.", "head.weight", "norm.bias", "cls_token"])
@pytest.mark.parametrize("part", [1.0, 0.01, 0.003])
def test_an_adapter_for_other_weights_says_so(saved, part, names):
    _, folder = saved
    with pytest.raises(AdapterError, match=r"was made for other weights of vit_tiny_patch16_224: .*has other values"):
        patchlife.load(folder, noisy(families.built("vit"), part, names))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precision_is_the_same_backbone(saved, dtype):
    _, folder = saved
    assert patchlife.load(folder, families.fresh("vit").to(dtype)).scorer.norm.weight.dtype == torch.float32
    with pytest.raises(AdapterError, match="was made for other weights"):
        patchlife.load(folder, noisy(families.built("vit"), 0.01).to(dtype))


def test_a_newer_format_asks_for_an_upgrade(saved):
    _, folder = saved
    about = json.loads((folder / "adapter.json").read_text()) | {"format": 99, "patchlife": "9.0"}
    (folder / "adapter.json").write_text(json.dumps(about))
    seal(folder)
    with pytest.raises(AdapterError, match=r"written by patchlife 9.0 in format 99; .* pip install -U patchlife"):
        patchlife.load(folder, families.built("vit"))


def test_an_older_format_says_how_to_go_on(saved):
    _, folder = saved
    about = json.loads((folder / "adapter.json").read_text()) | {"format": 1}
    (folder / "adapter.json").write_text(json.dumps(about))
    seal(folder)
    with pytest.raises(
        AdapterError, match=r"is in format 1; .* reads format 3: convert it with recipes/convert_adapter\.py"
    ):
        patchlife.load(folder, families.built("vit"))


def test_without_a_model_the_backbone_is_built_again_or_asked_for(saved, tmp_path):
    model, folder = saved
    with pytest.raises(AdapterError, match=r"does not know where its backbone comes from; pass the model"):
        patchlife.load(folder)
    model.origin = Origin("vit_tiny_patch16_224", checkpoint=str(tmp_path / "gone.safetensors"))
    patchlife.save(model, folder)
    with pytest.raises(AdapterError, match=r"needs the backbone vit_tiny_patch16_224 from .*gone.safetensors"):
        patchlife.load(folder)


def test_a_folder_that_is_no_adapter(tmp_path):
    with pytest.raises(AdapterError, match=r"is not a patchlife adapter: it has no adapter.json"):
        patchlife.load(tmp_path)


def test_origin_rebuilds_the_same_model(tmp_path):
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
    with pytest.raises(AdapterError, match=r"vit\.safetensors is not the file that .*adapter was made for \(sha256"):
        patchlife.load(tmp_path / "adapter")
    model.origin = Origin("vit_tiny_patch16_224", {"num_classes": 7})
    patchlife.save(model, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="does not say where its weights are; pass the model"):
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


@pytest.mark.parametrize("card", [None, {}, {"input_size": (3, 48, 48)}, "none at all"])
def test_a_model_that_was_built_from_its_class(tmp_path, card):
    vit = families.fresh("vit")
    vit.pretrained_cfg = card
    if card == "none at all":
        del vit.pretrained_cfg
    model = patchlife.wrap(vit, patchlife.LifeConfig(budget=0.6)).calibrate([families.photos("vit", 8)])
    patchlife.save(model, tmp_path / "adapter")
    images = families.photos("vit", 2)
    with torch.no_grad():
        assert torch.equal(patchlife.load(tmp_path / "adapter", vit)(images), model(images))
        assert torch.equal(patchlife.load(tmp_path / "adapter", families.built("vit"))(images), model(images))
    with pytest.raises(
        AdapterError, match=r"is for VisionTransformer, 1 prefix .* this backbone is deit_tiny_distilled"
    ):
        patchlife.load(tmp_path / "adapter", families.built("deit-distilled"))


def test_a_schedule_is_kept(tmp_path):
    config = patchlife.LifeConfig(kept=(36, 36, 30, 20, 5), start=2)
    model = patchlife.wrap(families.built("vit"), config)
    with model.temporarily(budget=0.7, mode="adaptive"):
        assert model.config.kept is None
    assert model.config is config
    with pytest.raises(KeyError), model.temporarily(budget=0.8):
        raise KeyError
    assert model.config is config
    with pytest.raises(ConfigError), model.temporarily(budget=0.001):
        raise AssertionError("a budget out of reach")
    assert model.config is config
    patchlife.save(model, tmp_path / "adapter")
    loaded = patchlife.load(tmp_path / "adapter", families.built("vit"))
    assert loaded.schedule().kept == (36, 36, 30, 20, 5)
