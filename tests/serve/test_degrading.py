"""The budget by load: whole while there is none, lower step by step, never above what was asked."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as some

from patchlife.serve.degrading import Ladder

LADDER, LIMIT = Ladder((1.0, 0.8, 0.6, 0.45), in_work=8), 68


def test_without_load_the_first_budget_answers():
    assert [LADDER.budget(pending, LIMIT) for pending in (0, 1, 8)] == [1.0, 1.0, 1.0]


def test_the_budgets_follow_in_equal_steps_to_half_of_the_queue():
    assert [LADDER.budget(8 + waiting, LIMIT) for waiting in (9, 10, 19, 20, 29, 30, 60, 1000)] == [
        *(1.0, 0.8, 0.8, 0.6, 0.6, 0.45, 0.45, 0.45)
    ]


def test_the_last_photo_that_is_accepted_gets_the_last_budget():
    assert [LADDER.budget(pending, 8) for pending in range(8)] == [1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.45, 0.45]
    assert {LADDER.budget(limit - 1, limit) for limit in range(2, 100)} == {0.45}


def test_a_budget_that_was_asked_for_is_a_limit_from_above():
    assert LADDER.budget(0, LIMIT, 0.5) == 0.5
    assert LADDER.budget(18, LIMIT, 0.5) == 0.5
    assert LADDER.budget(18, LIMIT, 1.0) == 0.8
    assert LADDER.budget(100, LIMIT, 0.5) == 0.45


def test_one_budget_does_not_depend_on_the_load():
    assert {Ladder((0.6,), 8).budget(pending, LIMIT) for pending in range(100)} == {0.6}
    assert Ladder((0.6,), 8).budget(1000, LIMIT, 0.9) == 0.9


@given(some.integers(0, 10**6), some.integers(1, 64), some.integers(2, 500))
def test_more_load_never_raises_the_budget(pending, in_work, limit):
    ladder = Ladder((1.0, 0.8, 0.6, 0.45), in_work)
    assert ladder.budget(pending + 1, limit) <= ladder.budget(pending, limit)
    assert ladder.budget(limit, limit) == 0.45
