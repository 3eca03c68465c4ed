"""Every method: stated FLOPs are executed FLOPs, the target is met, images do not depend on their batch."""

from __future__ import annotations

import pytest
import torch
from families import built, photos
from plain_blocks import backbone, images

from patchlife.benchmarks.baselines import METHODS, Method
from patchlife.benchmarks.baselines.base import bisect, closest, dense_flops
from patchlife.errors import ConfigError, UnsupportedModelError
from patchlife.flop_counter import counted

SLIM = [name for name in METHODS if name != "dense"]
TARGETS = (0.8, 0.65)
FAMILIES = ("vit", "deit-distilled", "deit3", "gated", "residual-post-norm", "siglip", "parallel-things", "dinov3")


def build(name: str, family: str, target: float):
    """The method on a small model; the test is skipped if the method does not support the model."""
    method: Method = METHODS[name]
    try:
        return method.build(backbone(family), target, photos(family, 4)).eval()
    except UnsupportedModelError as refusal:
        pytest.skip(str(refusal))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_stated_flops_are_executed_flops(name: str, family: str) -> None:
    baseline, batch = build(name, family, TARGETS[1]), photos(family, 4)
    try:
        executed, logits = counted(baseline, batch)
    except UnsupportedModelError as refusal:
        pytest.skip(str(refusal))
    assert logits.shape == built(family)(batch).shape
    assert torch.isfinite(logits).all()
    assert baseline.flops(batch) == pytest.approx(executed / len(batch), rel=0.005)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SLIM)
def test_the_target_is_met(name: str, target: float) -> None:
    baseline = build(name, "vit", target)
    fraction = baseline.flops(images()) / dense_flops(backbone(), images())
    assert fraction == pytest.approx(target, abs=0.03), baseline.knob  # a patch of 36 is a large step
    assert baseline.knob


def test_dense_is_the_backbone_itself() -> None:
    assert torch.equal(build("dense", "vit", 1.0)(images()), built("vit")(images()))


@pytest.mark.parametrize("name", [n for n in SLIM if n != "ats"])
def test_images_do_not_depend_on_their_batch(name: str) -> None:
    baseline = build(name, "vit", 0.65)
    together = baseline(images())
    alone = torch.cat([baseline(one[None]) for one in images()])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_methods_have_a_title_a_source_and_their_training(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert method.title
    assert method.source
    assert method.training


@pytest.mark.parametrize("name", ["evit", "ats", "a-vit", "class-attention", "diffrate", "ppt", "mame", "tnt"])
def test_class_token_methods_refuse_pooled_models(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="class token"):
        METHODS[name].build(backbone("siglip"), 0.65, photos("siglip", 1))


@pytest.mark.parametrize("name", ["evit", "tome", "ats", "diffrate", "ppt", "mame"])
def test_methods_that_reduce_inside_a_block_refuse_parallel_ones(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="between attention and MLP"):
        METHODS[name].build(backbone("parallel-things"), 0.65, photos("parallel-things", 1))


def test_a_target_out_of_reach_is_refused() -> None:
    with pytest.raises(ConfigError, match="out of reach"):
        METHODS["evit"].build(backbone(), 0.1, images())


def test_solvers_find_the_knob() -> None:
    assert bisect(lambda x: x**2, 2.0, 0.0, 10.0) == pytest.approx(2**0.5, rel=1e-6)
    assert bisect(lambda x: x, 5.0, 0.0, 1.0) == 1.0
    assert closest(lambda n: n**2, 50, 0, 100) == 7
    assert closest(lambda n: n**2, 61, 0, 100) == 8
