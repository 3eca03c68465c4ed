"""Exports of a model with a gated weight delta: each budget has its weights, and a bundle stores the base once."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import exported_models
import families
import numpy as np
import pytest
import timm
import torch
from gated_deltas import delta_of

import patchlife
from patchlife.export import export, export_bundle, exporter
from patchlife.export.cache import _key
from patchlife.runtime import Bundle, CompiledBudgets, open_engine
from patchlife.slimming import variant
from patchlife.slimming.regressor import LifeRegressor

BUDGETS = (1.0, 0.85, 0.7, 0.6)


def small(budget: float = 0.7) -> patchlife.SlimModel:
    model = exported_models.small(budget=budget)
    return model.use_delta(delta_of(model.unwrap(), 1, rank=4))


def test_the_delta_has_an_effect_at_every_budget_below_1() -> None:
    model, plain, images = small(), exported_models.small(), exported_models.images(2)
    for budget in BUDGETS[1:]:
        difference = (model.set_budget(budget)(images) - plain.set_budget(budget)(images)).abs().max()
        assert difference > 0.1


@pytest.mark.parametrize("format", [pytest.param("onnx", marks=pytest.mark.slow), "torch"])
def test_a_file_has_the_weights_of_its_budget(format: str, tmp_path: Path) -> None:
    model, images = small(), exported_models.images(4)
    merged = {name: value.clone() for name, value in model.unwrap().state_dict().items()}
    path = tmp_path / "model.file"
    export(model, path, format, images=exported_models.images(9))
    assert all(torch.equal(value, merged[name]) for name, value in model.unwrap().state_dict().items())
    logits = open_engine(path, trust=True)(images.numpy()).logits
    np.testing.assert_allclose(logits, model(images).numpy(), atol=1e-4)


@pytest.fixture(scope="module", params=["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def bundle(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "bundle"
    with torch.no_grad():
        return export_bundle(small(), folder, (0.7, 1.0), request.param, images=exported_models.images(9)).path


def test_a_bundle_has_the_weights_of_each_budget(bundle: Path) -> None:
    model, images, opened = small(), exported_models.images(4), Bundle(bundle, threads=1)
    for budget in (1.0, 0.7):
        logits, lives = model.set_budget(budget).predict(images)
        output = opened.engine(budget)(images.numpy())
        np.testing.assert_allclose(output.logits, logits.numpy(), atol=1e-4)
        np.testing.assert_array_equal(output.life, lives.life.numpy())


def test_a_bundle_stores_the_base_weights_once(bundle: Path) -> None:
    parameters = sum(p.numel() * p.element_size() for p in small().parameters())
    tensors = small().delta.tensors
    factors = sum(4 * value.numel() for value in tensors.values())
    vectors = sum(4 * value[0].numel() for name, value in tensors.items() if name.endswith(".shift"))
    both = 2 * vectors  # biases and norms, of each of the two budgets
    assert (bundle / "weights.bin").stat().st_size < 1.2 * parameters + factors + both


def test_graphs_compute_weights_from_constants_only(bundle: Path) -> None:
    """So an engine computes them once, when it opens the graph."""
    import onnx

    if not (bundle / "budget-0.7.onnx").exists():
        pytest.skip("about ONNX")
    graph = onnx.load(bundle / "budget-0.7.onnx", load_external_data=False).graph
    constant = {tensor.name for tensor in graph.initializer}
    sums = [node for node in graph.node if node.name.endswith("_sum")]
    assert len(sums) == 8, "four matrices in each of two blocks"
    for node in graph.node[: 3 * len(sums)]:
        assert set(node.input) <= constant
        constant |= set(node.output)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_a_bundle_of_four_budgets_is_little_larger_than_one_file(format: str, tmp_path: Path) -> None:
    sizes = {"depth": 4, "embed_dim": 192, "num_heads": 3, "num_classes": 7, "patch_size": 16, "img_size": 64}
    vit = families.liven(timm.create_model("vit_tiny_patch16_224", **sizes)).eval()
    config = patchlife.LifeConfig(budget=0.7, start=1, drops=(1, 2))
    model = patchlife.wrap(vit, config, LifeRegressor(192, 1)).eval().use_delta(delta_of(vit, 1, rank=8))
    photos = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    export(model, tmp_path / "one", format, images=photos)
    one = (tmp_path / "one").stat().st_size
    exported = export_bundle(model, tmp_path / "bundle", BUDGETS, format, images=photos)
    assert one < exported.size < 1.35 * one
    assert all(parity.agreement == 1 for parity in exported.parities)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_int8_bundles_have_the_weights_of_each_budget(format: str, tmp_path: Path, monkeypatch) -> None:
    if format == "openvino":
        pytest.importorskip("nncf")
    monkeypatch.setattr(exporter, "AGREEMENT", 0.8)  # of random weights
    model, images = small(), exported_models.images(32)
    export_bundle(model, tmp_path / "bundle", (1.0, 0.7), format, images=images, int8="dynamic")
    opened = Bundle(tmp_path / "bundle", threads=1)
    for budget in (1.0, 0.7):
        logits = torch.from_numpy(opened.engine(budget)(images.numpy()).logits)
        near, far = (
            (other.set_budget(budget)(images) - logits).square().mean() for other in (model, exported_models.small())
        )
        assert budget == 1 or near < 0.2 * far


@pytest.mark.slow
def test_a_bundle_of_transformers_shares_the_base_too(tmp_path: Path) -> None:
    plain = exported_models.small_of_transformers("classifier")
    model = plain.use_delta(delta_of(plain.unwrap(), 1))
    export_bundle(model, tmp_path / "bundle", (1.0, 0.7), "onnx", images=exported_models.images(3))
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    factors = sum(4 * value.numel() for value in model.delta.tensors.values())
    assert (tmp_path / "bundle" / "weights.bin").stat().st_size < 1.2 * parameters + factors


# ---- compiled graphs


def test_compiled_budgets_follow_the_delta_and_leave_the_model() -> None:
    model, images = small(), exported_models.images(2)
    merged = {name: value.clone() for name, value in model.unwrap().state_dict().items()}
    fast = CompiledBudgets(model, backend="eager")
    fast.prepare(BUDGETS, images)
    for budget in (*BUDGETS, 1.0, 0.6, 0.85):
        torch.testing.assert_close(fast(images, budget), small(budget)(images), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, merged[name]) for name, value in model.unwrap().state_dict().items())


def test_compiled_budgets_run_in_several_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    images, fast = exported_models.images(2), CompiledBudgets(small(), backend="eager")
    fast.prepare(BUDGETS, images)
    expected = {budget: small(budget)(images) for budget in BUDGETS}
    budgets = [*BUDGETS] * 5

    def run(budget: float) -> torch.Tensor:
        with torch.no_grad():
            return fast(images, budget)

    with ThreadPoolExecutor(4) as pool:
        for budget, found in zip(budgets, pool.map(run, budgets), strict=True):
            torch.testing.assert_close(found, expected[budget], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_model_follows_its_budget() -> None:
    """Weights change in place, so a compiled graph of the same budget stays valid."""
    model, images = small(), exported_models.images(2)
    compiled = torch.compile(model, backend="eager")
    for budget in (0.7, 1.0, 0.7):
        model.set_budget(budget)
        torch.testing.assert_close(compiled(images), small(budget)(images), rtol=1e-5, atol=1e-5)


def test_cached_exports_of_other_budgets_are_of_one_delta() -> None:
    """Two adapters of one backbone and one scorer differ only by the delta, which the name of an entry covers."""
    model = small()
    other = copy.deepcopy(model)
    other.use_delta(replace(other.delta, tensors={name: -2 * value for name, value in other.delta.tensors.items()}))
    settings = model.settings.replace(budget=0.6)
    names = {_key(variant(each, settings).eval(), "") for each in (model, other)}
    assert len(names) == 2
