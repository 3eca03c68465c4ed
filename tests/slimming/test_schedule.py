"""Schedules: from budgets to whole patches, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
import timm
from costs import SIZES, vit_cost
from hypothesis import given
from hypothesis import strategies as st

from patchlife import LifeConfig, wrap
from patchlife.errors import ConfigError
from patchlife.slimming import Cost, Schedule
from patchlife.slimming.schedule import resolve_drops, solve

BUDGETS = [b / 100 for b in range(25, 100, 3)] + [0.995, 0.999]


def drop_choices(depth: int) -> list[tuple[int, ...]]:
    quarter, half = depth // 4, depth // 2
    return [
        (quarter,),
        (1,),
        (depth - 1,),
        (quarter, half),
        (quarter, half, 3 * depth // 4),
        (1, depth - 1),
        tuple(range(quarter, depth)),
        tuple(range(1, depth)),
    ]


@pytest.mark.parametrize("drops", range(8))
@pytest.mark.parametrize("size", SIZES)
def test_a_schedule_costs_nearly_the_budget_and_not_more(size: str, drops: int) -> None:
    cost = vit_cost(**SIZES[size])
    points = drop_choices(cost.depth)[drops]
    floor = cost.total([cost.patches] * points[0] + [1] * (cost.depth - points[0])) / cost.dense
    reachable = [b for b in BUDGETS if b >= floor]
    assert reachable, "no budget is within reach, so nothing was tested"
    for budget in reachable:
        schedule = solve(cost, budget, points[0], points)
        spent = cost.total(schedule.kept) / cost.dense
        assert 0.97 * budget <= spent <= budget, (budget, str(schedule))
        assert set(schedule.drops) <= set(points)
        assert schedule.drops, "a budget below 1 must drop patches"
        assert schedule.kept[-1] >= 1


@pytest.mark.parametrize("size", SIZES)
def test_a_budget_out_of_reach_is_refused_with_the_lowest_budget(size: str) -> None:
    cost = vit_cost(**SIZES[size])
    half = cost.depth // 2
    floor = cost.total([cost.patches] * half + [1] * (cost.depth - half)) / cost.dense
    assert floor > 0.5
    with pytest.raises(ConfigError, match=rf"budget 0\.4 is out of reach: .* block {half} .* {floor:.3f} "):
        solve(cost, 0.4, half, (half,))
    assert solve(cost, floor + 1e-6, half, (half,)).kept[-1] == 1


def test_a_larger_budget_never_keeps_fewer_patches() -> None:
    cost = vit_cost(**SIZES["deit_small_patch16_224"])
    last = [solve(cost, b, 3, (3, 6)).kept for b in BUDGETS[8:]]
    assert all(x[6] <= y[6] and x[3] <= y[3] + 1 for x, y in pairwise(last))


def test_the_cost_by_arithmetic_equals_the_cost_of_a_model() -> None:
    """Otherwise the tests above would use a cost that no model has."""
    for name in ("vit_tiny_patch16_224", "vit_small_patch14_dinov2"):
        for mode in ("fixed", "adaptive"):
            assert wrap(timm.create_model(name), LifeConfig(mode=mode)).cost() == vit_cost(**SIZES[name])


COSTS = st.builds(
    lambda patches, prefix, depth, dim, outer, scorer, merge: Cost(
        patches, prefix, outer * dim**2, scorer * dim**2, ((24 * dim**2, 4 * dim),) * depth, merge * dim
    ),
    st.integers(4, 400),
    st.integers(0, 9),
    st.integers(2, 16),
    st.sampled_from([48, 192, 768]),
    st.integers(0, 400),
    st.integers(0, 40),
    st.integers(0, 4),
)


@given(COSTS, st.floats(0.05, 1.0), st.data())
def test_any_solved_schedule_is_valid_and_within_the_budget(cost: Cost, budget: float, data: st.DataObject) -> None:
    blocks = st.integers(1, cost.depth - 1)
    drops = tuple(sorted(data.draw(st.sets(blocks, min_size=1))))
    start = data.draw(st.integers(1, drops[0]))
    try:
        schedule = solve(cost, budget, start, drops)
    except ConfigError:
        assert cost.total([cost.patches] * drops[0] + [1] * (cost.depth - drops[0])) > budget * cost.dense
        return
    counts = schedule.kept
    assert len(counts) == cost.depth
    assert counts[: drops[0]] == (cost.patches,) * drops[0]
    assert all(1 <= b <= a for a, b in pairwise(counts))
    assert set(schedule.drops) <= set(drops)
    assert cost.total(counts) <= budget * cost.dense * (1 + 1e-12)
    if budget < 1:  # one more patch from the last drop point on would exceed the budget
        more = tuple(min(n + 1, counts[drops[-1] - 1]) if i >= drops[-1] else n for i, n in enumerate(counts))
        assert more == counts or more[-1] == cost.patches or cost.total(more) > budget * cost.dense


@pytest.mark.parametrize(
    ("depth", "start", "drops", "resolved"),
    [
        (12, None, None, (3, (3, 6))),
        (24, None, None, (6, (6, 12))),
        (12, 6, None, (6, (6,))),
        (12, 9, None, (9, (9,))),
        (12, None, (4, 8), (4, (4, 8))),
        (12, 2, (4, 8), (2, (4, 8))),
        (4, None, None, (1, (1, 2))),
        (2, None, None, (1, (1,))),
        (5, 1, (), (1, (1, 2))),
    ],
)
def test_defaults_of_start_and_drops(
    depth: int, start: int | None, drops: tuple[int, ...] | None, resolved: tuple
) -> None:
    assert resolve_drops(depth, start, drops) == resolved


@pytest.mark.parametrize(
    ("start", "drops", "message"),
    [
        (0, None, r"start .* 1 to 11 .*12 blocks.* got 0"),
        (12, None, r"start .* 1 to 11 .* got 12"),
        (-1, None, r"start .* 1 to 11 .* got -1"),
        (None, (0, 3), r"start .* 1 to 11 .* got 0"),
        (3, (6, 6), r"drops .* 3 \(start\) to 11, got \(6, 6\)"),
        (3, (6, 4), r"drops .* 3 \(start\) to 11, got \(6, 4\)"),
        (3, (2, 6), r"drops .* 3 \(start\) to 11, got \(2, 6\)"),
        (3, (6, 12), r"drops .* 3 \(start\) to 11, got \(6, 12\)"),
    ],
)
def test_invalid_start_or_drop_points_are_refused(
    start: int | None, drops: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_drops(12, start, drops)


@pytest.mark.parametrize(
    ("counts", "start", "message"),
    [
        ((9, 9, 4, 5), 2, r"kept .* increase .* got \(9, 9, 4, 5\)"),
        ((9, 9, 4, 0), 2, r"at least one patch .* got \(9, 9, 4, 0\)"),
        ((9, 4, 4, 4), 2, r"before start \(block 2\), got \(9, 4, 4, 4\)"),
        ((9, 9, 4, 4), 4, "start .* 0 to 3, got 4"),
    ],
)
def test_invalid_schedules_are_refused(counts: tuple[int, ...], start: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(counts, start)


def test_a_schedule_gives_its_drop_points_and_a_short_text() -> None:
    schedule = Schedule((196, 196, 196, 96, 96, 43), 3)
    assert schedule.drops == (3, 5)
    assert str(schedule) == "196 x 3, 96 x 2, 43 x 1"
    assert Schedule((9, 9, 9), 1).drops == ()
