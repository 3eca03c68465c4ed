"""The learned head: coverage as it is defined, and everything the method promises also with this head."""

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
from patchlife.slimming.similarity import Similarity


def slowly(importance: Tensor, embedding: Tensor) -> Tensor:
    """Coverage gains of one image, patch by patch."""
    similarity = (embedding @ embedding.T).clamp(min=0)
    spoken_for, gains = torch.zeros_like(importance), torch.zeros_like(importance)
    for patch in importance.argsort(descending=True).tolist():
        better = torch.maximum(spoken_for, similarity[patch])
        gains[patch] = (importance * (better - spoken_for)).sum()
        spoken_for = better
    return gains


def test_coverage_is_what_a_patch_adds() -> None:
    importance = torch.rand(3, 20).softmax(dim=1)
    embedding = F.normalize(torch.randn(3, 20, 6), dim=2)
    gains, similarity = coverage_gain(importance, embedding)
    torch.testing.assert_close(
        gains, torch.stack([slowly(*image) for image in zip(importance, embedding, strict=True)])
    )
    assert (gains.sum(dim=1) <= 1 + 1e-5).all()
    order = torch.rand(3, 20).argsort(dim=1)
    everybody = slice(None)
    said, right = (x.ordered(order).between(everybody, everybody) for x in (similarity, Similarity.of(embedding)))
    torch.testing.assert_close(said, right)


def test_a_double_adds_nothing() -> None:
    embedding = F.normalize(torch.randn(1, 5, 4), dim=2)
    embedding[0, 3] = embedding[0, 1]
    gains, _ = coverage_gain(torch.tensor([[0.1, 0.4, 0.2, 0.3, 0.0]]), embedding)
    assert gains[0, 3].abs() < 1e-6 < gains[0, 1]


@pytest.mark.parametrize("ranks", [1, 2, 7, 36])
def test_running_max_is_the_same_where_it_is_exported(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    x = torch.randn(2, 3, ranks)
    eager = running_max(x)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert torch.equal(running_max(x), eager)


def learned(name: str, mode: str, **settings) -> SlimModel:
    vit = built(name)
    torch.manual_seed(0)
    head = LifeRegressor(vit.embed_dim, vit.num_prefix_tokens, width=16, embedding_dim=8)
    model = wrap(vit, LifeConfig(**{"budget": 0.65, "start": START, "mode": mode, **settings}), head)
    return model.calibrate([photos(name, 8, seed=1)])


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
@pytest.mark.parametrize("name", FEW)
def test_exact_with_the_learned_head(name: str, mode: str, merge: bool) -> None:
    model, images = learned(name, mode, merge=merge), photos(name)
    lives = model.lives(images)
    assert (lives.kept[:, -1] < lives.kept[:, 0]).any()
    logits, features = masked(model, images, lives, model.plan(images))
    assert_close(model(images), logits)
    assert_close(model.forward_features(images), features)


@pytest.mark.parametrize("name", FEW)
def test_identity_with_the_learned_head(name: str) -> None:
    assert_close(learned(name, "fixed", budget=1.0)(photos(name)), built(name)(photos(name)))


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_images_do_not_depend_on_each_other(mode: str) -> None:
    model, images = learned("vit", mode), photos("vit")
    assert_close(model(images[1:2]), model(images)[1:2])


def test_heirs_follow_the_learned_kinship() -> None:
    model, images = learned("vit", "fixed", kept=(36, 36, 12, 12, 12)), photos("vit", 1)
    plan = model.plan(images)
    embedded = model.backbone.embed(images)
    tokens = model.before_start(embedded)
    embedding = model.scorer.regress(tokens)[1][0][plan.order[0]]
    assert torch.equal(plan.merge_targets.rank[0, 12:], (embedding[12:] @ embedding[:12].T).argmax(dim=1))


def test_its_adapter_comes_back(tmp_path: Path) -> None:
    model, images = learned("vit", "adaptive"), photos("vit")
    loaded = patchlife.load(patchlife.save(model, tmp_path / "adapter"), built("vit"))
    assert isinstance(loaded.scorer, LifeRegressor)
    assert torch.equal(loaded(images), model(images))
