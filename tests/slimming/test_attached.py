"""Hooks, patches and layers that a user attached to the backbone take effect in every block, or are refused by name."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FEW, fresh, photos
from reference import assert_close, masked
from slim_models import far_apart, slim
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from patchlife import LifeConfig, flops, wrap
from patchlife.errors import UnsupportedModelError

INNER = ("vit", "deit-distilled", "siglip", "gap-registers", "dinov3", "rope-mixed", "eva", "eva02", "parallel-scaling")
LINEAR = ("qkv", "q_proj", "k_proj", "v_proj", "proj", "fc1", "fc2")


def count_calls(vit: nn.Module, skip: tuple[str, ...] = ("", "blocks")) -> Counter:
    """How often each module of ``vit`` is called from now on, by name; hooks count the calls."""
    calls: Counter = Counter()
    for name, module in vit.named_modules():
        if name not in skip:
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


def linears(vit: nn.Module) -> list[tuple[nn.Module, str]]:
    """(parent, name) of the linear layers inside the blocks."""
    return [(m, name) for m in vit.blocks.modules() for name, child in m.named_children() if type(child) is nn.Linear]


@pytest.mark.parametrize("variant", ["fixed", "fixed, merge"])
@pytest.mark.parametrize("name", INNER)
def test_every_hook_fires_as_often_as_in_the_backbone(name: str, variant: str) -> None:
    """The scorer applies projections of the start block before this block runs, without firing hooks."""
    vit, images = fresh(name), photos(name)
    calls = count_calls(vit)
    vit(images)
    dense = Counter(calls)
    calls.clear()
    model = slim(name, variant, vit)
    assert not calls, "wrapping must not run the modules"
    model(images)
    assert calls == dense


@pytest.mark.parametrize("name", INNER)
def test_hooks_inside_blocks_fire_in_adaptive_mode(name: str) -> None:
    vit, images = fresh(name), photos(name)
    calls = count_calls(vit)
    vit(images)
    dense = Counter(calls)
    for module in vit.modules():  # keep hooks on layers only: those on whole blocks and attentions are refused
        if list(module.children()):
            module._forward_hooks.clear()
    model = slim(name, "adaptive, merge", vit)
    calls.clear()
    model(images)
    layers = {n: c for n, c in dense.items() if not list(vit.get_submodule(n).children()) and ".attn_drop" not in n}
    stages = len({tuple(c) for c in model.lives(images).kept.T.tolist()}) - 1
    assert stages > 0
    calls.clear()
    model(images)
    assert dict(calls) == layers


def test_a_hook_that_replaces_a_blocks_output_takes_effect() -> None:
    vit, images = fresh("vit"), photos("vit")
    vit.blocks[-1].register_forward_hook(lambda module, args, out: out * 0)
    for variant in ("fixed", "fixed, merge"):
        logits = slim("vit", variant, vit)(images)
        assert_close(logits, logits[:1].expand_as(logits))


@pytest.mark.parametrize(
    "attach", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
@pytest.mark.parametrize("module", ["blocks.3", "blocks.3.attn"])
def test_adaptive_mode_refuses_hooks_on_modules_that_it_does_not_call(module: str, attach: str) -> None:
    vit = fresh("vit")
    model = slim("vit", "adaptive", vit)
    handle = getattr(vit.get_submodule(module), attach)(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match=rf"on {module} .*fixed mode"):
        model(photos("vit"))
    with pytest.raises(UnsupportedModelError, match=f"on {module} "):
        wrap(vit, LifeConfig(mode="adaptive"))
    model.set_mode("fixed")(photos("vit"))
    with pytest.raises(UnsupportedModelError, match=module):
        model.set_mode("adaptive")
    assert model.settings.mode == "fixed"
    handle.remove()
    model.set_mode("adaptive")(photos("vit"))


@pytest.mark.parametrize("module", ["", "blocks"])
def test_hooks_that_could_never_fire_are_refused(module: str) -> None:
    vit = fresh("vit")
    model = slim("vit", vit=vit)
    vit.get_submodule(module).register_forward_hook(lambda *_: None)
    for attempt in (lambda: model(photos("vit")), lambda: wrap(vit)):
        with pytest.raises(UnsupportedModelError, match=r"forward hook on .* no effect"):
            attempt()


def test_hooks_on_parallel_attentions_are_refused_where_timm_does_not_call_the_modules() -> None:
    vit = fresh("parallel-things")
    vit.blocks[1].attns[0].register_forward_hook(lambda *_: None)
    slim("parallel-things", "fixed", vit)(photos("parallel-things"))
    with pytest.raises(UnsupportedModelError, match=r"on blocks\.1\.attns\.0 "):
        slim("parallel-things", "fixed, merge", vit)


def test_a_replaced_forward_of_an_attention_is_called_or_refused() -> None:
    """Users replace it to read attention maps."""
    vit, images = fresh("vit"), photos("vit")
    tokens: list[int] = []
    original = vit.blocks[4].attn.forward
    vit.blocks[4].attn.forward = lambda x, **more: (tokens.append(x.shape[1]), original(x, **more))[1]
    model = slim("vit", "fixed, merge", vit)
    assert_close(model(images), slim("vit", "fixed, merge")(images))
    assert tokens == [1 + model.schedule().kept[4]]
    with pytest.raises(UnsupportedModelError, match=r"replaced forward on blocks\.4\.attn"):
        slim("vit", "adaptive", vit)


# ---- layers that compute their weights, or that do more than multiply by a weight


def add_low_rank_delta(vit: nn.Module) -> None:
    """Replace every linear layer by a module that adds a low-rank delta to its output."""

    class LowRank(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.layer, self.in_features, self.out_features = layer, layer.in_features, layer.out_features
            draw = torch.Generator().manual_seed(layer.in_features)
            self.down = nn.Parameter(torch.randn(2, layer.in_features, generator=draw) / layer.in_features**0.5)
            self.up = nn.Parameter(torch.randn(layer.out_features, 2, generator=draw))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + x @ self.down.T @ self.up.T

    for parent, name in linears(vit):
        setattr(parent, name, LowRank(getattr(parent, name)))


def prune_weights(vit: nn.Module) -> None:
    for parent, name in linears(vit):
        prune.l1_unstructured(getattr(parent, name), "weight", 0.4)


def add_weight_norm(vit: nn.Module) -> None:
    for parent, name in linears(vit):
        nn.utils.weight_norm(getattr(parent, name))
        getattr(parent, name).weight_g.data *= 1.1


def parametrise(vit: nn.Module) -> None:
    for parent, name in linears(vit):
        parametrizations.weight_norm(getattr(parent, name))
        getattr(parent, name).parametrizations.weight.original0.data *= 1.1


ATTACH = {
    "low-rank delta": add_low_rank_delta,
    "pruned": prune_weights,
    "weight norm": add_weight_norm,
    "parametrised": parametrise,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", ["fixed", "fixed, merge", "adaptive, merge"])
@pytest.mark.parametrize("attach", ATTACH)
@pytest.mark.parametrize("name", ["vit", "siglip", "dinov3", "rope-mixed"])
def test_computed_weights_take_effect(name: str, attach: str, variant: str) -> None:
    """In every block: the logits equal those of the slow reference, which calls timm's own modules."""
    vit, images = fresh(name), photos(name)
    ATTACH[attach](vit)
    model = slim(name, variant, vit)
    lives, plan = model.lives(images), model.plan(images)
    assert_close(model(images), masked(model, images, lives, plan)[0])
    assert far_apart(vit(images), fresh(name)(images))


@pytest.mark.parametrize("variant", ["fixed, merge", "adaptive, merge"])
def test_lora_equals_merged_lora(variant: str) -> None:
    peft = pytest.importorskip("peft")
    vit, images = fresh("vit"), photos("vit")
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["qkv", "fc1"], init_lora_weights=False), vit)
    merged = copy.deepcopy(vit)
    for parent in list(merged.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, peft.tuners.lora.Linear):
                child.merge()
                setattr(parent, name, child.get_base_layer())
    model, plain = slim("vit", variant, vit), slim("vit", variant, merged)
    assert model.schedule() == plain.schedule()
    assert_close(model(images), plain(images))
    assert far_apart(model(images), slim("vit", variant)(images))


def test_lora_gets_gradients_in_every_block() -> None:
    peft = pytest.importorskip("peft")
    vit = fresh("vit").train()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["qkv"]), vit)
    model = slim("vit", "fixed, merge", vit)
    with torch.enable_grad():
        model(photos("vit")).square().sum().backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert len(grads) == 5
    assert all(g is not None and g.abs().sum() > 0 for g in grads)


def test_lora_can_be_added_to_a_wrapped_model() -> None:
    """By the backbone's own names, with a classifier that is trained too (``modules_to_save``)."""
    peft = pytest.importorskip("peft")
    model = slim("vit", "fixed, merge", fresh("vit").train())
    config = peft.LoraConfig(r=2, target_modules=r"blocks\.\d+\.attn\.qkv", modules_to_save=["head"])
    tuned = peft.get_peft_model(model, config)
    with torch.enable_grad():
        tuned(photos("vit")).square().sum().backward()
    trained = {n for n, p in tuned.named_parameters() if p.grad is not None}
    assert sum("lora_A" in n for n in trained) == 5
    assert any("head.modules_to_save" in n for n in trained)
    assert all("lora" in n or "modules_to_save" in n for n in trained)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("variant", ["fixed, merge", "adaptive, merge"])
def test_layers_quantised_before_or_after_wrapping(variant: str, when: str) -> None:
    images = photos("vit")
    plain = slim("vit", variant, fresh("vit"))
    if when == "before":
        model = slim("vit", variant, torch.ao.quantization.quantize_dynamic(fresh("vit"), {nn.Linear}))
    else:
        model = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear})
    assert flops(model).dense == flops(plain).dense
    rounding = model.wrapped(images) - plain.wrapped(images)
    assert 0 < rounding.abs().max() < 1
    assert (model(images) - plain(images)).abs().max() < 1
    model.set_budget(0.7)(images)


@pytest.mark.slow
def test_compiled_blocks_run_compiled() -> None:
    vit, images, graphs = fresh("vit"), photos("vit"), []
    for block in vit.blocks:
        block.compile(backend=lambda graph, _: (graphs.append(1), graph.forward)[1])
    model = slim("vit", "fixed", vit)
    assert_close(model(images), slim("vit", "fixed")(images))
    assert graphs
    with pytest.raises(UnsupportedModelError, match=r"a compiled call on blocks\.0"):
        model.set_mode("adaptive")
    for index in range(5):
        vit.blocks[index] = torch.compile(fresh("vit").blocks[index], backend="eager")
    assert_close(slim("vit", "fixed, merge", vit)(images), slim("vit", "fixed, merge")(images))
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["vit", "dinov3"])
def test_offloaded_weights_are_loaded_for_a_run(name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    images, expected = (
        photos(name),
        {variant: slim(name, variant)(photos(name)) for variant in ("fixed, merge", "adaptive, merge")},
    )
    model = slim(name, "fixed, merge", fresh(name))
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(model(images), expected["fixed, merge"])
    assert torch.equal(model.lives(images).life, slim(name, "fixed, merge").lives(images).life)
    assert torch.equal(model.forward_features(images), slim(name, "fixed, merge").forward_features(images))
    if name == "dinov3":  # LayerScale is a weight of the block itself
        with pytest.raises(UnsupportedModelError, match=r"weight offloading on blocks\.0"):
            model.set_mode("adaptive")
    else:
        model.calibrate([photos(name, 8, seed=1)]).set_mode("adaptive")
        assert torch.equal(model(images), expected["adaptive, merge"])


def test_a_flop_counter_made_of_hooks_counts_every_block() -> None:
    vit, images = fresh("vit"), photos("vit", 1)
    spent: list[int] = []
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, args, out: spent.append(2 * out.numel() * m.in_features))
    vit(images)
    dense, _ = sum(spent), spent.clear()
    model = slim("vit", "fixed", vit)
    model(images)
    counts = model.schedule().kept
    blocks = sum((1 + n) / 37 for n in counts) / 5
    head = 2 * vit.head.weight.numel()
    assert sum(spent) - head == pytest.approx(blocks * (dense - head), rel=1e-6)


@pytest.mark.parametrize("name", FEW)
def test_hooks_do_not_change_the_scores(name: str) -> None:
    plain, hooked = slim(name, "fixed, merge"), fresh(name)
    count_calls(hooked, skip=("", "blocks", *(n for n, _ in hooked.named_modules() if n.count(".") == 3)))
    assert torch.equal(slim(name, "fixed, merge", hooked).plan(photos(name)).score, plain.plan(photos(name)).score)


NOT_BACKBONES: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "compiled": (lambda vit: torch.compile(vit), r"OptimizedModule: .*torch\.compile\(patchlife\.wrap"),
    "data parallel": (nn.DataParallel, r"DataParallel: .*wrap\(model\.module\)"),
    "wrapped already": (wrap, "wrapped already"),
    "a name": (lambda vit: "vit_tiny_patch16_224", "got str"),
}


@pytest.mark.parametrize("kind", NOT_BACKBONES)
def test_a_container_of_a_backbone_is_refused(kind: str) -> None:
    contain, message = NOT_BACKBONES[kind]
    with pytest.raises(UnsupportedModelError, match=message):
        wrap(contain(fresh("vit")))


def test_a_torchvision_model_is_refused_by_its_class() -> None:
    torchvision = pytest.importorskip("torchvision")
    vit = torchvision.models.VisionTransformer(32, 8, 1, 1, 16, 16)
    with pytest.raises(UnsupportedModelError, match=r"got torchvision\..*\.VisionTransformer"):
        wrap(vit)


@pytest.mark.parametrize("name", FEW)
def test_a_model_on_the_meta_device_can_be_wrapped(name: str) -> None:
    """FLOPs follow from shapes alone."""
    expected = flops(slim(name))
    assert flops(slim(name, vit=fresh(name).to("meta"))) == expected
