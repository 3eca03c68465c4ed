"""Budgets can change back and forth without compiling again, for any number of budgets."""

from __future__ import annotations

import exported_models
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from patchlife.errors import ConfigError
from patchlife.runtime.compiled import CompiledBudgets

BUDGETS = tuple(round(1 - 0.05 * i, 2) for i in range(5))

pytestmark = pytest.mark.usefixtures("forget_graphs")


@pytest.mark.slow
def test_each_budget_and_batch_size_compiles_once() -> None:
    """10 graphs, more than torch stores for one function; none is traced or compiled twice."""
    model, counter = exported_models.small(), CompileCounter()
    fast = CompiledBudgets(model, backend=counter)
    for _ in range(3):
        for budget in BUDGETS:
            for batch in (1, 3):
                images = exported_models.images(batch)
                torch.testing.assert_close(fast(images, budget), model.set_budget(budget)(images))
    assert counter.frame_count == len(fast.seconds) == 2 * len(BUDGETS)
    assert counters["stats"]["unique_graphs"] == 2 * len(BUDGETS)
    assert not counters["graph_break"]
    assert all(seconds > 0 for seconds in fast.seconds.values())


def test_the_model_is_not_changed() -> None:
    model = exported_models.small()
    before = model.settings
    fast = CompiledBudgets(model, backend="eager")
    fast.prepare((1.0, 0.6), exported_models.images(2))
    assert set(fast.seconds) == {(1.0, 2), (0.6, 2)}
    assert model.settings is before
    assert next(fast.model.parameters()) is next(model.parameters())


@pytest.mark.parametrize("name", ["classifier", "embedding", "rotary"])
def test_models_of_transformers_compile_without_graph_breaks(name: str) -> None:
    model, counter = exported_models.small_of_transformers(name), CompileCounter()
    fast = CompiledBudgets(model, backend=counter)
    images = exported_models.images(3)
    for budget in (1.0, 0.7, 1.0):
        outputs = model.set_budget(budget)(images)
        expected = outputs.logits if name == "classifier" else outputs.pooler_output
        torch.testing.assert_close(fast(images, budget), expected)
    assert counter.frame_count == 2
    assert not counters["graph_break"]


def test_weights_may_still_change() -> None:
    model, images, counter = exported_models.small(), exported_models.images(2), CompileCounter()
    fast = CompiledBudgets(model, backend=counter)
    first = fast(images, 0.7)
    model.backbone.model.head.bias[0] += 1
    assert torch.allclose(fast(images, 0.7)[:, 0], first[:, 0] + 1)
    assert counter.frame_count == 1


def test_adaptive_mode_is_refused() -> None:
    model = exported_models.small().calibrate([exported_models.images(8)]).set_mode("adaptive")
    with pytest.raises(ConfigError, match="need fixed mode, got adaptive"):
        CompiledBudgets(model)


@pytest.mark.slow
def test_generated_code() -> None:
    model = exported_models.small()
    fast = CompiledBudgets(model)
    fast.prepare((0.7, 1.0), exported_models.images(2))
    graphs = counters["stats"]["unique_graphs"]
    for budget in (0.7, 1.0, 0.7):
        images = exported_models.images(2, seed=3)
        torch.testing.assert_close(fast(images, budget), model.set_budget(budget)(images))
    assert counters["stats"]["unique_graphs"] == graphs == 2
