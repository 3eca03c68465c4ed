"""Weights from a file load if they fit the model; otherwise the error names the keys that do not fit."""

import pickle
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from versions import needs_timm

from patchlife.backbones import Origin, build, rebuild, source_of
from patchlife.errors import CheckpointError, ConfigError, UnsupportedModelError

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=5).state_dict()


@pytest.fixture
def checkpoint(weights, tmp_path):
    """A function that writes an edited copy of the weights and returns its path."""

    def write(edit=lambda w: w, name="vit.safetensors"):
        save_file(edit(dict(weights)), tmp_path / name)
        return tmp_path / name

    return write


def test_the_weights_of_the_file_are_loaded(checkpoint, weights):
    vit, origin = build(NAME, checkpoint())
    assert all(torch.equal(v, weights[k]) for k, v in vit.state_dict().items())
    assert vit.num_classes == 5, "as many classes as the file's classifier"
    assert not vit.training
    assert origin.checkpoint.endswith("vit.safetensors")
    assert len(origin.sha256) == 64


def test_another_image_size_keeps_the_files_weights(checkpoint, weights):
    vit, origin = build(NAME, checkpoint(), image_size=96)
    assert vit(torch.zeros(1, 3, 96, 96)).shape == (1, 5)
    assert torch.equal(vit.blocks[0].attn.qkv.weight, weights["blocks.0.attn.qkv.weight"])
    rebuilt, _ = build(origin.model, origin.checkpoint, image_size=origin.options["img_size"])
    assert torch.equal(rebuilt.pos_embed, vit.pos_embed)


def test_missing_and_extra_keys_are_named(checkpoint):
    def rename(w):
        w["blocks.3.attention.weight"] = w.pop("blocks.3.attn.qkv.weight")
        return w

    expected = r"missing: blocks.3.attn.qkv.weight; not of this model: blocks.3.attention.weight"
    with pytest.raises(CheckpointError, match=expected):
        build(NAME, checkpoint(rename))


def test_other_shapes_are_named(checkpoint):
    with pytest.raises(CheckpointError, match=r"of another shape: norm.bias \(3,\) for \(192,\)"):
        build(NAME, checkpoint(lambda w: w | {"norm.bias": torch.zeros(3)}))


def test_many_problems_are_counted(checkpoint):
    with pytest.raises(CheckpointError, match=r"and \d+ more"):
        build(NAME, checkpoint(lambda w: {"norm.bias": w["norm.bias"]}))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinite_weights_are_refused(checkpoint, bad):
    with pytest.raises(CheckpointError, match=r"NaN or infinite weights in norm.weight"):
        build(NAME, checkpoint(lambda w: w | {"norm.weight": torch.full((192,), bad)}))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_pickles_are_refused_without_opening_them(tmp_path, suffix):
    class Trap:
        def __reduce__(self):
            return exec, ("raise SystemExit('ran code from a checkpoint')",)

    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match=r"is a pickle, which can run code .* weights_only=True"):
        build(NAME, path)


def test_a_truncated_file_is_refused(checkpoint):
    path = checkpoint()
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match=r"not a readable safetensors file .* is the download complete"):
        build(NAME, path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*gone.safetensors"):
        build(NAME, tmp_path / "gone.safetensors")


def test_an_unknown_name_suggests_others():
    with pytest.raises(UnsupportedModelError, match=r"no model named 'vit_tiny_patch16_22'; did you mean .*vit_tiny"):
        build("vit_tiny_patch16_22")


def test_an_unknown_tag_lists_the_known_ones(checkpoint):
    expected = (
        r"no weights tagged 'nonsense' for vit_tiny_patch16_224; tags are vit_tiny_patch16_224\.augreg_in21k, "
        r"vit_tiny_patch16_224\.augreg_in21k_ft_in1k$"
    )
    for arguments in ({}, {"pretrained": True}, {"checkpoint": checkpoint()}):
        with pytest.raises(UnsupportedModelError, match=expected):
            build(f"{NAME}.nonsense", **arguments)
    with pytest.raises(UnsupportedModelError, match="no weights tagged ''"):
        build(f"{NAME}.")
    assert build(f"{NAME}.augreg_in21k", checkpoint())[0].num_classes == 5


# ---- models of the hub and of folders


@pytest.fixture
def folder(tmp_path):
    """(a folder that timm saved for the hub, the model that was saved)."""
    torch.manual_seed(0)
    trained = timm.create_model(NAME, depth=2, num_classes=5, img_size=96).eval()
    trained.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "label_names": list("abcde")}
    timm.models.save_for_hf(
        trained, tmp_path / "local", model_args={"depth": 2, "img_size": 96}, safe_serialization=True
    )
    return tmp_path / "local", trained


def test_a_folder_saved_by_timm_is_loaded(folder, monkeypatch):
    needs_timm("1.0.31", "safetensors in a local folder")
    path, trained = folder
    monkeypatch.chdir(path.parent)
    for name in (f"local-dir:{path}", "local-dir:local", "LOCAL-DIR:local"):
        vit, origin = build(name)
        assert all(torch.equal(v, trained.state_dict()[k]) for k, v in vit.state_dict().items())
        assert origin == Origin(f"local-dir:{path}", pretrained=True)
    assert torch.equal(rebuild(origin).head.weight, trained.head.weight)


def test_a_folder_at_another_size_and_with_other_arguments(folder):
    needs_timm("1.0.31", "safetensors in a local folder")
    path, trained = folder
    vit, origin = build(f"local-dir:{path}", image_size=128, model_args={"drop_path_rate": 0.1})
    trained.set_input_size(img_size=(128, 128))
    assert torch.equal(vit.pos_embed, trained.pos_embed)
    assert origin.options == {"drop_path_rate": 0.1, "img_size": 128}
    assert torch.equal(rebuild(origin).pos_embed, trained.pos_embed)


def test_a_random_classifier_is_refused(folder):
    needs_timm("1.0.31", "safetensors in a local folder")
    with pytest.raises(ConfigError, match="num_classes=3 would put a random classifier on weights of 5 classes; leave"):
        build(f"local-dir:{folder[0]}", model_args={"num_classes": 3})
    assert build(f"local-dir:{folder[0]}", model_args={"num_classes": 0})[0].num_classes == 0
    assert build(f"local-dir:{folder[0]}", model_args={"num_classes": 5})[0].num_classes == 5


def test_a_checkpoint_replaces_the_weights_of_a_folder(folder, tmp_path):
    path, _ = folder
    torch.manual_seed(1)
    other = timm.create_model(NAME, depth=2, num_classes=3)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    vit, origin = build(f"local-dir:{path}", tmp_path / "other.safetensors")
    assert torch.equal(vit.head.weight, other.head.weight)
    assert vit.patch_embed.img_size == (224, 224)
    assert not origin.pretrained


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: shutil.rmtree(f), CheckpointError, r"got No such file or directory at .*config\.json; check"),
        (
            lambda f: (f / "config.json").unlink(),
            CheckpointError,
            r"expected a folder with config\.json as timm writes it, got No",
        ),
        (lambda f: (f / "config.json").write_text("{"), CheckpointError, "got other content at"),
        (lambda f: (f / "config.json").write_text("[]"), CheckpointError, "got other content at"),
        (lambda f: (f / "config.json").write_text("{}"), UnsupportedModelError, "names the architecture None, which"),
        (
            lambda f: (f / "config.json").write_text('{"architecture": "vit_tony"}'),
            UnsupportedModelError,
            "names the architecture 'vit_tony', which timm does not have",
        ),
        (lambda f: (f / "model.safetensors").unlink(), CheckpointError, r"no model\.safetensors; .* \(\.bin, \.pth\)"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            CheckpointError,
            r"no model\.safetensors; .* \(\.bin, \.pth\) are not opened",
        ),
    ],
)
def test_a_folder_with_missing_or_wrong_files_is_refused(folder, damage, error, message):
    damage(folder[0])
    with pytest.raises(error, match=message):
        build(f"local-dir:{folder[0]}")


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("hf-hub:timm/vit", "hf-hub"),
        ("hf_hub:timm/vit", "hf-hub"),
        ("HF-hub:timm/vit@main", "hf-hub"),
        ("local-dir:/a:b", "local-dir"),
        (NAME, ""),
        ("hf-hub", ""),
        ("./local-dir/x", ""),
        ("C:/models", ""),
    ],
)
def test_the_source_of_a_model_name(name, source):
    assert source_of(name) == source


def test_two_sources_of_weights_are_refused(checkpoint):
    with pytest.raises(ConfigError, match="not from both"):
        build(NAME, checkpoint(), pretrained=True)


@pytest.mark.shared
def test_the_real_weights_load(shared):
    path = shared / "weights" / "vit_tiny_patch16_224.safetensors"
    vit, origin = build(NAME, path)
    assert torch.equal(vit.head.weight, load_file(path)["head.weight"])
    assert origin.sha256 == "3f1f07da5e1337265ac1eb0234d13841467caf730b3c4240bd3f98c49bc16a92"
