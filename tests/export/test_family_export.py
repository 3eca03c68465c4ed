"""A family of shapes in exported files and compiled graphs: budgets of one model with different start blocks."""

from __future__ import annotations

from pathlib import Path

import exported_models
import pytest
import torch

from patchlife import Shape, SlimModel
from patchlife.export import export_bundle
from patchlife.runtime import CompiledBudgets, open_engine
from patchlife.slimming.regressor import LifeRegressors

FAMILY = (Shape(0.75, (1, 2), 0.5), Shape(1.0, (2,)))
BUDGETS = {0.6: 1, 0.9: 2, 1.0: 2}


def family_model(learned: bool) -> SlimModel:
    model = exported_models.small(learned=False, start=None, drops=None, shapes=FAMILY)
    if learned:
        torch.manual_seed(0)
        model.scorer = LifeRegressors(24, 1, (1, 2), 16, 8)
    return model.eval()


@pytest.mark.parametrize(("kind", "learned"), [("onnx", True), pytest.param("openvino", False, marks=pytest.mark.slow)])
def test_a_bundle_holds_budgets_with_different_starts(tmp_path: Path, kind: str, learned: bool) -> None:
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}[kind])
    model, images = family_model(learned), exported_models.images(9)
    exported = export_bundle(model, tmp_path / "bundle", tuple(BUDGETS), kind, images=images)
    assert {metadata.budget: metadata.start for metadata in exported.graphs_metadata} == BUDGETS
    for budget in BUDGETS:
        logits, lives = open_engine(tmp_path / "bundle", budget=budget).predict(images)
        expected, expected_lives = model.set_budget(budget).predict(images)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(lives.life, expected_lives.life)


@pytest.mark.parametrize("learned", [False, True])
def test_compiled_budgets_have_their_own_starts(learned: bool) -> None:
    model, images = family_model(learned), exported_models.images(3)
    fast = CompiledBudgets(model, backend="eager")
    for budget in (*BUDGETS, *reversed(BUDGETS)):
        found = fast(images, budget)
        torch.testing.assert_close(found, model.set_budget(budget)(images), rtol=1e-4, atol=1e-4)
