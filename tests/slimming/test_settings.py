"""Settings: what is refused and how it is said, changing them at run time, and that a refusal changes nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import FEW, START, built, photos
from slimmed import WAYS, far_apart, slim
from torch import Tensor

from patchlife import LifeConfig, SlimModel, wrap
from patchlife.errors import ConfigError, NumericalError, PatchLifeError
from patchlife.slimming import Calibration


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 60}, r"budget must be in \(0, 1\], got 60; did you mean 0\.6\?"),
        ({"budget": 45.5}, r"got 45\.5; did you mean 0\.455\?"),
        ({"budget": 0}, r"budget must be in \(0, 1\], got 0$"),
        ({"budget": -0.5}, r"budget must be in \(0, 1\], got -0\.5$"),
        ({"budget": 600}, r"budget must be in \(0, 1\], got 600$"),
        ({"budget": math.nan}, r"budget must be a number in \(0, 1\], got nan"),
        ({"budget": math.inf}, r"budget must be a number in \(0, 1\], got inf"),
        ({"budget": "0.6"}, r"budget must be a number in \(0, 1\], got '0\.6'"),
        ({"budget": True}, r"budget must be a number in \(0, 1\], got True"),
        ({"speedup": 0.5}, "speedup must be at least 1, got 0.5; 1.6 means 1.6 times fewer FLOPs"),
        ({"speedup": math.nan}, "speedup must be at least 1, got nan"),
        ({"mode": "adaptiv"}, "mode must be one of fixed, adaptive, got 'adaptiv'"),
    ],
)
def test_a_config_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        LifeConfig(**settings)
    assert isinstance(caught.value, (PatchLifeError, ValueError))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 5}, r"start must be a block from 1 to 4 \(the model has 5 blocks\), got 5"),
        ({"start": 3, "drops": (2,)}, r"drops must rise and lie in blocks 3 \(start\) to 4, got \(2,\)"),
        ({"drops": (2, 2)}, "drops must rise"),
        ({"kept": (36, 36, 9)}, r"kept must be 5 numbers that begin with 36, got 3: \(36, 36, 9\)"),
        ({"kept": (30, 30, 9, 9, 9)}, "kept must be 5 numbers that begin with 36"),
        ({"start": 2, "kept": (36, 36, 9, 10, 9)}, "kept must not grow"),
        ({"start": 2, "kept": (36, 36, 9, 9, 0)}, "at least one patch must be kept"),
        ({"start": 3, "kept": (36, 36, 9, 9, 9)}, r"no patch may be missing before start \(block 3\)"),
        ({"budget": 0.1}, r"budget 0\.1 is out of reach: .* choose a larger budget or an earlier start"),
        ({"budget": 0.5, "start": 4}, "out of reach: with all patches but one dropped at block 4"),
    ],
)
def test_a_config_that_does_not_fit_the_model(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrap(built("vit"), LifeConfig(**settings))


def test_speedup_is_one_over_the_budget() -> None:
    assert LifeConfig(speedup=1.6).budget == pytest.approx(0.625)
    assert LifeConfig(speedup=1.6) == LifeConfig(budget=0.625)
    assert LifeConfig(speedup=1).budget == 1
    assert LifeConfig(budget=0.5).replace(speedup=1.25).budget == 0.8


def test_a_new_budget_ends_an_explicit_schedule() -> None:
    model = slim("vit", kept=(36, 36, 9, 9, 9))
    assert model.schedule().kept == (36, 36, 9, 9, 9)
    assert model.set_budget(0.65).schedule() == slim("vit", budget=0.65).schedule()


def test_a_config_outlives_json() -> None:
    config = LifeConfig(budget=0.7, mode="adaptive", drops=(2, 4), kept=(36, 36, 9, 9, 9), merge=False)
    assert LifeConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match=r"unknown settings \['until'\]"):
        LifeConfig.from_dict({"until": 3})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["vit", "siglip", "dinov3"])
def test_budgets_change_at_run_time_and_back(name: str, way: str) -> None:
    """At every budget the logits are bit for bit those of a model wrapped for it."""
    model, images = slim(name, way, budget=0.9), photos(name)
    seen = []
    for budget in (0.65, 0.8, 1.0, 0.65, 0.9):
        seen.append(model.set_budget(budget)(images))
        assert torch.equal(seen[-1], slim(name, way, budget=budget)(images))
    assert torch.equal(seen[0], seen[3])
    assert far_apart(seen[0], seen[1])


@pytest.mark.parametrize("name", FEW)
def test_modes_change_at_run_time_and_back(name: str) -> None:
    model, images = slim(name, "adaptive"), photos(name)
    adaptive = model(images)
    fixed = model.set_mode("fixed")(images)
    assert torch.equal(fixed, slim(name, "fixed")(images))
    assert far_apart(fixed, adaptive)
    assert torch.equal(model.set_mode("adaptive")(images), adaptive)


def everything(model: SlimModel, images: Tensor) -> tuple:
    """What must be the same after a refused change."""
    settings = model.config, model.schedule(), model.start, model.drops, id(model.calibration)
    return *settings, model(images).tolist()


def refuse(model: SlimModel, change: str, value: Any, error: type[Exception], message: str) -> None:
    before = everything(model, photos("vit"))
    with pytest.raises(error, match=message):
        getattr(model, change)(value)
    assert everything(model, photos("vit")) == before


@pytest.mark.parametrize("way", WAYS)
def test_a_refused_change_changes_nothing(way: str) -> None:
    model = slim("vit", way)
    refuse(model, "set_budget", 0.05, ConfigError, "out of reach")
    refuse(model, "set_budget", 60, ConfigError, "did you mean")
    refuse(model, "set_mode", "Fixed", ConfigError, "mode must be one of")
    refuse(model, "calibrate", [], ConfigError, "at least one image, got none")
    refuse(model, "calibrate", [photos("vit") * torch.nan], NumericalError, "scores that are not finite")
    refuse(model, "calibrate", [photos("vit")[:, :1]], ConfigError, "3 channel")


@pytest.mark.parametrize("merge", [False, True])
def test_a_calibration_that_puts_the_budget_out_of_reach_is_refused_whole(merge: bool) -> None:
    """One image keeps everything and the others one patch each: dearer on average than an even share."""
    model = wrap(built("vit"), LifeConfig(mode="adaptive", budget=0.999, start=START, merge=merge))
    model.calibrate([photos("vit", 8)])
    floor = model.cost().total([36, 36, 1, 1, 1]) / model.cost().dense
    model.set_budget(floor + 1e-4)
    score = torch.zeros(8, 36) + torch.rand(8, 36) * 1e-3
    score[0] += 5
    message = "out of reach: the calibration images keep so unequal numbers of patches"
    refuse(model, "use_calibration", Calibration.of(score), ConfigError, message)


def test_an_uncalibrated_model_says_what_to_call() -> None:
    """Taking the first batch instead would make every later answer depend on it."""
    model = wrap(built("vit"), LifeConfig(mode="adaptive", budget=0.65, start=START))
    for ask in (model, model.predict, model.lives, model.forward_features):
        with pytest.raises(ConfigError, match=r"no thresholds for images of 48 x 48 .*model\.calibrate\(batches\)"):
            ask(photos("vit"))
    assert model.calibration is None
    model.calibrate([photos("vit")])
    assert model(photos("vit")).shape == (3, 10)


def test_settings_for_a_while() -> None:
    model = slim("vit", kept=(36, 36, 20, 20, 12))
    before = model.config
    with model.temporarily(budget=0.8) as same:
        assert same is model
        assert model.schedule().kept != before.kept
    assert model.config is before
    with pytest.raises(ConfigError), model.temporarily(budget=0.01):
        pass
    assert model.config is before
    assert model.schedule().kept == before.kept


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_calibrating_does_not_warn(mode: str) -> None:
    model = wrap(built("vit"), LifeConfig(mode=mode, budget=0.65, start=START))
    model.calibrate(iter([photos("vit"), photos("vit", 2)]))
    assert model.calibration.images == 5
