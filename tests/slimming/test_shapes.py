"""Families of shapes: start block and drop points follow the budget, and every contract holds at each budget."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from costs import SIZES, vit_cost
from families import built, fresh, photos
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_close, masked
from slim_models import VARIANTS, assert_some_dropped, far_apart
from test_counting import WITHIN, measured

import patchlife
from patchlife import LifeConfig, Shape, SlimModel, flops, wrap
from patchlife.errors import ConfigError
from patchlife.slimming.regressor import LifeRegressor, LifeRegressors
from patchlife.slimming.schedule import solve
from patchlife.slimming.shapes import default_shapes, layout_of, learned_starts

FAMILY = (Shape(0.62, (1, 2, 4), 0.5), Shape(0.78, (2, 3), 1.5), Shape(1.0, (3,)))
BUDGETS = {0.5: 1, 0.7: 2, 0.9: 3}
"""A budget of each shape, with its start block."""
FEW = ("vit", "siglip", "dinov3")


def family_model(name: str, variant: str = "fixed, merge", learned: bool = False, **values: Any) -> SlimModel:
    """A small model with `FAMILY`; adaptive mode is calibrated."""
    config = LifeConfig(**{"budget": 0.7, "shapes": FAMILY, **VARIANTS[variant], **values})
    vit = built(name)
    dim, prefix = wrap(vit).backbone.dim, wrap(vit).backbone.prefix
    model = wrap(vit, config, LifeRegressors(dim, prefix, (1, 2, 3)).eval() if learned else None)
    return model.calibrate([photos(name, 8, seed=1)]) if config.mode == "adaptive" else model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FEW)
def test_runs_of_a_family_equal_the_reference_at_each_start(name: str, variant: str) -> None:
    model, images = family_model(name, variant), photos(name)
    for budget, start in BUDGETS.items():
        model.set_budget(budget)
        assert model.start == start
        lives = model.lives(images)
        assert_some_dropped(lives, variant)
        logits, features = masked(model, images, lives)
        assert far_apart(logits, model.backbone.model(images))
        assert_close(model(images), logits)
        assert_close(model.forward_features(images), features)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", FEW)
def test_budget_one_is_the_backbone(name: str, learned: bool) -> None:
    model, images = family_model(name, learned=learned), photos(name)
    for budget in BUDGETS:
        model.set_budget(budget)(images)
    torch.testing.assert_close(model.set_budget(1.0)(images), built(name)(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_stated_flops_of_a_family_equal_executed_ones(variant: str, learned: bool) -> None:
    model, images = family_model("vit", variant, learned), photos("vit", 2)
    for budget in BUDGETS:
        model.set_budget(budget)
        spent = sum(model.flops_of(model.lives(images)))
        assert spent == pytest.approx(measured(model, images), rel=WITHIN)
        if model.settings.mode == "fixed":
            assert 0.97 * budget <= flops(model).budget <= budget


@pytest.mark.parametrize("merge", [False, True])
def test_adaptive_mode_meets_its_budget_at_each_start(merge: bool) -> None:
    images = photos("vit", 32, seed=1)
    model = wrap(built("vit"), LifeConfig(mode="adaptive", merge=merge, shapes=FAMILY)).calibrate([images])
    assert {start for _, start in model.calibrations} == {1, 2, 3}
    for budget in BUDGETS:
        spent = sum(model.set_budget(budget).flops_of(model.lives(images))) / len(images) / model.dense_flops
        assert spent == pytest.approx(budget, rel=0.02)


def test_thresholds_of_one_start_do_not_serve_another() -> None:
    model = family_model("vit", "adaptive")
    model.calibrations = {key: found for key, found in model.calibrations.items() if key[1] == 2}
    assert model.set_budget(0.7).calibration is not None
    assert model.set_budget(0.5).calibration is None
    with pytest.raises(ConfigError, match="no thresholds"):
        model(photos("vit"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_do_not_depend_on_the_batch(variant: str) -> None:
    model, images = family_model("vit", variant), photos("vit", 3)
    for budget in BUDGETS:
        model.set_budget(budget)
        assert_close(model(images), torch.cat([model(image[None]) for image in images]))


def same_at_every_budget(model: SlimModel, other: SlimModel) -> None:
    """Both give the same logits at each budget, to the bit."""
    assert other.shapes == model.shapes
    for budget in (*BUDGETS, 1.0):
        assert torch.equal(model.set_budget(budget)(photos("vit")), other.set_budget(budget)(photos("vit")))
        assert (model.start, model.drops) == (other.start, other.drops)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("variant", ["fixed, merge", "adaptive, merge"])
def test_a_family_survives_copies_state_dicts_and_adapters(tmp_path: Any, variant: str, learned: bool) -> None:
    model = family_model("vit", variant, learned)
    same_at_every_budget(model, copy.deepcopy(model))
    loaded = wrap(fresh("vit"), None, copy.deepcopy(model.scorer))
    loaded.load_state_dict(model.state_dict())
    same_at_every_budget(model, loaded)
    manifest = json.loads((patchlife.save(model, tmp_path / "adapter") / "adapter.json").read_text())
    assert manifest["format"] == 5, "versions that do not know shapes must refuse it"
    same_at_every_budget(model, patchlife.load(tmp_path / "adapter", built("vit")))


def test_a_state_dict_from_before_families_keeps_its_start_and_drops() -> None:
    model = wrap(built("vit"), LifeConfig(budget=0.7, mode="adaptive", start=2, drops=(2, 4)))
    model.calibrate([photos("vit", 8)])
    old = json.loads(bytes(model.get_extra_state().tolist()).decode())
    old["config"] = {k: v for k, v in old.pop("full").items() if k not in ("start", "drops")}
    old |= {"start": 2, "drops": [2, 4]}
    for found in old["calibrations"]:
        del found["start"]
    other = wrap(built("vit"))
    other.set_extra_state(torch.frombuffer(bytearray(json.dumps(old).encode()), dtype=torch.uint8))
    assert torch.equal(other(photos("vit")), model(photos("vit")))
    assert other.set_budget(0.6).drops == (2, 4)


def test_a_refused_family_or_budget_has_no_effect() -> None:
    model = family_model("vit")
    before = model.settings, model.start, model.schedule(), model(photos("vit")).tolist()
    for changes in ({"budget": 0.05}, {"shapes": (Shape(1.0, (5,)),)}, {"start": 5}):
        with pytest.raises(ConfigError), model.temporarily(**changes):
            pass
    assert (model.settings, model.start, model.schedule(), model(photos("vit")).tolist()) == before
    with model.temporarily(shapes=(Shape(1.0, (1, 3)),)):
        assert (model.start, model.drops) == (1, (1, 3))
    assert model.start == 2


def test_one_start_and_its_drops_are_one_shape_for_all_budgets() -> None:
    """As before there were families: the same plan at every budget."""
    model = wrap(built("vit"), LifeConfig(start=2, drops=(2, 4), shapes=FAMILY))
    assert (model.shapes, model.starts) == ((Shape(1.0, (2, 4)),), (2,))
    for budget in (0.6, 0.8, 1.0):
        assert model.set_budget(budget).schedule() == solve(model.cost(), budget, 2, (2, 4))
    assert wrap(built("vit"), LifeConfig(start=2)).drops == (2,)
    assert wrap(built("vit"), LifeConfig(start=1)).drops == (1, 2)


def test_an_explicit_schedule_has_the_latest_start_that_it_allows() -> None:
    assert family_model("vit", kept=(36, 20, 20, 9, 9)).start == 1
    assert family_model("vit", kept=(36, 36, 20, 9, 9)).start == 2
    assert family_model("vit", kept=(36, 36, 36, 36, 9)).start == 3
    with pytest.raises(ConfigError, match=r"before start \(block 2\)"):
        family_model("vit", kept=(36, 20, 20, 9, 9), shapes=FAMILY[1:])


def test_images_of_different_sizes_run_from_the_start_of_the_budget() -> None:
    config = LifeConfig(shapes=FAMILY)
    model = wrap(built("dynamic"), config)
    images = [photos("dynamic", 1)[0], torch.nn.functional.interpolate(photos("dynamic", 1), (64, 48))[0]]
    for budget in BUDGETS:
        model.set_budget(budget)
        assert_close(model(images), torch.cat([model(image[None]) for image in images]))


# ---- defaults


@given(st.integers(2, 48), st.booleans(), st.sets(st.integers(1, 47), max_size=4))
def test_default_families_are_valid_at_any_depth(depth: int, learned: bool, fitted: set[int]) -> None:
    starts = tuple(sorted(start for start in fitted if start < depth)) or None
    family = default_shapes(depth, learned, starts)
    assert all(1 <= block < depth for shape in family for block in shape.drops)
    assert all(a < b for shape in family for a, b in pairwise(shape.drops))
    assert [shape.budget for shape in family] == sorted({shape.budget for shape in family})
    if learned:
        assert {shape.start for shape in family} <= set(starts or {max(1, depth // 4)})
    layout_of(depth, LifeConfig(budget=0.3), learned, starts if learned else None)


def test_defaults_of_twelve_blocks_are_the_measured_ones() -> None:
    rule = [(s.budget, s.drops, s.power) for s in default_shapes(12)]
    assert rule[:2] == [(0.375, (1, 3, 5, 7), 1.0), (0.65, (3, 5, 8), 0.5)]
    assert rule[2:] == [(0.75, (3, 6), 1.0), (1.0, (3, 6), 0.5)]
    assert [s.drops for s in default_shapes(12, True)] == [(3, 5, 8), (3, 6)]
    assert learned_starts(12) == (2, 3)
    assert [s.drops for s in default_shapes(12, True, (2, 3))] == [(2, 4, 6), (3, 6), (3, 6)]


@settings(max_examples=30)
@given(
    st.sampled_from(sorted(SIZES)), st.floats(0.2, 0.999), st.sets(st.integers(1, 11), min_size=1), st.floats(0.2, 4)
)
def test_a_solved_shape_keeps_powers_of_a_rate(size: str, budget: float, blocks: set[int], power: float) -> None:
    cost, drops = vit_cost(**SIZES[size]), tuple(sorted(blocks))
    try:
        schedule = solve(cost, budget, drops[0], drops, power)
    except ConfigError:
        return
    assert 0.97 * budget <= cost.total(schedule.kept) / cost.dense <= budget * (1 + 1e-12)
    stages = [schedule.kept[block] for block in drops]
    assert all(b <= a for a, b in pairwise(stages))

    def at_rate(rate: float) -> list[int]:
        return [max(1, int(cost.patches * rate ** (1 + k * power))) for k in range(len(drops))]

    def spent(numbers: list[int]) -> float:
        per_block = [[cost.patches, *numbers][sum(drop <= block for drop in drops)] for block in range(cost.depth)]
        return cost.total(per_block) / cost.dense

    largest = max((rate / 200 for rate in range(201) if spent(at_rate(rate / 200)) <= budget), default=0.0)
    assert all(kept >= least for kept, least in zip(stages, at_rate(largest), strict=True))


# ---- scorers and refusals


def test_a_learned_scorer_runs_only_from_the_starts_that_it_was_fitted_for() -> None:
    scorer = LifeRegressors(48, 1, (2, 3))
    with pytest.raises(ConfigError, match=r"fitted for the start blocks 2, 3, got .* starts at 1"):
        wrap(built("vit"), LifeConfig(shapes=FAMILY), scorer)
    with pytest.raises(ConfigError, match=r"start blocks 2, 3, got start block 1"):
        scorer.at(1)
    with pytest.raises(ConfigError, match=r"starts at 4"):
        wrap(built("vit"), LifeConfig(start=4, budget=0.95), scorer)
    model = wrap(built("vit"), LifeConfig(budget=0.9), scorer)
    assert set(model.starts) <= {2, 3}
    with pytest.raises(ConfigError, match="whole number"):
        LifeRegressors(48, 1, (2.5,))
    with pytest.raises(ConfigError, match="from 1 on"):
        LifeRegressors(48, 1, ())


def test_each_start_has_its_own_scorer() -> None:
    torch.manual_seed(0)
    scorer = LifeRegressors(48, 1, (1, 2)).eval()
    single = LifeRegressor(48, 1).eval()
    single.load_state_dict(scorer.at(2).state_dict())
    shapes = (Shape(0.7, (1, 3)), Shape(1.0, (2, 4)))
    model = wrap(built("vit"), LifeConfig(budget=0.8, shapes=shapes), scorer)
    alone = wrap(built("vit"), LifeConfig(budget=0.8, start=2, drops=(2, 4)), single)
    assert torch.equal(model(photos("vit")), alone(photos("vit")))
    assert model.set_budget(0.6).plan(photos("vit")).schedule.start == 1


def test_a_single_learned_scorer_has_one_start_by_default() -> None:
    model = wrap(built("vit"), LifeConfig(budget=0.9), LifeRegressor(48, 1))
    assert model.starts == (1,)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ((), r"last one must be 1, got \[\]"),
        ((Shape(0.5, (1,)),), r"last one must be 1, got \[0\.5\]"),
        ((Shape(1.0, (1,)), Shape(1.0, (2,))), "budgets of shapes must rise"),
        (({"budget": 1.0},), "class Shape"),
        (({"budget": 1.0, "drops": [1], "rate": 3},), r"unknown values \['rate'\]"),
    ],
)
def test_invalid_families_are_refused(shapes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LifeConfig(shapes=shapes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.5, (2, 2)), "rising blocks"),
        ((0.5, (0, 2)), "rising blocks from 1"),
        ((0.5, ()), "rising blocks"),
        ((0.5, (1,), 0), "power .* above 0, got 0"),
        ((0.5, (1,), float("nan")), "power .* got nan"),
        ((1.5, (1,)), "budget of a shape"),
    ],
)
def test_invalid_shapes_are_refused(values: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Shape(*values)


def test_a_family_survives_a_round_trip_through_json() -> None:
    config = LifeConfig(shapes=FAMILY)
    assert LifeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
