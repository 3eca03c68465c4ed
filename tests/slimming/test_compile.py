"""Fixed mode compiles to one graph per budget, equals eager mode, and switches budgets without compiling again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from families import FAMILIES, FEW, photos
from reference import assert_close
from slim_models import far_apart, slim
from torch._dynamo.testing import CompileCounterWithBackend


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def check(name: str, variant: str, backend: str, budgets: tuple[float, ...]) -> None:
    """Compiled logits equal eager ones at each budget, and each budget is compiled once, without a graph break."""
    model, images = slim(name, variant), photos(name)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    logits = {}
    for budget in budgets:
        model.set_budget(budget)
        result = compiled(images)
        assert_close(result, model(images))
        assert torch.equal(result, logits.setdefault(budget, result))
        assert counter.frame_count == len(logits), "a budget was compiled again"
        if budget < 1:
            assert far_apart(result, model.wrapped(images)), "no patch was dropped"
    if len(logits) > 1:
        assert far_apart(logits[budgets[0]], logits[budgets[1]])


def test_a_model_compiles_to_one_graph() -> None:
    check("dinov3", "fixed, merge", "eager", (0.65,))


@pytest.mark.parametrize("variant", ["fixed", "fixed, merge"])
def test_switching_back_to_a_budget_uses_its_graph(variant: str) -> None:
    check("vit", variant, "eager", (0.65, 1.0, 0.65, 0.8, 1.0))


@pytest.mark.contract("compile")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant"),
    [
        (name, variant)
        for name in FAMILIES
        for variant in ("fixed", "fixed, merge")
        if "merge" in variant or name in FEW
    ],
)
def test_every_family_compiles_to_one_graph(name: str, variant: str) -> None:
    check(name, variant, "aot_eager", (0.65,))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["fixed", "fixed, merge"])
@pytest.mark.parametrize("name", FEW)
def test_generated_code_equals_eager_mode(name: str, variant: str) -> None:
    check(name, variant, "inductor", (0.65, 0.8, 0.65))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "siglip", "dinov3"])
def test_batches_of_any_size(name: str) -> None:
    model = slim(name, "fixed, merge")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (2, 3, 7):
        assert_close(compiled(photos(name, count)), model(photos(name, count)))


@pytest.mark.slow
def test_forward_features_compiles_to_one_graph() -> None:
    model = slim("rope-mixed", "fixed, merge")
    compiled = torch.compile(model.forward_features, fullgraph=True, backend="aot_eager")
    assert_close(compiled(photos("rope-mixed")), model.forward_features(photos("rope-mixed")))
