"""Accuracy against the dense model, on the same photos."""

from __future__ import annotations

import math

import pytest
import torch
from families import built, photos

from patchlife import LifeConfig, wrap
from patchlife.errors import ConfigError
from patchlife.evaluation.accuracy import evaluate, paired_interval

LABELS = torch.tensor([0, 1, 2, 3, 4, 5])


def test_budget_one_is_the_dense_model() -> None:
    images, vit = photos("vit", 6), built("vit")
    with torch.no_grad():
        labels = vit(images).argmax(dim=1)
    labels[:2] = (labels[:2] + 1) % 10  # four of six are right
    model = wrap(vit, LifeConfig(budget=0.7, start=2))
    whole, part = evaluate(
        model, vit, [(images[:4], labels[:4]), (images[4:], labels[4:])], [(1.0, "fixed"), (0.65, "fixed")]
    )
    assert whole.top1 == pytest.approx(4 / 6)
    assert (whole.drop, whole.drop_interval, whole.agreement) == (0, (0, 0), 1)
    assert whole.fraction == 1
    assert abs(whole.divergence) < 1e-5 < part.divergence
    assert 0.6 < part.fraction <= 0.65
    assert part.top1 <= part.top5
    assert (model.settings.budget, model.settings.mode) == (0.7, "fixed")


def test_without_a_label_of_every_photo_there_is_no_top1() -> None:
    images, vit = photos("vit", 6), built("vit")
    model, labels = wrap(vit, LifeConfig(budget=0.65, start=2)), torch.tensor([0, 1, 2, 3, -1, 5])
    batches = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    (score,), (labelled,) = (evaluate(model, vit, each, [(0.65, "fixed")]) for each in (batches, [(images, LABELS)]))
    assert (score.top1, score.top5, score.drop, score.drop_interval) == (None,) * 4
    assert (score.agreement, score.divergence) == (labelled.agreement, pytest.approx(labelled.divergence, rel=1e-3))


def test_flops_in_adaptive_mode_are_the_mean_of_the_photos() -> None:
    images, vit = photos("vit", 6), built("vit")
    model = wrap(vit, LifeConfig(start=2)).calibrate([photos("vit", 8, seed=1)])
    (score,) = evaluate(model, vit, [(images, LABELS)], [(0.7, "adaptive")])
    flops = model.set_mode("adaptive").set_budget(0.7).flops_of(model.lives(images))
    assert score.flops == pytest.approx(sum(flops) / 6)


def test_the_settings_of_the_model_are_restored() -> None:
    images, vit = photos("vit", 6), built("vit")
    config = LifeConfig(kept=(36, 36, 30, 20, 9), start=2)
    model = wrap(vit, config).calibrate([photos("vit", 8, seed=1)])
    evaluate(model, vit, [(images, LABELS)], [(0.8, "fixed"), (0.7, "adaptive")])
    assert model.settings is config
    assert model.schedule().kept == config.kept

    def broken(_: torch.Tensor) -> torch.Tensor:
        raise KeyError

    with pytest.raises(KeyError):
        evaluate(model, broken, [(images, LABELS)], [(0.8, "fixed")])
    with pytest.raises(ConfigError):
        evaluate(model, vit, [(images, LABELS)], [(0.8, "fixed"), (0.001, "fixed")])
    assert model.settings is config


def test_the_interval_is_of_paired_differences() -> None:
    before, after = torch.tensor([1, 1, 1, 0, 1, 0, 1, 1]).bool(), torch.tensor([1, 0, 1, 0, 1, 1, 0, 1]).bool()
    low, high = paired_interval(before, after)
    assert (low + high) / 2 == pytest.approx(1 / 8)
    deviation = torch.tensor([0, 1, 0, 0, 0, -1, 1, 0]).double().std().item()
    assert (high - low) / 2 == pytest.approx(1.96 * deviation / math.sqrt(8))
    assert paired_interval(before, before) == (0, 0)
