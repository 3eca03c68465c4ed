"""What users attach to open_clip's blocks takes effect in every block, or is refused by name."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from open_clip_models import assert_close, built, far_apart, fresh, outputs_of, photos, slim, slow
from torch import nn
from torch.nn.utils import parametrizations, prune
from ungated import add_low_rank, delta_between

from patchlife.backbones import adapt
from patchlife.backbones.gated_training import GatedLowRank
from patchlife.backbones.weight_delta import apply_delta
from patchlife.errors import UnsupportedModelError

CONTAINERS = ("", "transformer", "transformer.resblocks")


def counted(vit: nn.Module, skip: tuple[str, ...]) -> Counter:
    """How often each module of ``vit`` is called from now on, by name."""
    calls: Counter = Counter()
    for name, module in vit.named_modules():
        if name not in skip:
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


@pytest.mark.parametrize("variant", ["fixed", "fixed, merge"])
@pytest.mark.parametrize("name", ["plain", "attentional pool", "custom, scales"])
def test_every_hook_fires_as_often_as_in_the_model(name: str, variant: str) -> None:
    vit, images = fresh(name), photos(name)
    calls = counted(vit, CONTAINERS)
    vit(images)
    dense = Counter(calls)
    calls.clear()
    model = slim(name, variant, vit)
    assert not calls
    for run in (model, model.output, lambda images: model.forward_intermediates(images, [1])):
        calls.clear()
        run(images)
        assert calls == dense


@pytest.mark.parametrize("name", ["plain", "custom, scales"])
def test_hooks_inside_blocks_fire_in_adaptive_mode(name: str) -> None:
    vit, images = fresh(name), photos(name)
    attentions = [n for n, m in vit.named_modules() if list(m.children())]
    calls = counted(vit, (*CONTAINERS, *attentions))
    vit(images)
    dense = Counter(calls)
    model = slim(name, "adaptive, merge", vit)
    calls.clear()
    model(images)
    assert {n: c for n, c in calls.items() if "attn_drop" not in n} == {
        n: c for n, c in dense.items() if "attn_drop" not in n
    }


@pytest.mark.parametrize("module", ["transformer.resblocks.3", "transformer.resblocks.3.attn"])
def test_adaptive_mode_refuses_hooks_on_modules_that_it_does_not_call(module: str) -> None:
    vit = fresh("plain")
    vit.get_submodule(module).register_forward_hook(lambda *_: None)
    slim("plain", "fixed, merge", vit)(photos("plain"))
    with pytest.raises(UnsupportedModelError, match=rf"forward hook on {module} .*fixed mode"):
        slim("plain", "adaptive", vit)


@pytest.mark.parametrize("module", CONTAINERS)
def test_hooks_that_could_never_fire_are_refused(module: str) -> None:
    vit = fresh("plain")
    model = slim("plain", vit=vit)
    vit.get_submodule(module).register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match=r"forward hook on .* no effect"):
        model(photos("plain"))


def test_a_hook_that_replaces_a_blocks_output_takes_effect() -> None:
    vit, images = fresh("plain"), photos("plain")
    vit.transformer.resblocks[-1].register_forward_hook(lambda module, args, out: out * 0)
    output = slim("plain", "fixed, merge", vit)(images)
    assert_close(output, output[:1].expand_as(output))


# ---- weights that are computed


def pruned(vit: Any) -> None:
    for block in vit.transformer.resblocks:
        prune.l1_unstructured(block.mlp.c_fc, "weight", 0.4)
        prune.l1_unstructured(block.attn.out_proj, "weight", 0.4)


def pruned_projections(vit: Any) -> None:
    for block in vit.transformer.resblocks:
        prune.l1_unstructured(block.attn, "in_proj_weight", 0.4)


def weight_normed(vit: Any) -> None:
    for block in vit.transformer.resblocks:
        for layer, name in ((block.mlp.c_fc, "weight"), (block.attn, "in_proj_weight")):
            parametrizations.weight_norm(layer, name)
            getattr(layer.parametrizations, name).original0.data *= 1.1


def low_rank(vit: Any) -> None:
    add_low_rank(vit.transformer.resblocks, rank=2)
    for name, parameter in vit.named_parameters():
        if name.endswith(".up"):
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("variant", ["fixed", "fixed, merge", "adaptive, merge"])
@pytest.mark.parametrize("attach", [pruned, pruned_projections, weight_normed, low_rank])
def test_computed_weights_take_effect(attach: Any, variant: str) -> None:
    vit, images = fresh("plain"), photos("plain")
    attach(vit)
    if attach is pruned_projections and "adaptive" in variant:  # pruning is a hook of the attention module
        with pytest.raises(UnsupportedModelError, match=r"forward pre-hook on transformer\.resblocks\.0\.attn"):
            slim("plain", variant, vit)
        return
    model = slim("plain", variant, vit)
    assert model.schedule() == slim("plain", variant).schedule() or "adaptive" in variant
    expected = outputs_of(vit, slow(vit, images, model.lives(images), model.settings.merge)[-1])
    assert_close(model(images), expected)
    assert far_apart(vit(images), built("plain")(images))


@pytest.mark.parametrize("name", ["plain", "custom, scales"])
def test_low_rank_deltas_reach_every_matrix_of_a_block(name: str) -> None:
    vit = fresh(name)
    add_low_rank(vit.transformer.resblocks[2:], rank=2)
    assert_close(vit(photos(name)), built(name)(photos(name)))  # a new delta has no effect
    block = vit.transformer.resblocks[2]
    for layer, weight in (
        (block.attn, "in_proj_weight"),
        (block.attn.out_proj, "weight"),
        (block.mlp.c_fc, "weight"),
        (block.mlp.c_proj, "weight"),
    ):
        assert isinstance(layer.parametrizations[weight][0], GatedLowRank)
    for key, parameter in vit.named_parameters():
        if key.endswith(".up"):
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    vit.proj.data.add_(0.01)
    delta = delta_between(adapt(vit), adapt(built(name)))
    assert {k for k in delta if ".2." in k and k.endswith(".up")} == {
        f"blocks.2.{layer}.weight.up" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert [k for k in delta if k.endswith(".delta")] == ["head.weight.delta"]
    merged = apply_delta(built(name), delta)
    assert dict(merged.named_parameters()).keys() == dict(built(name).named_parameters()).keys()
    assert_close(merged(photos(name)), vit(photos(name)), 5e-3)
    assert far_apart(merged(photos(name)), built(name)(photos(name)))


def test_training_reaches_the_low_rank_deltas() -> None:
    vit = fresh("plain")
    add_low_rank(vit.transformer.resblocks[2:], rank=2)
    model = slim("plain", "fixed, merge", vit)
    with torch.enable_grad():
        model(photos("plain")).square().sum().backward()
    ups = [parameter.grad for name, parameter in model.named_parameters() if name.endswith(".up")]
    assert len(ups) == 12
    assert all(gradient.abs().sum() > 0 for gradient in ups)


@pytest.mark.parametrize("variant", ["fixed, merge", "adaptive, merge"])
def test_lora_on_the_mlp_takes_effect_and_on_attention_is_refused(variant: str) -> None:
    peft = pytest.importorskip("peft")
    vit, images = fresh("plain"), photos("plain")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["c_fc"], init_lora_weights=False), vit)
    model = slim("plain", variant, vit)
    assert_close(model(images), outputs_of(vit, slow(vit, images, model.lives(images), merge=True)[-1]))
    assert far_apart(vit(images), built("plain")(images))
    vit = fresh("plain")
    model = slim("plain", variant, vit)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["attn"]), vit)
    for attempt in (lambda: model(images), lambda: slim("plain", variant, vit)):
        with pytest.raises(UnsupportedModelError, match=r"resblocks\.0\.attn, got peft.*merge_and_unload"):
            attempt()


def test_a_replaced_or_unknown_part_is_refused_by_name() -> None:
    vit = fresh("plain")
    vit.transformer.resblocks[1] = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"as transformer\.resblocks\.1, got Identity"):
        slim("plain", vit=vit)
    vit = fresh("plain")
    vit.forward = lambda x: x
    with pytest.raises(UnsupportedModelError, match=r"VisionTransformer replaces forward of open_clip's"):
        slim("plain", vit=vit)
    vit = fresh("plain")
    vit.transformer.forward = lambda x: x
    with pytest.raises(UnsupportedModelError, match=r"replaces transformer\.forward"):
        slim("plain", vit=vit)


def test_compiled_blocks() -> None:
    vit, images = fresh("plain"), photos("plain")
    for index, block in enumerate(vit.transformer.resblocks):
        vit.transformer.resblocks[index] = torch.compile(block, backend="eager")
    assert_close(slim("plain", "fixed, merge", vit)(images), slim("plain", "fixed, merge")(images))
    with pytest.raises(UnsupportedModelError, match=r"a wrapper \(OptimizedModule\) on transformer\.resblocks\.0"):
        slim("plain", "adaptive", vit)
    torch.compiler.reset()


def test_offloaded_models_are_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    vit = fresh("plain")
    model = slim("plain", vit=vit)
    accelerate.cpu_offload(vit, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="offloaded or dispatched over devices by accelerate"):
        model(photos("plain"))


def test_sharded_blocks_are_those_of_the_model() -> None:
    """fully_shard changes the classes of the blocks, and shards the weights that the scorer reads."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    vit, images = fresh("plain").train(), photos("plain")
    model = slim("plain", "fixed, merge", vit)
    expected = model(images)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in vit.transformer.resblocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with torch.enable_grad():
            output = model(images)
            output.square().sum().backward()
        assert_close(output.detach(), expected)
        assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        dist.destroy_process_group()
