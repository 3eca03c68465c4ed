"""Result files: a saved result loads unchanged, format 1 is read in the words of format 2, other files are refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from results_page import load_all

from patchlife.benchmarks.result import Accuracy, MethodInfo, Result, Speed
from patchlife.errors import ConfigError
from patchlife.evaluation.timing import Spread

ROOT = Path(__file__).parents[2]
OLD_WORDS = ('"limit', "heirs", "affordable", '"loss"', "nothing decided", "as it came", "head", "means nothing")


def steady(value: float) -> Spread:
    return Spread(value, 0.95 * value, 1.05 * value)


def a_result(**changes) -> Result:
    """Two batch sizes, one target: EViT is fastest at batch 1, ours at batch 16; ToMe has the best top-1."""
    ours = MethodInfo("ours, fixed", "here", "nothing", True, True)
    methods = {"dense": MethodInfo("dense", "timm", "unmodified", True, False), "ours-fixed": ours}
    methods |= {n: MethodInfo(t, "arXiv", "nothing", True, False) for n, t in (("evit", "EViT"), ("tome", "ToMe"))}
    methods["no-decision-bound"] = MethodInfo("no-decision bound", "control", "nothing", False, False)
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
        Accuracy("no-decision-bound", 0.6, left_out="not meaningful"),
    ]
    settings = {"device": "cpu", "cpu": "a chip", "threads": 2, "date": "today", "engine": "eager"}
    values = {"methods": methods, "speed": speed, "accuracy": accuracy, "complete": True}
    values["data"] = {"folder": "photos/val", "photos": 100, "unreadable": 1}
    return Result("a_vit", "some.safetensors", settings, **{**values, **changes})


def test_a_saved_result_loads_unchanged(tmp_path: Path) -> None:
    result = a_result()
    assert Result.load(result.save(tmp_path / "r.json")) == result


def test_rows_are_found_by_batch_size_and_target() -> None:
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
    ("content", "message"), [("not json", "not a result file"), ("[]", "lacks kind"), ('{"kind": "x"}', "lacks kind")]
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        Result.load(path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = a_result().save(tmp_path / "r.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(ConfigError, match="format 99, and this version reads up to 3; pip install -U patchlife"):
        Result.load(path)


def test_format_1_is_read_in_the_words_of_format_2(tmp_path: Path) -> None:
    info = {"source": "control", "training": "nothing to train", "trained": False, "ours": False}
    methods = {"limit": {"title": "limit (slices, nothing decided)", **info}}
    methods["ours-slices"] = {"title": "ours, fixed, no heirs", **info, "ours": True}
    speed = {"method": "limit", "batch": 1, "target": 0.6, "seconds": None, "ratio": vars(steady(1.5))}
    accuracy = {"method": "limit", "target": 0.6}
    accuracy["left_out"] = "its accuracy means nothing untrained (nothing to train)"
    drop = {"photos": 9, "top1": 70.0, "drop": 0.5, "interval": [0, 1]}
    candidate = {"start": 3, "drops": [3], "flops": 0.6, "ratio": vars(steady(1.5)), "loss": drop}
    chosen = {"batch": 1, "max_drop": 1.0, "candidates": [candidate], "chosen": candidate, "verdict": "take it"}
    old = {"kind": "patchlife-bench", "format": 1, "model": "limit", "weights": "random", "methods": methods}
    old |= {"conditions": {"command": "patchlife bench --methods limit"}, "speed": [speed], "accuracy": [accuracy]}
    old |= {"advice": [], "affordable": [chosen], "data": {}, "complete": True}
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))

    result = Result.load(path)
    assert {name: row.title for name, row in result.methods.items()} == {
        "no-decision-bound": "no-decision bound",
        "ours-slices": "ours, fixed, no merging",
    }
    assert result.speed == [Speed("no-decision-bound", 1, 0.6, ratio=steady(1.5))]
    assert result.accuracy[0].method == "no-decision-bound"
    assert result.accuracy[0].left_out == "its accuracy is not meaningful (nothing to train)"
    assert result.within_max_drop[0]["chosen"]["accuracy"] == drop
    assert "loss" not in result.within_max_drop[0]["candidates"][0]
    assert (result.model, result.conditions) == ("limit", old["conditions"]), "what the user gave is not reworded"
    assert Result.load(result.save(tmp_path / "new.json")) == result


def test_no_old_word_is_left_in_the_committed_results() -> None:
    results = load_all(ROOT / "results")
    assert len(results) >= 12
    for name, result in results.items():
        recorded = {"model": "", "weights": "", "conditions": {}, "data": {}}
        text = json.dumps({**asdict(result), **recorded})
        assert not [word for word in OLD_WORDS if word in text], name


def test_a_folder_is_searched_for_results_only(tmp_path: Path) -> None:
    (tmp_path / "overhead.json").write_text('{"kind": "other"}')
    (tmp_path / "deep").mkdir()
    a_result().save(tmp_path / "deep" / "r.json")
    assert list(load_all(tmp_path)) == ["deep/r.json"]
