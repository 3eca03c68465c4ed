"""Evenly spaced items of a sequence."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from patchlife.data import evenly_spaced


def test_the_first_item_of_each_interval():
    assert evenly_spaced("abcdefghij", 5) == list("acegi")


@given(st.integers(0, 300), st.integers(1, 300))
def test_any_count(items, count):
    chosen = evenly_spaced(range(items), count)
    assert len(chosen) == min(items, count)
    gaps = {b - a for a, b in pairwise(chosen)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert chosen == sorted(set(chosen))
