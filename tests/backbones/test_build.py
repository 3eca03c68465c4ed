"""Weights from a file: the right ones load, all others are refused by name."""

import pickle

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from patchlife.backbones import build
from patchlife.errors import CheckpointError, ConfigError, UnsupportedModelError

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=5).state_dict()


@pytest.fixture
def checkpoint(weights, tmp_path):
    """Write a changed copy of the weights; returns its path."""

    def write(change=lambda w: w, name="vit.safetensors"):
        save_file(change(dict(weights)), tmp_path / name)
        return tmp_path / name

    return write


def test_the_weights_are_those_of_the_file(checkpoint, weights):
    vit, origin = build(NAME, checkpoint())
    assert all(torch.equal(v, weights[k]) for k, v in vit.state_dict().items())
    assert vit.num_classes == 5, "as many classes as the file's head"
    assert not vit.training
    assert origin.checkpoint.endswith("vit.safetensors")
    assert len(origin.sha256) == 64


def test_another_image_size_keeps_the_files_weights(checkpoint, weights):
    vit, origin = build(NAME, checkpoint(), image_size=96)
    assert vit(torch.zeros(1, 3, 96, 96)).shape == (1, 5)
    assert torch.equal(vit.blocks[0].attn.qkv.weight, weights["blocks.0.attn.qkv.weight"])
    again, _ = build(origin.model, origin.checkpoint, image_size=origin.options["img_size"])
    assert torch.equal(again.pos_embed, vit.pos_embed)


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
def test_weights_that_are_not_numbers(checkpoint, bad):
    with pytest.raises(CheckpointError, match=r"NaN or infinite weights in norm.weight"):
        build(NAME, checkpoint(lambda w: w | {"norm.weight": torch.full((192,), bad)}))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_pickles_are_refused_unopened(tmp_path, suffix):
    class Trap:
        def __reduce__(self):
            return exec, ("raise SystemExit('ran code from a checkpoint')",)

    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match=r"is a pickle, which can run code .* weights_only=True"):
        build(NAME, path)


def test_a_truncated_file(checkpoint):
    path = checkpoint()
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match=r"not a readable safetensors file .* is the download complete"):
        build(NAME, path)


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*gone.safetensors"):
        build(NAME, tmp_path / "gone.safetensors")


def test_an_unknown_name_suggests_others():
    with pytest.raises(UnsupportedModelError, match=r"no model named 'vit_tiny_patch16_22'; did you mean .*vit_tiny"):
        build("vit_tiny_patch16_22")


def test_two_sources_of_weights(checkpoint):
    with pytest.raises(ConfigError, match="not from both"):
        build(NAME, checkpoint(), pretrained=True)


@pytest.mark.shared
def test_the_real_weights_load(shared):
    path = shared / "weights" / "vit_tiny_patch16_224.safetensors"
    vit, origin = build(NAME, path)
    assert torch.equal(vit.head.weight, load_file(path)["head.weight"])
    assert origin.sha256 == "3f1f07da5e1337265ac1eb0234d13841467caf730b3c4240bd3f98c49bc16a92"
