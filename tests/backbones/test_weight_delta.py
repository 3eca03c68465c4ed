"""Weight deltas: their size, exact merging, and merging into a copy."""

from __future__ import annotations

import pytest
import torch
from families import built, fresh, photos
from torch.nn.utils import prune
from ungated import add_low_rank, delta_between

from patchlife.backbones import adapt
from patchlife.backbones.weight_delta import apply_delta
from patchlife.errors import AdapterError


def test_a_new_low_rank_delta_has_no_effect() -> None:
    vit = fresh("vit")
    add_low_rank(vit.blocks[2:], rank=2)
    torch.testing.assert_close(vit(photos("vit")), built("vit")(photos("vit")))
    assert all(not name.endswith(".delta") for name in delta_between(adapt(vit), adapt(built("vit"))))


def test_a_merged_delta_gives_the_same_outputs() -> None:
    vit = fresh("vit")
    add_low_rank(vit.blocks[2:], rank=2)
    for name, parameter in vit.named_parameters():
        if name.endswith(".up") or name == "norm.bias":
            parameter.add_(0.1 * torch.randn_like(parameter))
    delta = delta_between(adapt(vit), adapt(built("vit")))
    assert {name for name in delta if name.endswith(".delta")} == {"norm.bias.delta"}
    assert all(value.dtype == torch.float16 for value in delta.values())
    before = {name: value.clone() for name, value in built("vit").state_dict().items()}
    result = apply_delta(built("vit"), delta)
    torch.testing.assert_close(result(photos("vit")), vit(photos("vit")), atol=2e-3, rtol=2e-3)
    assert dict(result.named_parameters()).keys() == dict(built("vit").named_parameters()).keys()
    assert all(torch.equal(before[name], value) for name, value in built("vit").state_dict().items())


def test_a_trained_weight_is_a_full_delta() -> None:
    vit = fresh("vit")
    vit.blocks[3].mlp.fc1.weight.add_(0.01)
    delta = delta_between(adapt(vit), adapt(built("vit")))
    assert list(delta) == ["blocks.3.mlp.fc1.weight.delta"]
    torch.testing.assert_close(
        apply_delta(built("vit"), delta)(photos("vit")), vit(photos("vit")), atol=1e-3, rtol=1e-3
    )


def test_a_delta_of_another_model_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"blocks\.99\.x"):
        apply_delta(built("vit"), {"blocks.99.x.delta": torch.zeros(1)})


def test_a_pruned_backbone_gets_a_delta_after_a_pass_with_gradients() -> None:
    """torch cannot copy a weight that pruning computed in such a pass."""
    vit, images = fresh("vit"), photos("vit")
    prune.identity(vit.blocks[0].mlp.fc1, "weight")
    with torch.enable_grad():
        expected = vit.requires_grad_()(images).detach()
    merged = apply_delta(vit, {"head.bias.delta": torch.ones_like(vit.head.bias)})
    torch.testing.assert_close(merged(images), expected + 1)
