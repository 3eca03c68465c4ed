"""Fits for dense prediction: features and answers come nearer to the dense model's, and bad settings are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import built
from made_targets import QUICK, some_photos
from torch import Tensor, nn

import patchlife
from patchlife import LifeConfig, SlimModel, wrap
from patchlife.data import Preprocess, read_photo
from patchlife.errors import CheckpointError, ConfigError
from patchlife.training import loop
from patchlife.training.cached_evaluation import evaluate_cached_dense
from patchlife.training.dense import DenseHead, DenseTarget, dense_target
from patchlife.training.dense_targets import compute_dense_targets
from patchlife.training.fit import Fitted, accelerator_for, fit, work_folder
from patchlife.training.stage import Step
from patchlife.training.stages import DenseDistillation, Slimming
from patchlife.training.target_cache import Photo

PREPROCESS = Preprocess(size=(32, 56), crop_fraction=1.0)  # 4 x 7 patches
LIFE = LifeConfig(budget=0.7, start=2, drops=(2, 3), restore="residual")
FEW = LifeConfig(kept=(28, 28, 8, 4, 4), start=2, restore="last")  # the hardest setting: there is much to learn
LONGER: dict[str, Any] = {"epochs": 2, "batch_size": 10, "finetune_epochs": 10, "finetune_learning_rate": 3e-3}
PIXELS = replace(QUICK, finetune="adapter", target="pixels")
FEATURES = replace(PIXELS, target="features")


class ConvHead(nn.Module):
    """Two convolutions on the maps of some blocks; answers at twice the resolution of the grid."""

    def __init__(self, blocks: int = 2, classes: int = 5, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.last = nn.Conv2d(48 * blocks, 16, 3, padding=1), nn.Conv2d(16, classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        logits = self.last(self.first(torch.cat(maps, dim=1)).relu())
        return nn.functional.interpolate(10 * logits, scale_factor=2, mode="bilinear")


def dense_head(**changes: Any) -> DenseHead:
    return DenseHead(ConvHead(**changes).eval(), (1, -1))


def model_of(name: str = "not-square", life: LifeConfig = LIFE) -> SlimModel:
    return wrap(built(name), life)


def run(
    out: Path,
    photos: list[Photo],
    config: Any = PIXELS,
    head: DenseHead | None = None,
    life: LifeConfig = LIFE,
    **more: Any,
) -> Fitted:
    head = dense_head() if head is None and config.target == "pixels" else head
    return fit(model_of(life=life), photos, PREPROCESS, out, config, accelerator_for("cpu"), head=head, **more)


def images_of(photos: list[Photo]) -> Tensor:
    return torch.stack([PREPROCESS(read_photo(photo.path)) for photo in photos])


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work_folder(out) / "metrics.jsonl").read_text().splitlines()]


def answers_of(model: Any, images: Tensor, head: DenseHead) -> Tensor:
    with torch.no_grad():
        blocks = [block % 5 for block in head.blocks]
        return head.module(model.forward_intermediates(images, blocks, norm=True, intermediates_only=True))


# ---- fits


def test_a_fit_brings_answers_of_new_photos_nearer_to_the_dense_ones(tmp_path: Path) -> None:
    photos, head = some_photos(tmp_path / "photos", 60), dense_head()
    fitted = run(
        tmp_path / "out",
        photos[:40],
        replace(PIXELS, **LONGER, patch_weight=0.3),
        head,
        FEW,
        validation={"rest": photos[40:]},
    )
    images = images_of(photos[40:])
    dense = answers_of(built("not-square"), images, head)

    def divergence(model: Any) -> float:
        logits = answers_of(model, images, head).log_softmax(dim=1)
        return (
            nn.functional.kl_div(logits, dense.log_softmax(dim=1), reduction="none", log_target=True)
            .sum(1)
            .mean()
            .item()
        )

    first, *_, last = (
        line for line in metrics(tmp_path / "out") if "validation" in line and line["stage"] != "regression"
    )
    assert last["pixel_kl"] < 0.9 * first["pixel_kl"]
    again = patchlife.load(tmp_path / "out", built("not-square"))
    torch.testing.assert_close(answers_of(again, images, head), answers_of(fitted.model, images, head))
    with fitted.model.temporarily(kept=None, budget=last["budget"]):
        same = (answers_of(fitted.model, images, head).argmax(1) == dense.argmax(1)).float().mean().item()
        # the cache norms features of the first blocks with the dense model's last norm, which training changed
        assert last["pixel_agreement"] == pytest.approx(same, abs=2e-2)
        assert last["pixel_kl"] == pytest.approx(divergence(fitted.model), rel=0.05)
    report = (work_folder(tmp_path / "out") / "report.html").read_text()
    assert all(text in report for text in ("pixels with the same answer", "Answers for every pixel", "Life maps"))


def test_a_fit_on_features_brings_them_nearer_although_the_model_has_a_classifier(tmp_path: Path) -> None:
    photos = some_photos(tmp_path / "photos", 60)
    config = replace(FEATURES, **LONGER, feature_blocks=(1, 3, -1))
    fitted = run(tmp_path / "out", photos[:40], config, life=FEW, validation={"rest": photos[40:]})
    images = images_of(photos[40:])

    def features(model: Any) -> Tensor:
        with torch.no_grad():
            maps = model.forward_intermediates(images, [3, 4], norm=True, output_fmt="NLC", intermediates_only=True)
            return torch.stack(maps, dim=2)

    dense = features(built("not-square"))
    first, *_, last = (
        line for line in metrics(tmp_path / "out") if "validation" in line and line["stage"] != "regression"
    )
    assert 1 - last["patch_cosine"] < 0.97 * (1 - first["patch_cosine"])
    assert last["pixel_agreement"] is None
    with fitted.model.temporarily(kept=None, budget=last["budget"]):
        cosine = torch.cosine_similarity(dense, features(fitted.model), dim=-1)
    assert last["patch_cosine"] == pytest.approx(cosine.mean().item(), abs=2e-3)
    assert last["low_patch_cosine"] == pytest.approx(cosine.quantile(0.05).item(), abs=1e-2)
    assert "cosine to the dense patch features" in (work_folder(tmp_path / "out") / "report.html").read_text()


def test_the_head_and_the_teacher_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchlife.training.fit.write_report", lambda *args: None)
    head = dense_head()
    run(tmp_path / "out", some_photos(tmp_path / "photos"), replace(PIXELS, finetune="full"), head)
    assert all(p.requires_grad and p.grad is None for p in head.module.parameters())
    for value, expected in zip(head.module.parameters(), dense_head().module.parameters(), strict=True):
        assert torch.equal(value, expected)
    assert not any("conv" in name or "first" in name for name in _saved(tmp_path / "out"))


def _saved(out: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(out / "adapter.safetensors", "pt") as file:
        return list(file.keys())


def test_blocks_after_the_last_distilled_one_are_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchlife.training.fit.write_report", lambda *args: None)
    config = replace(FEATURES, finetune="full", feature_blocks=(3,))
    fitted = run(tmp_path / "out", some_photos(tmp_path / "photos"), config)
    changed = {name for name in _saved(tmp_path / "out") if "blocks." in name}
    assert any("blocks.3." in name for name in changed)
    assert not any("blocks.4." in name or "blocks.1." in name for name in changed)
    assert fitted.model.delta


@pytest.mark.parametrize("stop", [2, 5])
def test_an_interrupted_fit_on_pixels_resumes_to_the_same_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    monkeypatch.setattr("patchlife.training.fit.write_report", lambda *args: None)
    photos = some_photos(tmp_path / "photos")
    run(tmp_path / "whole", photos)
    original = loop.save_checkpoint

    def save_then_interrupt(path: Path, step: int, *state: Any) -> None:
        original(path, step, *state)
        if path.name.startswith("slimming") and step == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", save_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", photos)
    monkeypatch.setattr(loop, "save_checkpoint", original)
    run(tmp_path / "parts", photos)
    whole, parts = ((tmp_path / name / "adapter.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


# ---- what a step and an evaluation compute


@pytest.mark.parametrize("restore", ["last", "target", "residual"])
@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_cached_features_are_those_of_forward_intermediates(tmp_path: Path, restore: str, mode: str) -> None:
    model = model_of(life=LIFE.replace(restore=restore))
    images, dense = images_of(some_photos(tmp_path / "photos", 6)), DenseTarget((0, 3, 4), 2)
    model.calibrate([images]).set_mode(mode)
    with torch.no_grad():
        targets = compute_dense_targets(model.backbone, images, dense)
        found = dense.slimmed(model, targets, model.backbone.embed(images[:1]))
        expected = model.forward_intermediates(images, [0, 3, 4], norm=True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(found, torch.cat(expected, dim=-1), rtol=1e-4, atol=1e-4)


def test_a_step_distils_the_features_and_answers_of_the_slimmed_model(tmp_path: Path) -> None:
    fitted = run(tmp_path / "out", some_photos(tmp_path / "photos"), replace(PIXELS, finetune="none", epochs=1))
    model, cache, head = fitted.model, fitted.cache, dense_head()
    dense = dense_target(model, PIXELS, head, PREPROCESS.size)
    assert dense is not None
    losses = DenseDistillation(cache, dense, 0.3)
    stage = Slimming(model, 0.6, 0.0, losses, PREPROCESS.size)
    targets = cache.targets([0, 1, 2])
    embedded = model.backbone.embed(model.backbone.blank())
    for draw in (0.1, 0.999999):
        budget = round(0.6 + 0.4 * draw, 3)
        with torch.no_grad():
            loss, numbers = stage(Step(targets, torch.full((3,), -1), draw))
            with model.temporarily(budget=budget):
                features = dense.slimmed(model, targets, embedded)
            by_hand, _ = losses(features[..., 48:], targets, embedded.grid)
            regression, _ = stage._regression(Step(targets, torch.full((3,), -1), draw))
        assert loss.item() == pytest.approx((by_hand + regression).item(), rel=1e-3)
    assert numbers["patch_cosine"] > 0.9999  # at budget 1 the student is the teacher
    assert numbers["pixel_divergence"] < 1e-4


def test_an_evaluation_of_the_dense_model_itself_agrees_everywhere(tmp_path: Path) -> None:
    fitted = run(tmp_path / "out", some_photos(tmp_path / "photos"), replace(PIXELS, finetune="none", epochs=1))
    dense = dense_target(fitted.model, PIXELS, dense_head(), PREPROCESS.size)
    assert dense is not None
    fitted.model.set_budget(1.0)
    embedded = fitted.model.backbone.embed(fitted.model.backbone.blank())
    score = evaluate_cached_dense(fitted.model, fitted.cache, dense, embedded)
    assert score.patch_cosine > 0.9999
    assert score.pixel_agreement is not None
    assert score.pixel_agreement > 0.99
    assert score.pixel_kl is not None
    assert score.pixel_kl < 1e-4


# ---- settings


def test_another_head_is_another_run_and_has_other_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchlife.training.fit.write_report", lambda *args: None)
    photos, cache = some_photos(tmp_path / "photos"), tmp_path / "cache"
    config = replace(PIXELS, cache=cache, finetune="none")
    first = run(tmp_path / "out", photos, config)
    with pytest.raises(CheckpointError, match="head was"):
        run(tmp_path / "out", photos, config, dense_head(seed=1))
    other = run(tmp_path / "other", photos, config, dense_head(seed=1))
    assert not torch.equal(first.cache.targets([0]).importance, other.cache.targets([0]).importance)
    with pytest.raises(CheckpointError, match="target was pixels, now features"):
        run(tmp_path / "out", photos, replace(config, target="features"))


def test_other_blocks_are_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchlife.training.fit.write_report", lambda *args: None)
    photos, config = some_photos(tmp_path / "photos"), replace(FEATURES, finetune="none")
    run(tmp_path / "out", photos, config)
    with pytest.raises(CheckpointError, match=r"feature_blocks was \[4\], now \[3, 4\]"):
        run(tmp_path / "out", photos, replace(config, feature_blocks=(3, 4)))


def test_targets_of_a_classifier_keep_their_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchlife.training.fit.write_report", lambda *args: None)
    photos, plain = some_photos(tmp_path / "photos"), replace(QUICK, cache=tmp_path / "cache")
    fitted = run(tmp_path / "out", photos, plain)
    assert fitted.cache.targets([0]).output.shape == (1, 10)
    monkeypatch.setattr("patchlife.training.caches.compute_targets", lambda *args: pytest.fail("collected again"))
    run(tmp_path / "out", photos, replace(plain, target="logits"))
    monkeypatch.undo()
    dense = run(tmp_path / "dense", photos, replace(plain, target="features"))
    assert dense.cache.targets([0]).output.shape == (1, 0)


class Fails(nn.Module):
    def forward(self, maps: list[Tensor]) -> Tensor:
        return torch.cat(maps, dim=1) @ torch.zeros(5, 5)


class Flat(nn.Module):
    def forward(self, maps: list[Tensor]) -> Tensor:
        return maps[0].flatten(2)


@pytest.mark.parametrize(
    ("changes", "head", "message"),
    [
        ({"target": "pixels"}, None, "only Python can give"),
        ({"target": "features"}, dense_head(), "a head belongs to target pixels, got target features"),
        ({"feature_blocks": (3,)}, dense_head(), "the head says which blocks it reads"),
        ({"feature_blocks": (3,)}, None, "feature_blocks belongs to target features, got target logits"),
        ({"target": "features", "feature_blocks": (2, 7)}, None, r"blocks from -5 to 4, got \[7\]"),
        ({"target": "features", "feature_blocks": (0, 1)}, None, r"from the start block 2 on, got \[0, 1\]"),
        ({"target": "features", "feature_blocks": ()}, None, "got none"),
        ({"target": "features", "token_weight": 0.5}, None, "instead of image tokens, got token_weight 0.5"),
        ({"target": "features", "label_weight": 0.5}, None, "uses no labels, got label_weight 0.5"),
        ({}, DenseHead(ConvHead().eval(), (1, 5)), r"head.blocks must be blocks from -5 to 4, got \[5\]"),
        ({}, DenseHead(ConvHead(), (1, -1)), "the head must be in eval mode"),
        ({}, DenseHead(ConvHead().eval(), (4,)), r"the head fails on a list of 1 feature map\(s\) of shape"),
        ({}, DenseHead(Fails().eval()), "the head fails"),
        ({}, DenseHead(Flat().eval()), r"got shape \(2, 48, 28\)"),
        ({}, DenseHead(ConvHead(2, 1).eval(), (1, -1)), r"at least two classes, got shape \(2, 1, 8, 14\)"),
        ({}, DenseHead(lambda maps: maps[0]), "must be a torch.nn.Module, got function"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_any_work(
    tmp_path: Path, changes: dict[str, Any], head: DenseHead | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(model_of(), [], PREPROCESS, tmp_path / "out", replace(QUICK, **changes), accelerator_for("cpu"), head=head)
    assert not work_folder(tmp_path / "out").exists()


def test_logits_of_a_model_without_a_classifier_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="target logits needs a classifier"):
        dense_target(wrap(built("no-classifier"), LIFE), replace(QUICK, target="logits"), None, (48, 48))
    with pytest.raises(ConfigError, match="target must be one of logits, features, pixels, got 'depth'"):
        replace(QUICK, target="depth")
