"""The results page matches the result files, with every comparison in which ours is not the best."""

from __future__ import annotations

from pathlib import Path

import pytest
from results_page import load_all, load_checks, main, page
from test_result import a_result

ROOT = Path(__file__).parents[2]


def test_the_committed_page_is_not_stale() -> None:
    content = page(load_all(ROOT / "results"), load_checks(ROOT / "results"))
    assert (ROOT / "docs" / "results.md").read_text("utf-8") == content, (
        "docs/results.md is stale; run: python bench/results_page.py"
    )


def test_the_page_has_rows_findings_and_methods_left_out() -> None:
    text = page({"run.json": a_result()}, {})
    assert "- Top-1, 0.6 of the FLOPs: ToMe (77.0 %) is ahead of ours, fixed (76.0 %)." in text
    assert "| ours, fixed | 0.600 | 76.0 | 90.0 | 13.8 (1.38x) | 16.0 (1.60x) |" in text
    assert "- no-decision bound: not meaningful" in text
    assert "has not been run on a GPU yet" in text


def test_only_the_newest_run_of_a_kind_is_shown_and_older_ones_are_listed() -> None:
    old, new = a_result(), a_result()
    old.conditions["date"], new.conditions["date"] = "2026-01-01", "2026-02-01"
    text = page({"a-new.json": new, "b-old.json": old}, {})
    assert text.count("## a_vit") == 1
    assert "Numbers: `a-new.json`" in text
    assert "Earlier runs of this kind: `b-old.json`." in text


def test_accuracy_on_other_photos_has_a_section_of_its_own() -> None:
    whole, broad = a_result(), a_result()
    broad.speed, broad.data = [], {"folder": "photos/broad", "photos": 100, "unreadable": 0}
    text = page({"broad.json": broad, "whole.json": whole}, {})
    assert text.index("## a_vit, eager, cpu") < text.index("## a_vit, top-1 on photos/broad")


def test_gpu_checks_that_fail_are_shown() -> None:
    exact = [{"what": "vit, fixed", "difference": 0.5, "ok": False}, {"what": "vit", "difference": 0.0, "ok": True}]
    ceilings = {"copy_gb_per_s": 3000.0, "bf16_matmul_tflops": 700.0}
    check = {"date": "today", "conditions": {"device": "a GPU"}, "exactness": exact, "ceilings": ceilings}
    text = page({}, {"gpu/checks.json": {**check, "left_out": ["vit_large, compile"]}})
    assert "1 of 2 checks" in text
    assert "**Not exact: vit, fixed (difference 5.0e-01).**" in text
    assert "vit_large, compile" in text


def test_the_command_writes_and_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "docs").mkdir()
    assert main(["--check"]) == 1
    assert main([]) == 0
    assert main(["--check"]) == 0
    a_result().save(tmp_path / "results" / "run.json")
    assert main(["--check"]) == 1
    assert main([]) == 0
    assert "(images/results.png)" in (tmp_path / "docs" / "results.md").read_text("utf-8")
    assert (tmp_path / "docs" / "images" / "results.png").read_bytes().startswith(b"\x89PNG")
