"""Curves against the budget."""

from __future__ import annotations

import numpy as np

from patchlife.visual.plots import Panel, Point, plot_panels

POINTS = [Point(1.0, 0.0), Point(0.5, 0.1), Point(0.8, 0.02)]


def test_panels_are_beside_each_other() -> None:
    panel = Panel("KL", {"ours": POINTS}, from_zero=True)
    one, two = plot_panels([panel], "one"), plot_panels([panel, panel._replace(from_zero=False)], "two")
    assert (one.mode, one.height) == ("RGB", two.height)
    assert two.width > 1.5 * one.width


def test_a_value_of_zero_is_on_the_scale_and_changes_the_picture() -> None:
    panels = [Panel("KL", {"ours": points}, from_zero=True) for points in (POINTS, POINTS[1:])]
    blue = [(np.asarray(plot_panels([panel], "KL")) == (31, 119, 180)).all(axis=2) for panel in panels]
    assert blue[0].sum() > 1.2 * blue[1].sum()  # the marker at 0, and the line to it


def test_rivals_are_drawn_in_another_way_and_curves_may_be_empty() -> None:
    curves = {"ours": POINTS, "theirs": [Point(0.5, 0.2, 0.1)], "nothing": []}
    solid, dashed = (plot_panels([Panel("KL", curves, 0.0, others)], "KL") for others in ((), ("ours",)))
    assert solid.tobytes() != dashed.tobytes()
