"""Signatures differ if the weights or the architecture differ, except for rounding."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from families import FAMILIES, built, fresh
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

from patchlife.backbones import adapt, build, signature
from patchlife.backbones.comparison import changed_weights, differences
from patchlife.backbones.identity import fingerprints, weights_of
from patchlife.backbones.timm import pretrained_cfg


def found_differences(one: nn.Module, other: nn.Module) -> list[str]:
    """Differences of ``other`` from ``one``, of signatures that went through JSON. Checks that they are symmetric."""
    a, b = (json.loads(json.dumps(signature(adapt(vit)))) for vit in (one, other))
    assert bool(differences(a, b)) == bool(differences(b, a))
    return differences(a, b)


@torch.no_grad()
def noisy(vit: nn.Module, fraction: float, seed: int = 0) -> nn.Module:
    """Add noise to every parameter, of ``fraction`` of its standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in vit.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(fraction * parameter.std(correction=0).nan_to_num() * noise)
    return vit


def initialised(entry: str) -> Callable[[], nn.Module]:
    """A freshly initialised model: constants, zeros, LayerScale of 1e-5 or less."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(entry, depth=3, embed_dim=96, num_heads=3, img_size=64, num_classes=10).eval()

    return make


MODELS: dict[str, Callable[[], nn.Module]] = {name: lambda name=name: fresh(name) for name in FAMILIES}
MODELS |= {f"initialised {name}": initialised(name) for name in ("vit_tiny_patch16_224", "deit3_small_patch16_224")}
MODELS |= {f"initialised {name}": initialised(name) for name in ("vit_small_patch14_dinov2", "eva02_tiny_patch14_224")}


@pytest.mark.parametrize("name", MODELS)
def test_other_precisions_are_the_same_backbone(name: str) -> None:
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
        assert all(found_differences(one, other) == [] for other in casts)


@pytest.mark.parametrize("name", MODELS)
def test_one_percent_of_noise_is_another_backbone(name: str) -> None:
    make = MODELS[name]
    other = noisy(make(), 0.01)
    for cast in (other, noisy(make(), 0.01).bfloat16(), noisy(make(), 0.01).half(), noisy(make(), 0.01).double()):
        assert found_differences(make(), cast)
    assert found_differences(make(), noisy(make(), 0.003))
    assert found_differences(make(), noisy(make(), 0.003).half())
    assert found_differences(make(), noisy(make(), 0.0003))


@pytest.mark.shared
def test_real_weights(shared: Path) -> None:
    vit, _ = build("vit_tiny_patch16_224", shared / "weights" / "vit_tiny_patch16_224.safetensors")

    def copy_() -> nn.Module:
        return build("vit_tiny_patch16_224", shared / "weights" / "vit_tiny_patch16_224.safetensors")[0]

    for cast in (copy_().bfloat16(), copy_().half(), copy_().double()):
        assert found_differences(vit, cast) == []
    for other in (noisy(copy_(), 0.01), noisy(copy_(), 0.01).bfloat16(), noisy(copy_(), 0.003)):
        assert found_differences(vit, other)


def small_changes() -> dict[str, Callable[[nn.Module], object]]:
    """Functions that change one place of a model, by name."""

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
        "rows reversed": rows,
        "one weight of one token": lambda vit: vit.cls_token[0, 0, 5].add_(0.1),
    }


@pytest.mark.parametrize("what", small_changes())
@torch.no_grad()
def test_a_change_of_any_place_is_found(what: str) -> None:
    vit = fresh("vit")
    small_changes()[what](vit)
    assert found_differences(built("vit"), vit)


@torch.no_grad()
def test_a_change_outside_the_sample_is_found() -> None:
    one, other = (timm.create_model("vit_tiny_patch16_224", depth=2).eval() for _ in range(2))
    other.load_state_dict(one.state_dict())
    assert found_differences(one, other) == []
    other.blocks[1].mlp.fc1.weight[0, 1] += 1e-3  # the sample is every ninth of 147456 entries
    assert found_differences(one, other) == ["blocks.1.mlp.fc1.weight has other values"]


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_rounding_of_all_weights_does_not_hide_a_change_of_one(cast: torch.dtype) -> None:
    for what in ("a bias", "the classifier, scaled", "rows reversed", "a sign", "one weight of one token"):
        vit = fresh("vit")
        small_changes()[what](vit)
        assert found_differences(built("vit"), vit.to(cast))


@torch.no_grad()
def test_adding_and_subtracting_a_delta_leaves_the_same_backbone() -> None:
    vit = fresh("vit")
    for parameter in vit.parameters():
        other = torch.randn_like(parameter)
        parameter.add_(other).sub_(other)
    assert changed_weights(signature(adapt(built("vit"))), signature(adapt(vit)))  # in the last bits
    assert found_differences(built("vit"), vit) == []


@torch.no_grad()
def test_the_sign_of_zero_does_not_matter() -> None:
    one, other = fresh("vit"), fresh("vit")
    one.norm.bias.zero_()
    other.norm.bias.zero_().neg_()
    assert found_differences(one, other) == []


def test_differences_name_the_tensor_and_the_difference() -> None:
    assert found_differences(built("vit"), built("deit-distilled"))[0] == "prefix is 2, expected 1"
    other = fresh("vit")
    other.reset_classifier(7)
    assert found_differences(built("vit"), other) == [
        "head.weight is 7x48, expected 10x48",
        "head.bias is 7, expected 10",
    ]
    other.reset_classifier(0)
    assert found_differences(built("vit"), other) == ["head.weight is missing", "head.bias is missing"]
    other = fresh("vit")
    with torch.no_grad():
        other.blocks[3].mlp.fc1.weight.mul_(-1)
        other.norm.bias.add_(0.001)
    names = ["blocks.3.mlp.fc1.weight has other values", "norm.bias has other values"]
    assert found_differences(built("vit"), other) == names
    a, b = (signature(adapt(vit)) for vit in (built("vit"), other))
    assert differences(a, b, ignored=("norm.bias", "blocks.3.mlp.fc1.weight")) == []


def test_another_image_size_is_the_same_backbone() -> None:
    other = fresh("vit")
    other.set_input_size(img_size=(64, 64))
    assert found_differences(built("vit"), other) == []


def test_names_of_another_library_do_not_matter() -> None:
    expected = signature(adapt(built("vit")))
    for cast in (torch.float32, torch.bfloat16):
        renamed = signature(adapt(fresh("vit").to(cast)))
        renamed["weights"] = {f"encoder.{i}": values for i, values in enumerate(reversed(renamed["weights"].values()))}
        assert differences(expected, renamed) == []
    other = signature(adapt(noisy(fresh("vit"), 0.01)))
    other["weights"] = {f"encoder.{name}": values for name, values in other["weights"].items()}
    assert differences(expected, other)
    other["weights"].popitem()
    assert any("is missing" in part for part in differences(expected, other))


def test_a_signature_does_not_need_timms_pretrained_cfg() -> None:
    vit = fresh("vit")
    named = signature(adapt(vit))
    for cfg in (None, {}, {"input_size": (3, 48, 48)}):
        vit.pretrained_cfg = cfg
        assert pretrained_cfg(vit) == (cfg or {})
        unnamed = signature(adapt(vit))
        assert unnamed["name"] is None
        assert differences(named, unnamed) == []
    del vit.pretrained_cfg
    assert pretrained_cfg(vit) == {}
    assert differences(named, signature(adapt(vit))) == []


# ---- fingerprints


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_weights_are_the_values_that_the_model_computes_with() -> None:
    vit = fresh("vit")
    with torch.no_grad():
        vit.blocks[0].attn.qkv.weight.mul_(2)
    parametrize.register_parametrization(vit.blocks[0].attn.qkv, "weight", Half())
    prune.l1_unstructured(vit.blocks[1].mlp.fc1, "weight", 0.3)
    vit.blocks[2] = torch.compile(vit.blocks[2])
    weights = weights_of(adapt(vit))
    plain = dict(built("vit").state_dict())
    assert weights.keys() == plain.keys()
    assert torch.equal(weights["blocks.1.mlp.fc1.weight"], vit.blocks[1].mlp.fc1.weight)
    assert all(torch.equal(weights[name], plain[name]) for name in plain if name != "blocks.1.mlp.fc1.weight")


def test_tensors_without_readable_values_are_not_compared() -> None:
    class Special(Tensor):
        pass

    result = fingerprints(
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
    assert [name for name, value in result.items() if value is None] == list(result)[:6]
    json.dumps(result, allow_nan=False)
    complete = signature(adapt(built("vit")))
    partial = complete | {"weights": {**complete["weights"], "norm.bias": None, "packed": None}}
    partial["weights"].pop("norm.weight")
    assert differences(complete, partial) == differences(partial, complete) == []
    partial["weights"]["head.bias"] = ["10", "float32", 9.0, 9.0, "float32 9", "float32 9"]
    assert differences(complete, partial) == ["head.bias has other values"]


@torch.no_grad()
def test_changed_weights_are_exact_to_the_bit() -> None:
    vit = fresh("vit")
    before = signature(adapt(vit))
    assert changed_weights(before, signature(adapt(vit))) == []
    assert changed_weights(before, signature(adapt(vit.double()))) == []
    assert changed_weights(before, signature(adapt(vit.float().bfloat16()))) == []
    vit = fresh("vit").bfloat16()
    bits = vit.blocks[1].mlp.fc1.weight.view(torch.int16)
    bits[::20, 0] += 1  # one step each: less than the rounding of the cast
    assert "blocks.1.mlp.fc1.weight" in changed_weights(before, signature(adapt(vit)))
    vit = fresh("vit")
    vit.blocks[4].norm1.weight[3] *= 1 + 2**-22
    vit.head.bias[0] += 1e-6
    assert changed_weights(before, signature(adapt(vit))) == ["blocks.4.norm1.weight", "head.bias"]
    vit.norm.weight.neg_()
    both = changed_weights(before, signature(adapt(vit.bfloat16())))  # trained and cast: all weights count as changed
    assert {"norm.weight", "head.bias", "blocks.0.attn.qkv.weight"} <= set(both)
    vit = fresh("vit")
    vit.reset_classifier(0)
    assert changed_weights(before, signature(adapt(vit))) == ["head.weight", "head.bias"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gives_the_same_signature() -> None:
    for cast in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        vit = fresh("vit").to(cast)
        assert signature(adapt(vit)) == signature(adapt(copy.deepcopy(vit).cuda()))


class Results(TorchDispatchMode):
    """Counts operations and the entries of their results, of which views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        if isinstance(result, Tensor):
            inputs = {arg.data_ptr() for arg in args if isinstance(arg, Tensor)}
            self.entries += result.numel() * (result.data_ptr() not in inputs)
        return result


def test_the_cost_of_a_signature_is_a_few_operations_for_each_weight() -> None:
    backbone = adapt(timm.create_model("vit_tiny_patch16_224").eval())
    signature(backbone)  # fills the caches
    with Results() as results:
        signature(backbone)
    weights = backbone.model.state_dict().values()
    assert results.operations < 64 * len(weights)
    assert results.entries < 4 * sum(weight.numel() for weight in weights)
