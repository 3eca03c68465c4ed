"""The shared ViT-Tiny as a model of transformers gives the answers of timm's on real photos, and takes its adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from converted import output, real_vit
from torch import Tensor

import patchlife
from patchlife import LifeConfig, SlimModel
from patchlife.data import Preprocess, list_photos, load_batches
from patchlife.data.labels import imagenet_labels

pytestmark = pytest.mark.shared

BUDGETS = (1.0, 0.61, 0.45)
MODES = ("fixed", "adaptive")
ADAPTERS = Path(__file__).parents[2] / "recipes/vit_tiny"


@pytest.fixture(scope="module")
def models(shared: Path) -> tuple[Any, Any]:
    """(timm's, transformers')."""
    return real_vit(shared)


def photos_of(shared: Path, step: int) -> list[Path]:
    return list_photos(shared / "data/in20/val")[::step]


def read(paths: list[Path]) -> list[Tensor]:
    preprocess = Preprocess(size=(224, 224), crop_fraction=0.9, mean=(0.5,) * 3, std=(0.5,) * 3)
    return [batch.images for batch in load_batches(paths, preprocess, 32)]


@pytest.fixture(scope="module")
def few(shared: Path) -> list[Tensor]:
    """A batch of 20 photos, one of each class."""
    return read(photos_of(shared, 50))


def answers(model: SlimModel, batches: list[Tensor]) -> dict[tuple[str, float], Tensor]:
    """Logits by mode and budget; a budget of 1.0 drops nothing in both modes, so it is run in one."""
    found = {}
    for mode in MODES:
        for budget in BUDGETS:
            if (mode, budget) != ("adaptive", 1.0):
                model.set_mode(mode).set_budget(budget)
                found[mode, budget] = torch.cat([model.output(batch) for batch in batches])
    return found


def assert_same_answers(
    one: SlimModel, other: SlimModel, batches: list[Tensor], labels: list[int] | None = None
) -> None:
    """Logits equal to 1e-4 on 99.9 % of the photos: rounding may order two patches of equal score differently."""
    expected, got = answers(one, batches), answers(other, batches)
    for setting, logits in expected.items():
        error = (logits - got[setting]).abs().amax(dim=1)
        assert (error <= 1e-4).float().mean() >= 0.999, (setting, error.max())
        same = logits.argmax(dim=1) == got[setting].argmax(dim=1)
        assert same.float().mean() >= 0.999, setting
        if labels:
            correct = [(side.argmax(dim=1) == torch.tensor(labels)).sum() for side in (logits, got[setting])]
            assert abs(correct[0] - correct[1]) <= len(labels) // 1000, setting
    assert len(expected) == 5


def test_the_model_gives_timms_answers(models: tuple[Any, Any], few: list[Tensor]) -> None:
    vit, model = models
    torch.testing.assert_close(output(model, few[0]), output(vit, few[0]), rtol=0, atol=1e-4)
    one, other = (patchlife.wrap(side, LifeConfig()).calibrate(few) for side in models)
    assert_same_answers(one, other, few)
    assert type(other(few[0][:2])) is type(model(few[0][:2]))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_photos_have_timms_answers(models: tuple[Any, Any], shared: Path) -> None:
    paths = photos_of(shared, 1)
    batches = read(paths)
    one, other = (patchlife.wrap(side, LifeConfig()).calibrate(batches[::4]) for side in models)
    assert sum(map(len, batches)) == 1000
    assert_same_answers(one, other, batches, imagenet_labels().classes_of(paths))


@pytest.mark.parametrize("adapter", [pytest.param("head", marks=pytest.mark.slow), "adapter"])
def test_a_committed_adapter_that_was_fitted_on_timm_loads(
    models: tuple[Any, Any], few: list[Tensor], adapter: str
) -> None:
    one, other = (patchlife.load(ADAPTERS / adapter, side) for side in models)
    assert (other.delta is None) == (adapter == "head")
    assert_same_answers(one, other, few[:1])


def test_what_transformers_saves_loads_on_timm(models: tuple[Any, Any], few: list[Tensor], tmp_path: Path) -> None:
    vit, model = models
    fitted = patchlife.load(ADAPTERS / "adapter", model)
    fitted.unwrap().classifier.bias.add_(torch.linspace(-1, 1, 1000))  # trained by other code
    patchlife.save(fitted, tmp_path / "adapter")
    assert_same_answers(fitted, patchlife.load(tmp_path / "adapter", vit), few[:1])


def test_an_adapter_of_the_classifier_is_not_of_the_model_without_it(shared: Path) -> None:
    """`num_classes=0` leaves out the classifier in both libraries."""
    vit, model = real_vit(shared, classes=0)
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(output(model, images), output(vit, images), rtol=0, atol=1e-4)
    for side in (vit, model):
        with pytest.raises(patchlife.PatchLifeError, match=r"head\.weight is missing"):
            patchlife.load(ADAPTERS / "head", side)
