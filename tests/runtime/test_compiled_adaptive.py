"""Compiled adaptive mode: few graphs for many lengths, and the answers of the model itself.

torch's kernel for rows of unequal length runs on a GPU only; its definition stands in for it here, as an operator that
compilers cannot look into, just as they cannot look into the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
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

from patchlife.errors import ConfigError
from patchlife.runtime.experimental_compiled_adaptive import ExperimentalCompiledAdaptive, rounded_up
from patchlife.slimming import SlimModel


@torch.library.custom_op("patchlife_tests::varlen", mutates_args=())
def varlen(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, scale: float) -> Tensor:
    out = torch.zeros_like(v)
    for a, b in pairwise(offsets.tolist()):
        assert b - a <= longest, "the kernel does not see behind the longest piece that it was promised"
        logits = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b]) * scale
        out[a:b] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v[a:b])
    return out


@varlen.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(v)


def kernel(q: Tensor, k: Tensor, v: Tensor, begin: Tensor, _: Tensor, longest: int, __: int, **options: Any) -> Tensor:
    assert options.pop("num_splits") == 1
    return varlen(q, k, v, begin, longest, **options)


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def adaptive(**settings: Any) -> SlimModel:
    return exported_models.small(**settings).calibrate([exported_models.images(16, seed=9)]).set_mode("adaptive")


def test_it_answers_as_the_model() -> None:
    model = adaptive()
    fast = ExperimentalCompiledAdaptive(model, backend="eager", kernel=kernel)
    for seed in range(4):
        for budget in (0.6, 0.75, 1.0):
            images = exported_models.images(5, seed=seed)
            expected = model.set_budget(budget)(images)
            torch.testing.assert_close(fast(images, budget), expected, atol=1e-5, rtol=1e-4)


def test_lengths_are_few_and_each_compiles_once() -> None:
    model, counter = adaptive(), CompileCounter()
    fast = ExperimentalCompiledAdaptive(model, backend=counter, kernel=kernel)
    lengths = set()
    for seed in range(12):
        images = exported_models.images(5, seed=seed)
        fast(images, 0.6)
        lengths.add(int(model.set_budget(0.6).lives(images).kept[:, -1].sum()))
    assert len(lengths) > 4, "the batches are meant to differ"
    assert counter.frame_count == len(fast.seconds) < len(lengths)
    assert not counters["graph_break"]
    assert all(taken > 0 for taken in fast.seconds.values())


def test_an_image_does_not_depend_on_its_batch_mates() -> None:
    fast = ExperimentalCompiledAdaptive(adaptive(), backend="eager", kernel=kernel)
    images = exported_models.images(4)
    torch.testing.assert_close(fast(images[1:2], 0.6), fast(images, 0.6)[1:2], atol=1e-5, rtol=1e-4)


@given(st.integers(1, 10**6))
def test_rounding_up_costs_little(tokens: int) -> None:
    length = rounded_up(tokens)
    assert tokens <= length <= max(tokens + 31, tokens * 33 / 32 + 1)
    assert rounded_up(length) == length


def test_what_it_does_not_take() -> None:
    with pytest.raises(ConfigError, match="take CompiledBudgets for fixed mode"):
        ExperimentalCompiledAdaptive(exported_models.small(), kernel=kernel)
    with pytest.raises(ConfigError, match=r"Ampere GPU or newer.*got torch.float32 on cpu"):
        ExperimentalCompiledAdaptive(adaptive())
    model = adaptive()
    model.train()
    with pytest.raises(ConfigError, match=r"call \.eval\(\) first"):
        ExperimentalCompiledAdaptive(model, kernel=kernel)
