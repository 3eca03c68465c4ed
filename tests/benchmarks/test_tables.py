"""Tables and sentences match the rows, with every comparison in which ours is not the best."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_result import a_result

from patchlife.benchmarks.tables import advice_lines, findings, main_table, speed_table, target_rows
from patchlife.evaluation.timing import Spread


def test_every_comparison_in_which_ours_is_not_the_best_has_a_sentence() -> None:
    assert findings(a_result()) == [
        "Speed, batch 1, 0.6 of the FLOPs: EViT (1.40x dense) is ahead of ours, fixed (1.38x dense).",
        "Top-1, 0.6 of the FLOPs: ToMe (77.0 %) is ahead of ours, fixed (76.0 %).",
    ]


def test_controls_are_not_in_the_findings() -> None:
    """The no-decision bound is faster than ours by construction."""
    assert "no-decision" not in " ".join(findings(a_result()))


def test_a_noisy_ratio_has_no_number() -> None:
    result = a_result()
    noisy = Spread(1.5, 1.0, 2.0)
    result.speed = [replace(r, ratio=noisy) if r.method == "evit" else r for r in result.speed]
    assert any("too noisy for EViT" in text for text in findings(result))
    _, rows = speed_table(result, 1, 0.6)
    assert any(row[0] == "EViT" and "too noisy" in row[4] for row in rows)
    assert "1.50x" not in str(main_table(result, 0.6)[1][2])


def test_one_table_has_accuracy_and_time() -> None:
    columns, rows = main_table(a_result(), 0.6)
    assert columns == ["method", "FLOPs", "top-1 %", "as dense %", "images/s, batch 1", "images/s, batch 16"]
    table = {row[0]: row[1:] for row in rows}
    assert table["dense"] == ["1.000", "80.0", "100.0", "10.0 (1.00x)", "10.0 (1.00x)"]
    assert table["ours, fixed"] == ["0.600", "76.0", "90.0", "13.8 (1.38x)", "16.0 (1.60x)"]
    assert table["EViT"][1:3] == ["", ""]


def test_a_method_left_out_has_its_reason_in_the_table() -> None:
    result = a_result()
    row = replace(result.speed[2], seconds=None, ratio=None, left_out="the reason")
    result.speed[2] = row
    assert speed_table(result, 1, 0.6)[1][2][:2] == ["EViT", "the reason"]


def test_ratios_to_the_bound_to_the_best_baseline_and_to_tome() -> None:
    _, rows = target_rows(a_result())
    assert rows[1] == ["16", "0.6", "0.97", "", "1.07", "1.14", f"{100 * (1 - 1 / 1.6) / 0.4:.0f} %"]
    assert float(rows[0][4]) == pytest.approx(1.38 / 1.4, abs=0.01)


def test_advice_names_the_fastest_number_of_threads_of_each_model() -> None:
    advice = {"batch": 1, "target": 0.6, "threads": {"dense": 2, "slimmed": 1}, "verdict": "take it"}
    times = {"dense": {"1": 9.5, "2": 6.0}, "slimmed": {"1": 4.0, "2": 4.25}}
    old = {"batch": 16, "target": 0.6, "verdict": "of an old file"}
    alone = {**advice, "batch": 4, "ms_by_threads": {}}
    assert advice_lines(a_result(advice=[{**advice, "ms_by_threads": times}, alone, old])) == [
        "batch 1, 0.6 of the FLOPs: the dense model runs best on 2 threads (6 ms; 9.5 ms on 1), the slimmed model runs "
        "best on 1 thread (4 ms; 4.25 ms on 2); the next line compares them at these numbers.",
        "batch 1, 0.6 of the FLOPs: take it.",
        "batch 4, 0.6 of the FLOPs: take it.",
        "batch 16, 0.6 of the FLOPs: of an old file.",
    ]
