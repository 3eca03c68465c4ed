"""recipes/vit_tiny/curve.py: its tables and picture come from the committed numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes/vit_tiny"))
import curve

BENCH = {
    "methods": {"tome": {"title": "ToMe"}, "ours-fixed": {"title": "ours, fixed"}},
    "accuracy": [
        {"method": name, "target": target, "flops": target, "photos": 10, "right": right, "agreeing": right}
        | {"divergence": divergence, "left_out": left_out}
        for name, target, right, divergence, left_out in (
            ("dense", 1.0, 8, 0.0, ""),
            ("ours-fixed", 0.5, 7, 0.12, ""),
            ("tome", 0.5, 6, 0.2, ""),
            ("tome", 0.3, 0, None, "out of reach"),
        )
    ],
}
SCORE = {"fraction": 0.5, "top1": 0.8, "drop": 0.0, "drop_interval": [-0.1, 0.1], "agreement": 0.9, "divergence": 0.05}
EVAL = {
    "photos": 10,
    "conditions": {"device": "cpu"},
    "scores": [
        SCORE | {"budget": 1.0, "fraction": 1.0, "mode": "fixed", "divergence": -1e-9},
        SCORE | {"budget": 0.5, "mode": "fixed"},
        SCORE | {"budget": 0.5, "mode": "adaptive", "divergence": 0.04},
    ],
}

TUNED = {"scores": [SCORE | {"budget": 0.5, "mode": "fixed", "divergence": 0.07}]}


@pytest.fixture
def result() -> dict:
    found, conditions = curve._curves(BENCH, EVAL, TUNED)
    return {"conditions": conditions, "sets": {"in20/val": found}}


def test_a_cell_has_the_loss_of_top1_and_the_divergence(result: dict, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- curve -->\nold\n<!-- end of curve -->\nafter\n")
    for _ in range(2):
        curve.write_page(page, result)
    lines = page.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[-1] == "after"
    assert "old" not in lines
    assert "| budget | adapter, fixed | adapter, adaptive | tuned, fixed | nothing trained, fixed | ToMe |" in lines
    assert "| 1 | 0.0 / 0.000 | out of reach | out of reach | out of reach | out of reach |" in lines
    assert "| 0.5 | 0.0 / 0.050 | 0.0 / 0.040 | 0.0 / 0.070 | 10.0 / 0.120 | 20.0 / 0.200 |" in lines
    assert lines.count("<!-- curve -->") == 1


def test_the_picture_has_a_row_for_each_set(result: dict, tmp_path: Path) -> None:
    curve.draw(result, tmp_path / "one.png")
    curve.draw({"sets": result["sets"] | {"in1k-samples": result["sets"]["in20/val"]}}, tmp_path / "two.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert two.height > 1.9 * one.height


def test_the_committed_page_has_the_committed_numbers(tmp_path: Path) -> None:
    committed = max((curve.ROOT / "results").glob("budget_curve_vit_tiny_cpu_*.json"))  # by date
    page = tmp_path / "page.md"
    page.write_text(curve.PAGE.read_text("utf-8"))
    curve.write_page(page, json.loads(committed.read_text()))
    assert page.read_text() == curve.PAGE.read_text("utf-8"), "run: python recipes/vit_tiny/curve.py SHARED --draw-only"
