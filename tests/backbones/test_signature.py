"""What tells two backbones apart: rounding does not, everything else does."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from families import FAMILIES, built, fresh
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from patchlife.backbones import adapt, build, pretrained_cfg, signature
from patchlife.backbones.identity import changed, differences, fingerprints, weights_of


def told(one: nn.Module, other: nn.Module) -> list[str]:
    """What tells ``other`` from ``one``, after a trip through JSON, as in an adapter; the same from both sides."""
    a, b = (json.loads(json.dumps(signature(adapt(vit)))) for vit in (one, other))
    assert bool(differences(a, b)) == bool(differences(b, a))
    return differences(a, b)


@torch.no_grad()
def noisy(vit: nn.Module, part: float, seed: int = 0) -> nn.Module:
    """Change every parameter by ``part`` of its own spread."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in vit.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(part * parameter.std(correction=0).nan_to_num() * noise)
    return vit


def raw(entry: str) -> Callable[[], nn.Module]:
    """A model as timm makes it: constants, zeros, LayerScale of 1e-5 or less."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(entry, depth=3, embed_dim=96, num_heads=3, img_size=64, num_classes=10).eval()

    return make


MODELS: dict[str, Callable[[], nn.Module]] = {name: lambda name=name: fresh(name) for name in FAMILIES}
MODELS |= {f"raw {name}": raw(name) for name in ("vit_tiny_patch16_224", "deit3_small_patch16_224")}
MODELS |= {f"raw {name}": raw(name) for name in ("vit_small_patch14_dinov2", "eva02_tiny_patch14_224")}


@pytest.mark.parametrize("name", MODELS)
def test_precision_and_a_copy_are_the_same_backbone(name: str) -> None:
    make = MODELS[name]
    casts = [
        make(),
        make().double(),
        make().half(),
        make().bfloat16(),
        make().bfloat16().float(),
        make().half().float(),
    ]
    for one in casts:
        assert all(told(one, other) == [] for other in casts)


@pytest.mark.parametrize("name", MODELS)
def test_one_percent_of_noise_is_another_backbone(name: str) -> None:
    make = MODELS[name]
    other = noisy(make(), 0.01)
    for cast in (other, noisy(make(), 0.01).bfloat16(), noisy(make(), 0.01).half(), noisy(make(), 0.01).double()):
        assert told(make(), cast)
    assert told(make(), noisy(make(), 0.003))
    assert told(make(), noisy(make(), 0.003).half())
    assert told(make(), noisy(make(), 0.0003))


@pytest.mark.shared
def test_real_weights(shared: Path) -> None:
    vit, _ = build("vit_tiny_patch16_224", shared / "weights" / "vit_tiny_patch16_224.safetensors")

    def copy_() -> nn.Module:
        return build("vit_tiny_patch16_224", shared / "weights" / "vit_tiny_patch16_224.safetensors")[0]

    for cast in (copy_().bfloat16(), copy_().half(), copy_().double()):
        assert told(vit, cast) == []
    for other in (noisy(copy_(), 0.01), noisy(copy_(), 0.01).bfloat16(), noisy(copy_(), 0.003)):
        assert told(vit, other)


def small_changes() -> dict[str, Callable[[nn.Module], object]]:
    """Changes of one place, by what they are."""

    def swap(vit: nn.Module) -> None:
        vit.blocks[1], vit.blocks[2] = vit.blocks[2], vit.blocks[1]

    def rows(vit: nn.Module) -> None:
        weight = vit.blocks[2].mlp.fc1.weight
        weight.copy_(weight.flip(0))

    return {
        "one entry": lambda vit: vit.blocks[2].attn.qkv.weight[7, 11].add_(0.5),
        "one row of the classifier": lambda vit: vit.head.weight[3].mul_(1.02),
        "a bias": lambda vit: vit.blocks[0].mlp.fc2.bias.add_(0.01),
        "the classifier, scaled": lambda vit: vit.head.weight.mul_(1.01),
        "a sign": lambda vit: vit.norm.weight.neg_(),
        "a constant": lambda vit: vit.norm.weight.fill_(1.0),
        "zeros": lambda vit: vit.cls_token.zero_(),
        "blocks swapped": swap,
        "rows turned over": rows,
        "one weight of one token": lambda vit: vit.cls_token[0, 0, 5].add_(0.1),
    }


@pytest.mark.parametrize("what", small_changes())
@torch.no_grad()
def test_any_place_counts(what: str) -> None:
    vit = fresh("vit")
    small_changes()[what](vit)
    assert told(built("vit"), vit)


@torch.no_grad()
def test_entries_between_those_that_are_looked_at_count() -> None:
    one, other = (timm.create_model("vit_tiny_patch16_224", depth=2).eval() for _ in range(2))
    other.load_state_dict(one.state_dict())
    assert told(one, other) == []
    other.blocks[1].mlp.fc1.weight[0, 1] += 1e-3  # of 147456 entries every ninth is looked at
    assert told(one, other) == ["blocks.1.mlp.fc1.weight has other values"]


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_rounding_of_all_does_not_hide_a_change_of_some(cast: torch.dtype) -> None:
    for what in ("a bias", "the classifier, scaled", "rows turned over", "a sign", "one weight of one token"):
        vit = fresh("vit")
        small_changes()[what](vit)
        assert told(built("vit"), vit.to(cast))


@torch.no_grad()
def test_an_adapter_merged_and_taken_out_again_leaves_the_same_backbone() -> None:
    vit = fresh("vit")
    for parameter in vit.parameters():
        other = torch.randn_like(parameter)
        parameter.add_(other).sub_(other)
    assert changed(signature(adapt(built("vit"))), signature(adapt(vit)))  # by a few last bits
    assert told(built("vit"), vit) == []


@torch.no_grad()
def test_equal_numbers_are_equal_whatever_their_sign_of_zero() -> None:
    one, other = fresh("vit"), fresh("vit")
    one.norm.bias.zero_()
    other.norm.bias.zero_().neg_()
    assert told(one, other) == []


def test_the_differences_name_what_differs() -> None:
    assert told(built("vit"), built("deit-distilled"))[0] == "prefix is 2, expected 1"
    other = fresh("vit")
    other.reset_classifier(7)
    assert told(built("vit"), other) == ["head.weight is 7x48, expected 10x48", "head.bias is 7, expected 10"]
    other.reset_classifier(0)
    assert told(built("vit"), other) == ["head.weight is missing", "head.bias is missing"]
    other = fresh("vit")
    with torch.no_grad():
        other.blocks[3].mlp.fc1.weight.mul_(-1)
        other.norm.bias.add_(0.001)
    names = ["blocks.3.mlp.fc1.weight has other values", "norm.bias has other values"]
    assert told(built("vit"), other) == names
    a, b = (signature(adapt(vit)) for vit in (built("vit"), other))
    assert differences(a, b, ignored=("norm.bias", "blocks.3.mlp.fc1.weight")) == []


def test_another_image_size_is_the_same_backbone() -> None:
    other = fresh("vit")
    other.set_input_size(img_size=(64, 64))
    assert told(built("vit"), other) == []


def test_names_do_not_count_where_another_library_has_its_own() -> None:
    mine = signature(adapt(built("vit")))
    for cast in (torch.float32, torch.bfloat16):
        theirs = signature(adapt(fresh("vit").to(cast)))
        theirs["weights"] = {f"encoder.{i}": found for i, found in enumerate(reversed(theirs["weights"].values()))}
        assert differences(mine, theirs) == []
    other = signature(adapt(noisy(fresh("vit"), 0.01)))
    other["weights"] = {f"encoder.{name}": found for name, found in other["weights"].items()}
    assert differences(mine, other)
    other["weights"].popitem()
    assert any("is missing" in part for part in differences(mine, other))


def test_it_knows_its_backbone_without_timms_card() -> None:
    vit = fresh("vit")
    named = signature(adapt(vit))
    for card in (None, {}, {"input_size": (3, 48, 48)}):
        vit.pretrained_cfg = card
        assert pretrained_cfg(vit) == (card or {})
        found = signature(adapt(vit))
        assert found["name"] is None
        assert differences(named, found) == []
    del vit.pretrained_cfg
    assert pretrained_cfg(vit) == {}
    assert differences(named, signature(adapt(vit))) == []


# ---- what is looked at


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_weights_are_what_is_computed_with() -> None:
    vit = fresh("vit")
    with torch.no_grad():
        vit.blocks[0].attn.qkv.weight.mul_(2)
    parametrize.register_parametrization(vit.blocks[0].attn.qkv, "weight", Half())
    prune.l1_unstructured(vit.blocks[1].mlp.fc1, "weight", 0.3)
    vit.blocks[2] = torch.compile(vit.blocks[2])
    weights = weights_of(vit)
    plain = dict(built("vit").state_dict())
    assert weights.keys() == plain.keys()
    assert torch.equal(weights["blocks.1.mlp.fc1.weight"], vit.blocks[1].mlp.fc1.weight)
    assert all(torch.equal(weights[name], plain[name]) for name in plain if name != "blocks.1.mlp.fc1.weight")


def test_what_has_no_values_is_passed_over() -> None:
    class Special(Tensor):
        pass

    found = fingerprints(
        {
            "meta": torch.zeros(3, device="meta"),
            "special": torch.ones(3).as_subclass(Special),
            "eight bits": torch.ones(3).to(torch.float8_e4m3fn),
            "packed": ("no", "tensor"),
            "complex": torch.ones(3, dtype=torch.complex64),
            "sparse": torch.eye(3).to_sparse(),
            "plain": torch.ones(3),
            "whole numbers": torch.arange(5),
            "one": torch.tensor(2.0),
            "none": torch.zeros(0),
            "nan": torch.tensor([torch.nan]),
        }
    )
    assert [name for name, value in found.items() if value is None] == list(found)[:6]
    json.dumps(found, allow_nan=False)
    whole = signature(adapt(built("vit")))
    gone = whole | {"weights": {**whole["weights"], "norm.bias": None, "packed": None}}
    gone["weights"].pop("norm.weight")
    assert differences(whole, gone) == differences(gone, whole) == []
    gone["weights"]["head.bias"] = ["10", "float32", 9.0, 9.0, "float32 9", "float32 9"]
    assert differences(whole, gone) == ["head.bias has other values"]


@torch.no_grad()
def test_what_changed_is_told_to_the_bit() -> None:
    vit = fresh("vit")
    before = signature(adapt(vit))
    assert changed(before, signature(adapt(vit))) == []
    assert changed(before, signature(adapt(vit.double()))) == []
    assert changed(before, signature(adapt(vit.float().bfloat16()))) == []
    vit = fresh("vit").bfloat16()
    bits = vit.blocks[1].mlp.fc1.weight.view(torch.int16)
    bits[::20, 0] += 1  # one step each: less than rounding made of it
    assert "blocks.1.mlp.fc1.weight" in changed(before, signature(adapt(vit)))
    vit = fresh("vit")
    vit.blocks[4].norm1.weight[3] *= 1 + 2**-22
    vit.head.bias[0] += 1e-6
    assert changed(before, signature(adapt(vit))) == ["blocks.4.norm1.weight", "head.bias"]
    vit.norm.weight.neg_()
    both = changed(before, signature(adapt(vit.bfloat16())))  # trained and cast: nothing is what it was
    assert {"norm.weight", "head.bias", "blocks.0.attn.qkv.weight"} <= set(both)
    vit = fresh("vit")
    vit.reset_classifier(0)
    assert changed(before, signature(adapt(vit))) == ["head.weight", "head.bias"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_says_the_same() -> None:
    for cast in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        vit = fresh("vit").to(cast)
        assert signature(adapt(vit)) == signature(adapt(copy.deepcopy(vit).cuda()))


def test_it_takes_no_time() -> None:
    backbone = adapt(timm.create_model("vit_tiny_patch16_224").eval())
    seconds = []
    for _ in range(5):
        begin = time.process_time()
        signature(backbone)
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.05
