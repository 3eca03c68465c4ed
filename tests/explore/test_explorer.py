"""The numbers of the page are those of the model, for every kind of model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from patchlife.config import LifeConfig, ModelConfig
from patchlife.data import list_photos
from patchlife.errors import ConfigError, ImageError
from patchlife.explore import Explorer, Merges, curve_of
from patchlife.explore.folder import budgets_of
from patchlife.runtime.demo_model import DEMO, demo_folder
from patchlife.runtime.inference import predict_photos
from patchlife.runtime.opening import open_pipeline

PHOTOS = list_photos(demo_folder() / "photos")


@pytest.fixture(scope="module")
def explorer() -> Explorer:
    return Explorer(open_pipeline(ModelConfig(DEMO), device="cpu"), PHOTOS)


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
@pytest.mark.parametrize("budget", [1.0, 0.6, 0.35])
def test_a_view_is_what_predict_says(explorer: Explorer, budget: float, mode) -> None:
    view = explorer.view(explorer.open(PHOTOS[7]), budget, mode)
    pipeline = explorer.pipeline
    pipeline.model.set_mode(mode).set_budget(budget)
    (expected,) = predict_photos(pipeline, PHOTOS[7:8])
    torch.testing.assert_close(view.answer.output, expected.probabilities, rtol=0, atol=1e-6)
    assert torch.equal(view.lives.life, expected.lives.life)
    assert (view.answer.flops, view.dense_flops) == (expected.flops, expected.dense_flops)
    assert view.dense is not None
    assert view.dense.seconds > 0 < view.answer.seconds
    pipeline.model.set_mode("fixed").set_budget(1.0)
    (dense,) = predict_photos(pipeline, PHOTOS[7:8])
    torch.testing.assert_close(view.dense.output, dense.probabilities, rtol=0, atol=1e-6)
    assert view.divergence == pytest.approx(0, abs=1e-6) if budget == 1.0 else view.divergence > 0


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_each_dropped_patch_is_merged_into_one_that_stays_longer(explorer: Explorer, mode) -> None:
    view = explorer.view(explorer.open(PHOTOS[31]), 0.45, mode)
    life = view.lives.life[0].tolist()
    dropped = {patch for patch, own in enumerate(life) if own < view.lives.depth}
    assert set(view.merges.target) == dropped == set(view.merges.weight)
    for patch in dropped:
        path = view.merges.path(patch)
        assert [life[p] for p in path] == sorted({life[p] for p in path}), "each target lives longer than its source"
        assert life[path[-1]] == view.lives.depth
        assert 0 <= view.merges.weight[patch] <= 1


def test_the_first_run_of_a_size_is_not_timed(monkeypatch) -> None:
    monkeypatch.setattr("patchlife.explore.explorer._ROUNDS", 1)
    explorer = Explorer(open_pipeline(ModelConfig(DEMO), device="cpu"))
    runs: list[int] = []
    explorer.pipeline.model.backbone.model.patch_embed.register_forward_hook(lambda *_: runs.append(len(runs)))
    photo = explorer.open(PHOTOS[0])
    explorer.view(photo, 0.6)
    first = len(runs)
    explorer.view(photo, 0.6)
    assert first - (len(runs) - first) == 2  # the dense and the slimmed model, once each


def test_merges_without_merging_are_empty() -> None:
    pipeline = open_pipeline(ModelConfig(DEMO, life={"merge": False}), device="cpu")
    view = Explorer(pipeline).view(Explorer(pipeline).open(PHOTOS[0]), 0.5)
    assert view.merges == Merges({}, {})


def test_a_photo_that_cannot_be_read_is_an_error_that_names_it(explorer: Explorer, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    with pytest.raises(ImageError, match=r"bad\.jpg"):
        explorer.open(tmp_path / "bad.jpg")


def test_adaptive_mode_without_thresholds_needs_photos() -> None:
    pipeline = open_pipeline(ModelConfig("vit_tiny_patch16_224", image_size=64), device="cpu", random_weights=True)
    bare = Explorer(pipeline)
    assert not bare.can_adapt
    photo = bare.open(PHOTOS[0])
    with pytest.raises(ConfigError, match="needs thresholds"):
        bare.view(photo, 0.6, "adaptive")
    given = Explorer(pipeline, PHOTOS[:8])
    assert given.can_adapt
    assert given.view(photo, 0.6, "adaptive").lives.kept[0, 0] == 16


def test_a_model_without_a_classifier_is_compared_by_its_embedding() -> None:
    config = ModelConfig("vit_tiny_patch16_224", image_size=64, model_args={"num_classes": 0})
    explorer = Explorer(open_pipeline(config, device="cpu", random_weights=True))
    view = explorer.view(explorer.open(PHOTOS[0]), 1.0)
    assert view.dense is not None
    torch.testing.assert_close(view.answer.output, view.dense.output, rtol=0, atol=1e-5)
    found = curve_of(explorer, PHOTOS[:4])
    assert found.measure == "cosine to dense"
    assert found.values[1.0] == pytest.approx(1, abs=1e-5)
    assert all(value < 1 for budget, value in found.values.items() if budget < 0.9)


# ---- a folder


def test_the_curve_is_top1_by_budget_and_names_the_photos_that_change(explorer: Explorer) -> None:
    told = []
    found = curve_of(explorer, PHOTOS, limit=30, progress=lambda done, total: told.append((done, total)))
    assert (found.measure, found.photos, found.unread) == ("top-1", 30, [])
    assert told[-1] == (30, 30)
    assert list(found.values) == budgets_of(explorer)
    assert found.values[1.0] == found.dense
    assert abs(found.divergences[1.0]) < 1e-6 < found.divergences[0.45]
    assert [change.budget for change in found.changes] == sorted((c.budget for c in found.changes), reverse=True)
    for change in found.changes:
        assert change.before != change.after
        pipeline = explorer.pipeline
        pipeline.model.set_mode("fixed").set_budget(change.budget)
        (prediction,) = predict_photos(pipeline, [change.photo])
        assert pipeline.labels.names[int(prediction.probabilities.argmax())] == change.after


def test_unlabelled_photos_give_agreement_and_broken_ones_are_named(explorer: Explorer, tmp_path: Path) -> None:
    for index in range(5):
        Image.effect_mandelbrot((64, 64), (-2 + index / 9, -1, 1, 1), 60).convert("RGB").save(tmp_path / f"{index}.png")
    (tmp_path / "bad.png").write_bytes(b"no")
    found = curve_of(explorer, list_photos(tmp_path))
    assert (found.measure, found.dense, found.photos) == ("same answer as dense", None, 5)
    assert found.values[1.0] == 1
    assert len(found.unread) == 1
    assert "bad.png" in found.unread[0]
    with pytest.raises(ConfigError, match="none of the photos can be read"):
        curve_of(explorer, [tmp_path / "bad.png"])


def test_budgets_out_of_reach_are_left_out() -> None:
    life = {"budget": 0.9, "start": 8, "drops": (8,)}
    late = Explorer(open_pipeline(ModelConfig(DEMO, life=life), device="cpu"))
    assert 1.0 in budgets_of(late)
    assert 0.3 not in budgets_of(late)
    assert late.slim.settings.replace(budget=0.9) == LifeConfig(budget=0.9, start=8, drops=(8,)), "nothing was changed"
    with pytest.raises(ConfigError, match="budget"):
        late.view(late.open(PHOTOS[0]), 0.3)


@pytest.mark.slow
def test_an_exported_bundle_has_its_own_budgets_and_no_dense_model(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from patchlife.cli.main import main
    from patchlife.runtime.exported import open_exported

    out = tmp_path / "bundle"
    assert main(["export", DEMO, "--format", "onnx", "--budgets", "0.5,0.8", "--out", str(out)]) == 0
    explorer = Explorer(open_exported(ModelConfig(str(out), life={"budget": 0.8})), PHOTOS, [0.8, 0.5])
    photo = explorer.open(PHOTOS[3])
    kept = {}
    for budget in (0.8, 0.5):
        view = explorer.view(photo, budget)
        assert view.dense is None
        assert math.isnan(view.divergence)
        assert view.answer.flops / view.dense_flops == pytest.approx(budget, abs=0.02)
        kept[budget] = int(view.lives.kept[0, -1])
    assert kept[0.5] < kept[0.8]
    assert not explorer.can_adapt
    found = curve_of(explorer, PHOTOS, limit=10)
    assert list(found.values) == [0.8, 0.5]
    assert (found.measure, found.divergences, found.dense) == ("top-1", {}, None)
