"""A fit for several start blocks: a scorer for each, one set of weights for all budgets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import built
from made_targets import PREPROCESS, QUICK, some_photos

import patchlife
from patchlife import LifeConfig, Shape, wrap
from patchlife.config import TrainingConfig
from patchlife.errors import ConfigError
from patchlife.slimming.regressor import LifeRegressor, LifeRegressors
from patchlife.training.fit import Fitted, accelerator_for, fit
from patchlife.training.initial_model import initial_model
from patchlife.training.targets import compute_targets

FAMILY = (Shape(0.75, (1, 3), 0.5), Shape(1.0, (2, 3)))
LIFE = LifeConfig(budget=0.7, shapes=FAMILY)
STAGE2 = replace(QUICK, finetune="adapter", batch_size=6)


def fitted_in(folder: Path, config: TrainingConfig, life: LifeConfig = LIFE) -> Fitted:
    photos = some_photos(folder / "photos", 24)
    return fit(wrap(built("vit"), life), photos, PREPROCESS, folder / "out", config, accelerator_for("cpu"))


@pytest.mark.parametrize("views", ["fresh", "cached"])
def test_a_fit_trains_a_scorer_for_each_start_and_later_blocks_only(tmp_path: Path, views: str) -> None:
    model = fitted_in(tmp_path, replace(STAGE2, views=views, token_weight=0.5)).model
    assert isinstance(model.scorer, LifeRegressors)
    assert model.scorer.starts == model.starts == (1, 2)
    untrained = LifeRegressors(48, 1, (1, 2)).at(1).norm.bias
    for start in model.starts:
        assert not torch.equal(model.scorer.at(start).norm.bias, untrained)
    assert {start for _, start in model.calibrations} == {1, 2}
    changed = {name.split(".")[1] for name in model.delta.tensors if name.startswith("blocks.")}
    assert changed == {"2", "3", "4"}, "blocks before the last start block stay the dense model's"
    images = torch.randn(3, 3, 48, 48)
    loaded = patchlife.load(tmp_path / "out", built("vit"))
    with torch.no_grad():
        for budget, start in ((0.65, 1), (0.9, 2)):
            for mode in ("fixed", "adaptive"):
                for one in (model, loaded):
                    one.set_mode(mode).set_budget(budget)
                assert loaded.start == start
                torch.testing.assert_close(loaded(images), model(images))
        torch.testing.assert_close(loaded.set_budget(1.0)(images), built("vit")(images), rtol=0, atol=1e-5)


def test_an_interrupted_fit_of_several_starts_resumes(tmp_path: Path) -> None:
    first = fitted_in(tmp_path, STAGE2).model.state_dict()
    again = fitted_in(tmp_path, STAGE2).model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())


@torch.no_grad()
def test_targets_of_several_starts_are_those_of_each() -> None:
    backbone, images = wrap(built("vit"), LIFE).backbone, torch.randn(2, 3, 48, 48)
    together = compute_targets(backbone, images, (1, 2), patches=True, image_tokens=True)
    for start in (1, 2):
        alone = compute_targets(backbone, images, start, patches=True, image_tokens=True)
        for name, expected in alone._asdict().items():
            torch.testing.assert_close(getattr(together.at_start(start, (1, 2)), name), expected)


def initial(life: LifeConfig, config: TrainingConfig = QUICK, scorer: object = None, dense: bool = False):
    return initial_model(wrap(built("vit"), life, scorer), config, PREPROCESS, dense)


def test_the_scorer_of_a_fit_has_the_starts_of_the_settings() -> None:
    assert isinstance(initial(LifeConfig(budget=0.7, start=2))[0].scorer, LifeRegressor)
    assert initial(LIFE)[0].scorer.starts == (1, 2)
    asked, _ = initial(LifeConfig(budget=0.9), replace(QUICK, starts=(3,)))
    assert (asked.scorer.starts, asked.starts) == ((3,), (3,))
    assert isinstance(initial(LifeConfig(budget=0.7), dense=True)[0].scorer, LifeRegressor)
    again, _ = initial(LIFE, scorer=asked.scorer.__class__(48, 1, (1, 2)))
    assert again.scorer.starts == (1, 2)


def test_the_lowest_budget_is_lower_with_several_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(STAGE2, lowest_budget=None)
    with pytest.raises(ConfigError, match=r"budget 0\.35 is out of reach"):
        initial(LIFE, config)  # as deep as this model is, neither default can be reached
    monkeypatch.setattr("patchlife.training.initial_model.LOWEST_BUDGET", 0.6)
    assert initial(LIFE, config)[1].lowest_budget == 0.6
    monkeypatch.setattr("patchlife.training.initial_model._LOWEST_OF_SEVERAL_STARTS", 0.5)
    assert initial(LIFE, config)[1].lowest_budget == 0.5
    assert initial(LifeConfig(budget=0.7, start=2), config)[1].lowest_budget == 0.6
    assert initial(LIFE, replace(config, lowest_budget=0.5))[1].lowest_budget == 0.5


def test_what_several_starts_do_not_go_with_is_refused() -> None:
    with pytest.raises(ConfigError, match="dense prediction has one start block"):
        initial(LIFE, dense=True)
    with pytest.raises(ConfigError, match=r"one start block, got a schedule with 1, 2"):
        initial(LIFE, scorer=LifeRegressor(48, 1))
    with pytest.raises(ConfigError, match=r"epochs=0 .* no scorer for the start blocks \(2, 3\)"):
        initial(LifeConfig(budget=0.9), replace(QUICK, epochs=0, starts=(2, 3)), LifeRegressor(48, 1))


def test_blocks_before_a_start_that_no_schedule_uses_are_not_trained(tmp_path: Path) -> None:
    model = fitted_in(tmp_path, replace(STAGE2, starts=(1, 2, 3))).model
    assert (model.starts, model.scorer.starts) == ((1, 2), (1, 2, 3))
    assert {name.split(".")[1] for name in model.delta.tensors if name.startswith("blocks.")} == {"3", "4"}


def test_a_start_block_that_the_model_does_not_have_is_refused() -> None:
    config = TrainingConfig(starts=(1, 40))
    with pytest.raises(ConfigError, match=r"starts must be blocks from 1 to 4 .*got 1, 40"):
        initial_model(wrap(built("vit"), LifeConfig(0.7)), config, PREPROCESS)


def test_a_lowest_budget_out_of_reach_names_its_setting() -> None:
    with pytest.raises(ConfigError, match=r"lowest_budget of stage 2, now 0\.6, must be larger: budget 0\.6 is out"):
        initial_model(wrap(built("vit"), LifeConfig(0.9, start=3)), STAGE2, PREPROCESS)
