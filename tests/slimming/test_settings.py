"""Settings: which are refused, how they change at run time, and that a refused change has no effect."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import FEW, START, built, photos
from slim_models import VARIANTS, far_apart, slim
from torch import Tensor

from patchlife import LifeConfig, SlimModel, wrap
from patchlife.errors import ConfigError, NumericalError, PatchLifeError
from patchlife.slimming import Calibration


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 60}, r"budget .*\(0, 1\], got 60; .* 0\.6\?"),
        ({"budget": 45.5}, r"budget .* got 45\.5; .* 0\.455\?"),
        ({"budget": 0}, r"budget .*\(0, 1\], got 0$"),
        ({"budget": -0.5}, r"budget .*\(0, 1\], got -0\.5$"),
        ({"budget": 600}, r"budget .*\(0, 1\], got 600$"),
        ({"budget": math.nan}, r"budget .* number in \(0, 1\], got nan"),
        ({"budget": math.inf}, r"budget .* number in \(0, 1\], got inf"),
        ({"budget": "0.6"}, r"budget .* number in \(0, 1\], got '0\.6'"),
        ({"budget": True}, r"budget .* number in \(0, 1\], got True"),
        ({"speedup": 0.5}, "speedup .*at least 1, got 0.5"),
        ({"speedup": math.nan}, "speedup .*at least 1, got nan"),
        ({"mode": "adaptiv"}, "mode .*fixed, adaptive, got 'adaptiv'"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        LifeConfig(**settings)
    assert isinstance(caught.value, PatchLifeError), "one except clause catches all errors of patchlife"
    assert isinstance(caught.value, ValueError), "callers that do not import patchlife's errors can catch it"
    with pytest.raises(ConfigError, match=message):
        LifeConfig().replace(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 5}, r"start .* 1 to 4 .* got 5"),
        ({"start": 3, "drops": (2,)}, r"drops .* 3 \(start\) to 4, got \(2,\)"),
        ({"drops": (2, 2)}, r"drops .* got \(2, 2\)"),
        ({"kept": (36, 36, 9)}, r"kept .* 5 numbers .* 36, got 3: \(36, 36, 9\)"),
        ({"kept": (30, 30, 9, 9, 9)}, r"kept .* 5 numbers .* 36, got 5: \(30, 30, 9, 9, 9\)"),
        ({"start": 2, "kept": (36, 36, 9, 10, 9)}, r"kept .* increase.* got \(36, 36, 9, 10, 9\)"),
        ({"start": 2, "kept": (36, 36, 9, 9, 0)}, r"at least one patch .* got \(36, 36, 9, 9, 0\)"),
        ({"start": 3, "kept": (36, 36, 9, 9, 9)}, r"before start \(block 3\), got \(36, 36, 9, 9, 9\)"),
        ({"budget": 0.1}, r"budget 0\.1 is out of reach: .* larger budget or an earlier start"),
        ({"budget": 0.5, "start": 4}, r"budget 0\.5 is out of reach: .* block 4"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrap(built("vit"), LifeConfig(**settings))


def test_speedup_is_one_over_the_budget() -> None:
    assert LifeConfig(speedup=1.6).budget == pytest.approx(0.625)
    assert LifeConfig(speedup=1.6) == LifeConfig(budget=0.625)
    assert LifeConfig(speedup=1).budget == 1
    assert LifeConfig(budget=0.5).replace(speedup=1.25).budget == 0.8


def test_a_new_budget_replaces_an_explicit_schedule() -> None:
    model = slim("vit", kept=(36, 36, 9, 9, 9))
    assert model.schedule().kept == (36, 36, 9, 9, 9)
    assert model.set_budget(0.65).schedule() == slim("vit", budget=0.65).schedule()


def test_a_config_survives_a_round_trip_through_json() -> None:
    config = LifeConfig(budget=0.7, mode="adaptive", drops=(2, 4), kept=(36, 36, 9, 9, 9), merge=False)
    assert LifeConfig.from_dict(config.to_dict()) == config
    config = LifeConfig(restore="residual")
    assert LifeConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match=r"\['until'\]"):
        LifeConfig.from_dict({"until": 3})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["vit", "siglip", "dinov3"])
def test_budgets_change_at_run_time_and_back(name: str, variant: str) -> None:
    """At every budget the logits equal those of a model that was wrapped with it, to the bit."""
    model, images = slim(name, variant, budget=0.9), photos(name)
    logits = []
    for budget in (0.65, 0.8, 1.0, 0.65, 0.9):
        logits.append(model.set_budget(budget)(images))
        assert torch.equal(logits[-1], slim(name, variant, budget=budget)(images))
    assert torch.equal(logits[0], logits[3])
    assert far_apart(logits[0], logits[1])


@pytest.mark.parametrize("name", FEW)
def test_modes_change_at_run_time_and_back(name: str) -> None:
    model, images = slim(name, "adaptive"), photos(name)
    adaptive = model(images)
    fixed = model.set_mode("fixed")(images)
    assert torch.equal(fixed, slim(name, "fixed")(images))
    assert far_apart(fixed, adaptive)
    assert torch.equal(model.set_mode("adaptive")(images), adaptive)


def state_of(model: SlimModel, images: Tensor) -> tuple:
    """What must be the same after a refused change."""
    settings = model.settings, model.schedule(), model.start, model.drops, id(model.calibration)
    return *settings, model(images).tolist()


def assert_refused(model: SlimModel, method: str, value: Any, error: type[Exception], message: str) -> None:
    """``model.method(value)`` raises ``error`` and leaves the model as it was."""
    before = state_of(model, photos("vit"))
    with pytest.raises(error, match=message):
        getattr(model, method)(value)
    assert state_of(model, photos("vit")) == before


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_refused_change_has_no_effect(variant: str) -> None:
    model = slim("vit", variant)
    assert_refused(model, "set_budget", 0.05, ConfigError, r"budget 0\.05 is out of reach")
    assert_refused(model, "set_budget", 60, ConfigError, r"got 60; .* 0\.6")
    assert_refused(model, "set_mode", "Fixed", ConfigError, "mode .* got 'Fixed'")
    assert_refused(model, "calibrate", [], ConfigError, "got none")
    assert_refused(model, "calibrate", [photos("vit") * torch.nan], NumericalError, "not finite")
    assert_refused(model, "calibrate", [photos("vit")[:, :1]], ConfigError, "3 channel")


@pytest.mark.parametrize("merge", [False, True])
def test_a_calibration_that_puts_the_budget_out_of_reach_is_refused(merge: bool) -> None:
    """One image keeps all patches and the others one each: their mean cost is higher than at equal numbers."""
    model = wrap(built("vit"), LifeConfig(mode="adaptive", budget=0.999, start=START, merge=merge))
    model.calibrate([photos("vit", 8)])
    floor = model.cost().total([36, 36, 1, 1, 1]) / model.cost().dense
    model.set_budget(floor + 1e-4)
    score = torch.zeros(8, 36) + torch.rand(8, 36) * 1e-3
    score[0] += 5
    message = "out of reach: the calibration images differ"
    assert_refused(model, "use_calibration", Calibration.of(score), ConfigError, message)


def test_an_uncalibrated_model_does_not_run_in_adaptive_mode() -> None:
    """Calibration on the first batch instead would make the logits of all later batches depend on it."""
    model = wrap(built("vit"), LifeConfig(mode="adaptive", budget=0.65, start=START))
    for run in (model, model.predict, model.lives, model.forward_features):
        with pytest.raises(ConfigError, match=r"48 x 48 .*36 patches.*model\.calibrate\(batches\)"):
            run(photos("vit"))
    assert model.calibration is None
    model.calibrate([photos("vit")])
    assert model(photos("vit")).shape == (3, 10)


def test_temporary_settings_are_undone() -> None:
    model = slim("vit", kept=(36, 36, 20, 20, 12))
    before = model.settings
    with model.temporarily(budget=0.8) as changed:
        assert changed is model
        assert model.schedule().kept != before.kept
    assert model.settings is before
    with pytest.raises(ConfigError), model.temporarily(budget=0.01):
        pass
    assert model.settings is before
    assert model.schedule().kept == before.kept


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_calibration_accepts_an_iterator_of_batches(mode: str) -> None:
    model = wrap(built("vit"), LifeConfig(mode=mode, budget=0.65, start=START))
    model.calibrate(iter([photos("vit"), photos("vit", 2)]))
    assert model.calibration.images == 5
