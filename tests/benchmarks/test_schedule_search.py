"""Advice follows the measured times, and never sells a slow-down."""

from __future__ import annotations

import pytest
from families import built, photos

from patchlife import LifeConfig, SlimModel, wrap
from patchlife.backbones import adapt
from patchlife.benchmarks.schedule_search import BlockTimes, advise, candidates, fastest, verdict
from patchlife.evaluation.timing import Spread
from patchlife.slimming.regressor import LifeRegressor

SCHEDULES = {
    "default": {"start": 3, "drops": [3, 6], "patches": ""},
    "fastest": {"start": 4, "drops": [4], "patches": ""},
}


def around(value: float) -> Spread:
    return Spread(value, 0.98 * value, 1.02 * value)


def test_times_are_interpolated_and_follow_the_blocks() -> None:
    times = BlockTimes(adapt(built("vit")), {36: 4.0, 18: 2.0, 4: 1.0})
    assert times.block(1, 27) == pytest.approx(3.0)
    assert times.block(1, 2) == pytest.approx(1.0)  # below what was measured nothing gets faster


def test_a_staircase_is_used() -> None:
    """A device that is fast up to 18 patches and slow above: one drop to 17 beats two that stay above for a block."""
    bb = adapt(built("vit"))
    times = BlockTimes(bb, {36: 10.0, 19: 9.9, 18: 1.0, 1: 0.9})
    model = SlimModel(bb, LifeConfig(budget=0.62)).eval()
    first, second, *_ = fastest(times, model, 0.62)
    assert first == (1, (1,)), "an early single drop lets most blocks run on 18 or fewer"
    assert second != first


def test_a_learned_head_keeps_its_start() -> None:
    bb = adapt(built("vit"))
    times = BlockTimes(bb, {36: 10.0, 1: 0.9})
    head = LifeRegressor(bb.dim, bb.prefix, 8, 4)
    model = SlimModel(bb, LifeConfig(budget=0.8, start=2), head).eval()
    found = fastest(times, model, 0.8)
    assert len(found) > 1
    assert {start for start, _ in found} == {2}


def test_candidates_start_at_a_quarter_of_the_depth() -> None:
    found = list(candidates(12))
    assert min(start for start, _ in found) == 3
    assert (3, (3, 6)) in found
    assert all(drops[0] == start for start, drops in found)


def test_slimming_that_does_not_pay_is_refused() -> None:
    text, pays = verdict({"default": around(0.9), "fastest": around(1.0)}, SCHEDULES)
    assert not pays
    assert "does not pay" in text
    assert "stay with the dense model" in text


def test_the_default_is_kept_unless_something_is_clearly_faster() -> None:
    text, pays = verdict({"default": around(1.5), "fastest": around(1.52)}, SCHEDULES)
    assert pays
    assert text.startswith("the default schedule (start 3, drops 3, 6): 1.50x")
    text, _ = verdict({"default": around(1.5), "fastest": around(1.7)}, SCHEDULES)
    assert text.startswith("start 4, drops 4: 1.70x")
    assert "the default schedule reaches 1.50x" in text


def test_noise_gives_no_advice() -> None:
    text, pays = verdict({"default": Spread(1.5, 0.8, 2.0)}, SCHEDULES)
    assert "too noisy" in text
    assert not pays


@pytest.mark.parametrize("name", ["vit", "dinov3"])
def test_on_a_real_model(name: str) -> None:
    found = advise(wrap(built(name)), photos(name, 2), 0.65, few=2)
    assert found["verdict"]
    assert "default" in found["ratios"]
    assert set(found["ratios"]) <= {"default", "fastest", "second"}
    assert all(schedule["flops"] <= 0.65 for schedule in found["schedules"].values())
    assert len(found["block_ms"]) == 7
