"""Fixed mode compiles to one graph, equals eager, and budgets switch in it back and forth."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from families import FAMILIES, FEW, photos
from reference import assert_close
from slimmed import far_apart, slim


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def check(name: str, way: str, backend: str, budgets: tuple[float, ...]) -> None:
    """Each budget, compiled without a graph break, against eager; then all of them again from the cache."""
    model, images = slim(name, way), photos(name)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    seen = {}
    for budget in budgets:
        model.set_budget(budget)
        result = compiled(images)
        assert_close(result, model(images))
        assert_close(result, seen.setdefault(budget, result))
    if len(seen) > 1:
        assert far_apart(seen[budgets[0]], seen[budgets[1]])


def test_one_graph() -> None:
    check("dinov3", "fixed, merge", "eager", (0.65,))


def test_budgets_switch_back() -> None:
    check("vit", "fixed", "eager", (0.65, 1.0, 0.65))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "way"),
    [(name, way) for name in FAMILIES for way in ("fixed", "fixed, merge") if "merge" in way or name in FEW],
)
def test_one_graph_for_every_family(name: str, way: str) -> None:
    check(name, way, "aot_eager", (0.65,))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fixed", "fixed, merge"])
@pytest.mark.parametrize("name", FEW)
def test_generated_code(name: str, way: str) -> None:
    check(name, way, "inductor", (0.65, 0.8, 0.65))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "siglip", "dinov3"])
def test_batches_of_any_size(name: str) -> None:
    model = slim(name, "fixed, merge")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (2, 3, 7):
        assert_close(compiled(photos(name, count)), model(photos(name, count)))


@pytest.mark.slow
def test_features_compile_too() -> None:
    model = slim("rope-mixed", "fixed, merge")
    compiled = torch.compile(model.forward_features, fullgraph=True, backend="aot_eager")
    assert_close(compiled(photos("rope-mixed")), model.forward_features(photos("rope-mixed")))
