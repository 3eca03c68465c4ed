"""Reports open offline, hold every table, and name the extra that they need."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image
from test_result import a_result, steady

from patchlife.benchmarks.report import conditions_line, text_report, write_report
from patchlife.benchmarks.result import Result
from patchlife.errors import MissingExtraError


def test_a_report_is_one_page_and_one_picture(tmp_path: Path) -> None:
    page = write_report({"run": a_result()}, tmp_path / "run")
    text = page.read_text()
    assert page == tmp_path / "run.html"
    with Image.open(tmp_path / "run.png") as picture:
        assert picture.width > 600
    assert "ToMe (77.0 %) is ahead of ours" in text
    assert "1 unreadable" in text
    assert "http" not in text.replace("http://www.w3.org", "")


def test_speed_alone_is_drawn_too_and_several_results_fit_one_page(tmp_path: Path) -> None:
    speed_only = a_result(accuracy=[], data={}, complete=False)
    text = write_report({"a": a_result(), "b": speed_only}, tmp_path / "report").read_text()
    assert "interrupted" in text
    assert {p.name for p in tmp_path.glob("*.png")} == {"report-a.png", "report-b.png"}


def test_the_text_report_has_advice_and_methods_left_out() -> None:
    advice = [{"batch": 1, "target": 0.6, "verdict": "slimming does not pay here"}]
    text = text_report(a_result(advice=advice))
    assert "Advice, batch 1, 0.6 of the FLOPs: slimming does not pay here." in text
    assert "left out: no-decision bound: not meaningful" in text
    exported = a_result()
    exported.conditions |= {"engine": "onnx", "onnxruntime": "1.2"}
    assert "engine onnx, onnxruntime 1.2, torch" in conditions_line(exported)


def test_the_schedules_within_the_allowed_drop_are_in_every_report(tmp_path: Path) -> None:
    row = {"start": 3, "drops": [3, 6], "flops": 0.6, "ratio": vars(steady(1.5))}
    chosen = {**row, "accuracy": {"photos": 50, "top1": 70.0, "drop": 0.5, "interval": [-0.5, 1.5]}}
    slower = {**row, "drops": [4], "accuracy": None}
    entry = {"batch": 1, "max_drop": 1.0, "candidates": [chosen, slower], "chosen": chosen, "verdict": "take it"}
    result = a_result(within_max_drop=[entry])
    path = result.save(tmp_path / "run.json")
    advice = "Advice, batch 1, at most 1 points of top-1 lost: take it."
    assert advice in text_report(Result.load(path))
    page = write_report({"run": Result.load(path)}, tmp_path / "run").read_text()
    assert advice in page
    assert "0.50 (-0.50 to 1.50)" in page
    assert "chosen" in page
    assert "not faster" in page


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"patchlife\[bench\]"):
        write_report({"run": a_result()}, tmp_path / "run")
