"""Settings accept numbers of numpy and torch and rounding errors, and store plain Python numbers."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from patchlife import LifeConfig
from patchlife.config import BenchConfig, EvalConfig, ExportConfig, ModelConfig
from patchlife.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (1.0000000000000002, 1.0),
        (1 + 9e-7, 1.0),
        (1 - 9e-7, 1.0),
        (1, 1.0),
        (np.arange(0.5, 1.05, 0.1)[-1], 1.0),
        (np.float64(0.6), 0.6),
        (np.float32(0.6), 0.6),
        (np.float32(1.0000001), 1.0),
        (np.float16(0.5), 0.5),
        (np.int64(1), 1.0),
        (np.array(0.6), 0.6),
        (torch.tensor(0.6), 0.6),
        (torch.tensor(0.6, dtype=torch.float64), 0.6),
        (torch.tensor(1), 1.0),
        (1 / 3, 1 / 3),
        (0.99999, 0.99999),
    ],
)
def test_a_budget_is_stored_as_a_plain_float(given: Any, stored: float) -> None:
    for config in (LifeConfig(budget=given), LifeConfig().replace(budget=given)):
        assert type(config.budget) is float
        assert config == LifeConfig(budget=stored)
        assert hash(config) == hash(LifeConfig(budget=stored))
        assert LifeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (1.00001, r"budget must be in \(0, 1\], got 1\.00001$"),
        (1.5, r"got 1\.5$"),
        (1.9999999, r"got 1\.9999999$"),
        (2, r"got 2; did you mean 0\.02\?"),
        (60.0, r"got 60; did you mean 0\.6\?"),
        (100, r"got 100; did you mean 1\?"),
        (np.float32(60), r"got 60; did you mean 0\.6\?"),
        (101, r"got 101$"),
        (-1e-9, r"got -1e-09$"),
        (10**400, r"budget must be in \(0, 1\], got 1000"),
        (np.float64("nan"), r"budget must be a number in \(0, 1\], got nan"),
        (np.bool_(True), "got True"),
        (torch.tensor(True), "got True"),
        (np.str_("0.6"), r"got .*'0\.6'"),
        (np.array([0.6]), "got array"),
        (torch.tensor([0.5, 0.6]), "got tensor"),
        (1j, "got 1j"),
        (Fraction(1, 2), "got Fraction"),
        (None, "got None"),
    ],
)
def test_an_invalid_budget_is_refused_and_shown_with_all_digits(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LifeConfig(budget=given)


@pytest.mark.parametrize("given", [1, 0.9999999, 1 - 1e-7, np.float32(1), np.int32(1), torch.tensor(1.0)])
def test_a_speedup_of_one_is_the_dense_model(given: Any) -> None:
    assert LifeConfig(speedup=given) == LifeConfig(budget=1.0)


@pytest.mark.parametrize("given", [0.99, 0, -2, "2", True, np.bool_(True), [2], math.nan, math.inf])
def test_an_invalid_speedup_is_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"speedup must be at least 1, got .*; 1.6 means 1.6 times fewer FLOPs"):
        LifeConfig(speedup=given)


def test_a_speedup_of_numpy() -> None:
    assert LifeConfig(speedup=np.float32(1.6)) == LifeConfig(speedup=1.6)


@pytest.mark.parametrize("sequence", [list, tuple, np.array, torch.tensor, lambda values: map(np.int64, values)])
def test_blocks_and_counts_of_numpy_and_torch(sequence: Any) -> None:
    config = LifeConfig(start=np.int64(2), drops=sequence([2, 4]), kept=sequence([9, 9, 4, 4, 1]))
    assert config == LifeConfig(start=2, drops=(2, 4), kept=(9, 9, 4, 4, 1))
    assert {type(n) for n in (config.start, *config.drops, *config.kept)} == {int}
    assert LifeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 2.5}, "start must be a whole number, got 2.5"),
        ({"start": True}, "start must be a whole number, got True"),
        ({"start": "2"}, "start must be a whole number, got '2'"),
        ({"drops": (2, 3.7)}, "drops must be a whole number, got 3.7"),
        ({"drops": (2, np.bool_(True))}, "drops must be a whole number, got True"),
        ({"drops": 3}, r"drops must be several whole numbers, such as \(3, 6\), got 3"),
        ({"drops": np.int64(3)}, "drops must be several whole numbers, .* got 3"),
        ({"drops": np.array(3)}, "drops must be several whole numbers, .* got 3"),
        ({"drops": "36"}, "drops must be several whole numbers, .* got '36'"),
        ({"kept": np.ones((2, 2), int)}, "kept must be several whole numbers"),
        ({"merge": "no"}, "merge must be True or False, got 'no'"),
        ({"merge": 1}, "merge must be True or False, got 1"),
        ({"restore": "first"}, "restore must be one of last, target, residual, got 'first'"),
    ],
)
def test_invalid_blocks_counts_and_switches_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LifeConfig(**settings)


def test_without_merging_dropped_patches_keep_their_last_state() -> None:
    assert LifeConfig(restore="target").restore_by == "target"
    assert LifeConfig(restore="target", merge=False).restore_by == "last"
    assert LifeConfig(restore="target", merge=False).replace(merge=True).restore_by == "target"


def test_settings_stored_before_restore_was_one_use_the_default() -> None:
    stored = LifeConfig(restore="last").to_dict()
    assert LifeConfig.from_dict(stored).restore == "last"
    del stored["restore"]
    assert LifeConfig.from_dict(stored).restore == LifeConfig().restore


def test_a_switch_of_numpy() -> None:
    assert LifeConfig(merge=np.bool_(False)) == LifeConfig(merge=False)


def test_lists_of_budgets_are_checked_like_a_budget(tmp_path) -> None:
    budgets, model = (*np.arange(0.5, 1.05, 0.25), 1.0000000000000002), ModelConfig("demo")
    for stored in (
        EvalConfig(model, tmp_path, budgets=budgets).budgets,
        ExportConfig(model, budgets=budgets).budgets,
        BenchConfig("demo", flops=budgets).flops,
    ):
        assert stored == (0.5, 0.75, 1.0, 1.0)
        assert {type(budget) for budget in stored} == {float}
    with pytest.raises(ConfigError, match=r"budgets must be in \(0, 1\], got 1\.5$"):
        EvalConfig(model, tmp_path, budgets=(1.5,))
    with pytest.raises(ConfigError, match=r"budgets must be in \(0, 1\], got 45; did you mean 0\.45\?"):
        ExportConfig(model, budgets=(45,))
    with pytest.raises(ConfigError, match=r"flops must be in \(0, 1\], got 60; did you mean 0\.6\?"):
        BenchConfig("demo", flops=(60,))


def test_a_model_config_stores_plain_settings() -> None:
    given = {"budget": 1.0000005, "drops": np.array([3, 6]), "merge": np.bool_(False)}
    assert ModelConfig("demo", life=given).life == {"budget": 1.0, "drops": (3, 6), "merge": False}
    assert ModelConfig("demo", life={"speedup": 2}).life == {"speedup": 2}
    assert ModelConfig("demo", image_size=np.int64(96)).image_size == 96
    with pytest.raises(ConfigError, match=r"image_size must be a whole number, got 9\.5"):
        ModelConfig("demo", image_size=9.5)


def test_the_command_line_accepts_rounding_errors(capsys) -> None:
    from patchlife.cli.main import main

    for option, value in [("--budget", "1.0000000000000002"), ("--speedup", "0.9999999")]:
        assert main(["info", "demo", option, value, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["settings"]["budget"] == 1.0
