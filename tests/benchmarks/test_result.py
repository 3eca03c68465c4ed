"""Result files: what is written comes back, and other files are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from patchlife.benchmarks.result import Accuracy, MethodInfo, Result, Speed, load_all
from patchlife.errors import ConfigError
from patchlife.evaluation.timing import Spread


def steady(value: float) -> Spread:
    return Spread(value, 0.95 * value, 1.05 * value)


def a_result(**changes) -> Result:
    """Two batches, one target: EViT is ahead of ours at batch 1, ours at batch 16; ToMe is best in accuracy."""
    ours = MethodInfo("ours, fixed", "here", "nothing", True, True)
    methods = {"dense": MethodInfo("dense", "timm", "as it came", True, False), "ours-fixed": ours}
    methods |= {n: MethodInfo(t, "arXiv", "nothing", True, False) for n, t in (("evit", "EViT"), ("tome", "ToMe"))}
    methods["no-decision-bound"] = MethodInfo("no-decision-bound", "control", "nothing", False, False)
    gains = {1: {"dense": 1.0, "no-decision-bound": 1.5, "evit": 1.4, "tome": 1.1, "ours-fixed": 1.38}}
    gains[16] = {"dense": 1.0, "no-decision-bound": 1.65, "evit": 1.5, "tome": 1.4, "ours-fixed": 1.6}
    speed = [
        Speed(n, b, 0.6, "knob", 1.0 if n == "dense" else 0.6, "eager", steady(b / 10 / g), steady(g), 10**6)
        for b, row in gains.items()
        for n, g in row.items()
    ]
    accuracy = [Accuracy("dense", 1.0, "", 1.0, 100, 80, 100), Accuracy("ours-fixed", 0.6, "k", 0.6, 100, 76, 90)]
    accuracy += [
        Accuracy("tome", 0.6, "k", 0.6, 100, 77, 91),
        Accuracy("no-decision-bound", 0.6, left_out="means nothing"),
    ]
    settings = {"device": "cpu", "cpu": "a chip", "threads": 2, "date": "today", "engine": "eager"}
    values = {"methods": methods, "speed": speed, "accuracy": accuracy, "complete": True}
    values["data"] = {"folder": "photos/val", "photos": 100, "unreadable": 1}
    return Result("a_vit", "some.safetensors", settings, **{**values, **changes})


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    result = a_result()
    assert Result.load(result.save(tmp_path / "r.json")) == result


def test_rows_know_what_they_mean() -> None:
    row = a_result().at(16, 0.6)[0]
    assert row.method == "dense"
    assert row.images_per_second == pytest.approx(10.0)
    assert a_result().accuracy[1].top1 == 76
    assert a_result().batches == [1, 16]
    assert a_result().targets == [0.6]


def test_a_noisy_row_has_no_throughput() -> None:
    row = Speed("evit", 1, 0.6, seconds=Spread(1, 0.5, 2), ratio=Spread(1, 0.5, 2))
    assert row.noisy
    assert row.images_per_second is None


@pytest.mark.parametrize(
    ("content", "message"), [("not json", "no result file"), ("[]", "no result of"), ('{"kind": "x"}', "no result of")]
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        Result.load(path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = a_result().save(tmp_path / "r.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(ConfigError, match="newer patchlife"):
        Result.load(path)


def test_a_folder_is_searched_for_results_only(tmp_path: Path) -> None:
    (tmp_path / "overhead.json").write_text('{"kind": "other"}')
    (tmp_path / "deep").mkdir()
    a_result().save(tmp_path / "deep" / "r.json")
    assert list(load_all(tmp_path)) == ["deep/r.json"]
