"""Experimental compiled adaptive mode: few graphs for many lengths, with the outputs of the model.

torch's variable-length attention kernel runs on GPUs only. Here an operator with the same definition replaces it; like
the kernel, it is opaque to compilers.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import exported_models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from patchlife import LifeConfig, wrap
from patchlife.errors import ConfigError
from patchlife.runtime.experimental_compiled_adaptive import ExperimentalCompiledAdaptive, rounded_up
from patchlife.slimming import SlimModel

pytestmark = pytest.mark.usefixtures("forget_graphs")


@torch.library.custom_op("patchlife_tests::varlen", mutates_args=())
def varlen(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, scale: float) -> Tensor:
    out = torch.zeros_like(v)
    for a, b in pairwise(offsets.tolist()):
        assert b - a <= longest, "an image is longer than the promised maximum"
        logits = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b]) * scale
        out[a:b] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v[a:b])
    return out


@varlen.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(v)


def kernel(q: Tensor, k: Tensor, v: Tensor, begin: Tensor, _: Tensor, longest: int, __: int, **options: Any) -> Tensor:
    assert options.pop("num_splits") == 1
    return varlen(q, k, v, begin, longest, **options)


def adaptive(**settings: Any) -> SlimModel:
    return exported_models.small(**settings).calibrate([exported_models.images(16, seed=9)]).set_mode("adaptive")


def test_it_has_the_outputs_of_the_model() -> None:
    model = adaptive()
    fast = ExperimentalCompiledAdaptive(model, backend="eager", kernel=kernel)
    for seed in range(4):
        for budget in (0.6, 0.75, 1.0):
            images = exported_models.images(5, seed=seed)
            expected = model.set_budget(budget)(images)
            torch.testing.assert_close(fast(images, budget), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["classifier", "rotary"])
def test_it_has_the_outputs_of_models_of_transformers(name: str) -> None:
    model = exported_models.small_of_transformers(name)
    model.calibrate([exported_models.images(16, seed=9)]).set_mode("adaptive")
    fast = ExperimentalCompiledAdaptive(model, backend="eager", kernel=kernel)
    for budget in (0.7, 1.0):
        images = exported_models.images(5)
        expected = model.set_budget(budget).output(images)
        torch.testing.assert_close(fast(images, budget), expected, atol=1e-5, rtol=1e-4)


def test_it_restores_dropped_patches_as_the_model_does() -> None:
    """For a model that pools patches; the packed sequence has a row that belongs to no image."""
    vit, images = exported_models.small_of_transformers("embedding").unwrap(), exported_models.images(5)
    results = []
    for how in ("last", "residual"):
        model = wrap(vit, LifeConfig(budget=0.7, start=1, drops=(1, 2), restore=how))
        model.calibrate([exported_models.images(16, seed=9)]).set_mode("adaptive")
        results.append(ExperimentalCompiledAdaptive(model, backend="eager", kernel=kernel)(images, 0.7))
        torch.testing.assert_close(results[-1], model.output(images), atol=1e-5, rtol=1e-4)
    assert (results[0] - results[1]).abs().max() > 1e-3


def test_lengths_are_few_and_each_compiles_once() -> None:
    model, counter = adaptive(), CompileCounter()
    fast = ExperimentalCompiledAdaptive(model, backend=counter, kernel=kernel)
    lengths = set()
    for seed in range(12):
        images = exported_models.images(5, seed=seed)
        fast(images, 0.6)
        lengths.add(int(model.set_budget(0.6).lives(images).kept[:, -1].sum()))
    assert len(lengths) > 4, "the batches must differ for this test"
    assert counter.frame_count == len(fast.seconds) < len(lengths)
    assert not counters["graph_break"]
    assert all(seconds > 0 for seconds in fast.seconds.values())


def test_thresholds_of_another_size_do_not_make_the_schedules_again() -> None:
    """They are scaled at each call, but they are the same; a new calibration is another one."""
    model = adaptive()
    found = model.calibration
    model.calibrations = {(found.patches + 2, model.start): replace(found, patches=found.patches + 2)}
    fast, images = ExperimentalCompiledAdaptive(model, backend="eager", kernel=kernel), exported_models.images(2)
    fast(images, 0.6)
    prepared = fast._models[0.6]
    fast(images, 0.6)
    assert fast._models[0.6] is prepared
    model.calibrate([exported_models.images(16, seed=1)])
    fast(images, 0.6)
    assert fast._models[0.6] is not prepared


def test_outputs_do_not_depend_on_the_other_images_of_the_batch() -> None:
    fast = ExperimentalCompiledAdaptive(adaptive(), backend="eager", kernel=kernel)
    images = exported_models.images(4)
    torch.testing.assert_close(fast(images[1:2], 0.6), fast(images, 0.6)[1:2], atol=1e-5, rtol=1e-4)


@given(st.integers(1, 10**6))
def test_rounding_up_adds_few_tokens(tokens: int) -> None:
    length = rounded_up(tokens)
    assert tokens <= length <= max(tokens + 31, tokens * 33 / 32 + 1)
    assert rounded_up(length) == length


def test_models_that_are_refused() -> None:
    with pytest.raises(ConfigError, match="use CompiledBudgets for fixed mode"):
        ExperimentalCompiledAdaptive(exported_models.small(), kernel=kernel)
    with pytest.raises(ConfigError, match=r"Ampere GPU or newer.*got torch.float32 on cpu"):
        ExperimentalCompiledAdaptive(adaptive())
    model = adaptive()
    model.train()
    with pytest.raises(ConfigError, match=r"call \.eval\(\) first"):
        ExperimentalCompiledAdaptive(model, kernel=kernel)
