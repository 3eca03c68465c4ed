"""What a forward pass asks of a GPU, counted on the CPU: how many kernels, and no wait in fixed mode.

In eager mode a GPU starts each kernel by itself, which takes longer than most of them run.
"""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from fake_gpu import GPU, Calls, calls_of, on_fake_gpu
from families import FAMILIES, START, fresh
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from patchlife import LifeConfig, SlimModel, wrap
from patchlife.slimming import merging
from patchlife.slimming.regressor import LifeRegressor
from patchlife.slimming.run import adaptive, packed

# the counts are those of one version of torch, and torch 2.9 cannot run some of these models on fake tensors of a GPU
pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15), reason="counts calls of torch 2.15 and later"
)

NAMES = ["vit", "deit-distilled", "siglip", "gap-registers", "unpooled", "eva02", "dinov3", "rope-mixed", "dynamic"]
SMALL_VIT = {"embed_dim": 24, "num_heads": 2, "num_classes": 5}


def _slim(
    vit: nn.Module,
    merge: bool,
    learned: bool = False,
    start: int | None = START,
    drops: tuple[int, ...] | None = None,
) -> SlimModel:
    model = wrap(vit, LifeConfig(0.65, start=start, drops=drops, merge=merge))
    if learned:
        model.scorer = LifeRegressor(model.backbone.dim, model.backbone.prefix).train(model.training)
    model.schedule()  # solved before the parameters have no values any more
    return model


def _fake(model: SlimModel, size: tuple[int, int], batch: int = 4) -> tuple[FakeTensorMode, Tensor]:
    mode = FakeTensorMode()
    model.schedule(size)
    for module in (model.wrapped, model.scorer):
        on_fake_gpu(mode, module)
    with mode:
        return mode, torch.empty(batch, model.backbone.channels, *size, device=GPU)


@pytest.mark.parametrize("learned", [False, True], ids=["rule", "learned"])
@pytest.mark.parametrize("merge", [False, True], ids=["slices", "merge"])
@pytest.mark.parametrize("name", NAMES)
def test_fixed_mode_never_waits_for_the_host(name: str, merge: bool, learned: bool) -> None:
    model = _slim(fresh(name), merge, learned)
    mode, images = _fake(model, FAMILIES[name].images)
    slimmed, dense = calls_of(mode, lambda: model(images)), calls_of(mode, lambda: model.wrapped(images))
    assert slimmed.waits == dense.waits  # timm itself computes the rotations of some models on the CPU in each call
    assert not dense.waits or name in ("dinov3", "dynamic")


@pytest.mark.parametrize("side", [200, 520], ids=["subspace", "windows"])
def test_large_images_do_not_wait_either(side: int) -> None:
    """Above 512 patches similarities are those of a subspace, above 4096 patches windows are compared."""
    vit = timm.create_model("vit_tiny_patch16_224", depth=4, img_size=side, patch_size=8, **SMALL_VIT).eval()
    model = _slim(vit, merge=True)
    mode, images = _fake(model, (side, side), batch=2)
    assert not calls_of(mode, lambda: model(images)).waits


@torch.enable_grad()
def test_the_forward_pass_that_trains_the_scorer_does_not_wait() -> None:
    model = _slim(fresh("vit").train(), merge=True, learned=True).train()
    mode, images = _fake(model, FAMILIES["vit"].images)
    with mode:
        assert model(images).requires_grad
    assert not calls_of(mode, lambda: model(images)).waits


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: torch.tensor([0, 2], device=GPU),
        lambda x: x[:, [0, 2]],
        lambda x: x + torch.ones(3).to(GPU),
        lambda x: torch.tensor(2.0, device=GPU) * x,
    ],
)
def test_waits_are_found(wait) -> None:
    mode = FakeTensorMode()
    with mode:
        x = torch.empty(2, 3, device=GPU)
    assert calls_of(mode, partial(wait, x)).waits


# ---- how many kernels


def _added(merge: bool, learned: bool) -> int:
    """Kernels of the slimmed model beyond those of the same blocks on fewer tokens with no decision."""
    vit = timm.create_model("vit_tiny_patch16_224", **SMALL_VIT).eval()
    model = _slim(vit, merge, learned, start=3, drops=(3, 6))
    mode, images = _fake(model, (224, 224))
    dense, slimmed = calls_of(mode, lambda: vit(images)), calls_of(mode, lambda: model(images))
    return slimmed.kernels.total() - dense.kernels.total()


@pytest.mark.parametrize(
    ("merge", "learned", "most"),
    [(False, False, 34), (True, False, 82), (False, True, 37), (True, True, 85)],
    ids=["slices", "merge", "slices, learned", "merge, learned"],
)
def test_the_decision_and_the_merges_start_few_kernels(merge: bool, learned: bool, most: int) -> None:
    """With two drop points. Raise a number only for a reason: at a small batch, eager mode waits for each start."""
    assert _added(merge, learned) <= most


# ---- adaptive mode


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adaptive mode runs on the CPU by the functions for a GPU; dense attention stands for the kernel."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, *_: object, scale: float, num_splits: int) -> Tensor:
        return v

    def attention(offsets: tuple[int, ...], bias: Tensor | None, like: Tensor, begins: Tensor) -> partial[Tensor]:
        channels = None if bias is None else packed.BiasChannels(bias)
        return partial(packed.varlen_attention, kernel, begins, packed._longest(offsets), channels)

    monkeypatch.setattr(merging, "adds_in_order", lambda x: False)
    monkeypatch.setattr(adaptive, "packed_attention", attention)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_adaptive_mode_starts_as_many_kernels_for_many_images_as_for_few() -> None:
    vit = fresh("vit")
    model = wrap(vit, LifeConfig(0.65, start=START))
    model.calibrate([torch.randn(8, 3, 48, 48)]).set_mode("adaptive")

    def kernels(batch: int) -> int:
        images = torch.randn(batch, 3, 48, 48)
        with Calls() as calls:
            model(images)
        return calls.kernels.total()

    kernels(2)
    assert kernels(16) <= kernels(2) + 5  # a stage may end at another block


def test_thresholds_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(fresh("vit"), LifeConfig(0.65, start=START))
    images = torch.randn(4, 3, 48, 48)
    model.calibrate([images]).set_mode("adaptive")
    first = model(images)
    monkeypatch.setattr("patchlife.slimming.calibration.Calibration._look_up", lambda *_: pytest.fail("again"))
    assert torch.equal(model(images), first)
    monkeypatch.undo()
    assert not torch.equal(model.set_budget(0.8)(images), first)


def test_the_layout_of_all_stages_is_copied_once() -> None:
    rows = [torch.arange(5), torch.arange(0), torch.arange(7)]
    with Calls() as calls:
        moved = adaptive._moved(rows, torch.device("meta"))
    assert calls.kernels["aten::_to_copy"] == 1
    assert [len(part) for part in moved] == [5, 0, 7]
    assert adaptive._moved(rows, torch.device("cpu")) is rows
