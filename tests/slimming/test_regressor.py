"""The life regressor: coverage gains by their definition; exactness, identity and saving with this scorer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import FEW, START, built, photos
from reference import assert_close, masked
from torch import Tensor

import patchlife
from patchlife import LifeConfig, SlimModel, wrap
from patchlife.slimming.coverage import coverage_gain, running_max
from patchlife.slimming.regressor import LifeRegressor


def slow_gain(importance: Tensor, embedding: Tensor) -> Tensor:
    """Coverage gains of one image, patch by patch."""
    similarity = (embedding @ embedding.T).clamp(min=0)
    covered, gains = torch.zeros_like(importance), torch.zeros_like(importance)
    for patch in importance.argsort(descending=True).tolist():
        with_patch = torch.maximum(covered, similarity[patch])
        gains[patch] = (importance * (with_patch - covered)).sum()
        covered = with_patch
    return gains


def test_coverage_gain_equals_its_definition() -> None:
    importance = torch.rand(3, 20).softmax(dim=1)
    embedding = F.normalize(torch.randn(3, 20, 6), dim=2)
    gains = coverage_gain(importance, embedding)
    expected = torch.stack([slow_gain(*image) for image in zip(importance, embedding, strict=True)])
    torch.testing.assert_close(gains, expected)
    assert (gains.sum(dim=1) <= 1 + 1e-5).all()


def test_a_patch_equal_to_a_more_important_one_gains_nothing() -> None:
    embedding = F.normalize(torch.randn(1, 5, 4), dim=2)
    embedding[0, 3] = embedding[0, 1]
    gains = coverage_gain(torch.tensor([[0.1, 0.4, 0.2, 0.3, 0.0]]), embedding)
    assert gains[0, 3].abs() < 1e-6 < gains[0, 1]


@pytest.mark.parametrize("ranks", [1, 2, 7, 36])
def test_running_max_is_the_same_in_an_export(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    x = torch.randn(2, 3, ranks)
    eager = running_max(x)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert torch.equal(running_max(x), eager)


def with_regressor(name: str, mode: str, **settings) -> SlimModel:
    """A family's small model with an untrained life regressor, calibrated."""
    vit = built(name)
    torch.manual_seed(0)
    scorer = LifeRegressor(vit.embed_dim, vit.num_prefix_tokens, width=16, embedding_dim=8)
    model = wrap(vit, LifeConfig(**{"budget": 0.65, "start": START, "mode": mode, **settings}), scorer)
    return model.calibrate([photos(name, 8, seed=1)])


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
@pytest.mark.parametrize("name", FEW)
def test_runs_with_the_life_regressor_equal_the_reference(name: str, mode: str, merge: bool) -> None:
    model, images = with_regressor(name, mode, merge=merge), photos(name)
    lives = model.lives(images)
    assert (lives.kept[:, -1] < lives.kept[:, 0]).any()
    logits, features = masked(model, images, lives, model.plan(images))
    assert_close(model(images), logits)
    assert_close(model.forward_features(images), features)


@pytest.mark.parametrize("name", FEW)
def test_budget_one_with_the_life_regressor_equals_the_backbone(name: str) -> None:
    assert_close(with_regressor(name, "fixed", budget=1.0)(photos(name)), built(name)(photos(name)))


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_images_do_not_depend_on_each_other(mode: str) -> None:
    model, images = with_regressor("vit", mode), photos("vit")
    assert_close(model(images[1:2]), model(images)[1:2])


def test_merge_targets_follow_the_learned_similarity() -> None:
    model, images = with_regressor("vit", "fixed", kept=(36, 36, 12, 12, 12)), photos("vit", 1)
    plan = model.plan(images)
    embedded = model.backbone.embed(images)
    tokens = model.before_start(embedded)
    embedding = model.scorer.regress(tokens)[1][0][plan.order[0]]
    assert torch.equal(plan.merge_targets.rank[0, 12:], (embedding[12:] @ embedding[:12].T).argmax(dim=1))


def test_a_loaded_adapter_equals_the_saved_model(tmp_path: Path) -> None:
    model, images = with_regressor("vit", "adaptive"), photos("vit")
    loaded = patchlife.load(patchlife.save(model, tmp_path / "adapter"), built("vit"))
    assert isinstance(loaded.scorer, LifeRegressor)
    assert torch.equal(loaded(images), model(images))
