"""`bench/many_patches.py` and its parts run from end to end at tiny sizes."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from patchlife.backbones import adapt
from patchlife.benchmarks.baselines.base import dense_flops

SCRIPTS = Path(__file__).parents[2] / "bench"
MODEL, PIXELS = "vit_small_patch16_224", 64  # 16 patches


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; peak memory is given, not measured."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # set by the script; restored after the test
    module = importlib.import_module("many_patches")
    monkeypatch.setattr(module, "first_call", lambda run, *_: 1_500_000 if run in module.OURS else 1_000_000)
    return module


@pytest.fixture
def runs(script: Any) -> Any:
    """The module of the runs that are compared."""
    return importlib.import_module("compared_runs")


def measure(script: Any, path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[dict[str, Any]]:
    arguments = ["--tiny", "--rounds", "5", "--threads", "1", "--out", str(path), *options]
    monkeypatch.setattr(sys, "argv", ["many_patches.py", *arguments])
    script.main()
    return json.loads(path.read_text())["records"]


def test_each_size_and_run_has_a_record_of_time_and_of_memory(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = measure(script, tmp_path / "many.json", monkeypatch, "--sizes", str(PIXELS))
    assert [script.key(record) for record in records] == list(script.jobs([PIXELS], ["time", "memory"]))
    assert len(records) == 2 * len(script.RUNS) - 1
    for record in records:
        assert (record["patches"], record["model"], record["conditions"]["threads"]) == (16, MODEL, 1)
    times = {record["run"]: record for record in records if record["measure"] == "time"}
    assert set(times["merging"]["parts"]) == {"score", "plan", "gather", "merge"}
    assert set(times["slices"]["parts"]) == {"score", "plan", "gather"}
    assert "share" not in times["dense"]
    merging = times["merging"]
    parts = sum(part["median"] for part in merging["parts"].values())
    assert merging["share"] == pytest.approx(parts / merging["seconds"]["merging"]["median"])
    assert merging["beyond_bound"]["median"] == pytest.approx(1 - merging["ratios"]["merging"]["median"])
    shown = capsys.readouterr().out
    assert shown.startswith("13 records, about ")
    assert f"| {PIXELS} | 16 | {script.BOUND} |" in shown
    assert "| 2, 1.50 |" in shown


def test_an_interrupted_measurement_continues(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, options = tmp_path / "many.json", ("--sizes", str(PIXELS), "--measure", "memory")
    whole = measure(script, path, monkeypatch, *options)
    script.save(path, whole[:3])
    measured = []
    monkeypatch.setattr(script, "first_call", lambda run, *_: measured.append(run) or 1)
    again = measure(script, path, monkeypatch, *options)
    assert measured == list(script.RUNS[3:])
    assert again[:3] == whole[:3]
    assert list(map(script.key, again)) == list(map(script.key, whole))
    capsys.readouterr()
    measure(script, path, monkeypatch, *options)
    assert len(measured) == len(script.RUNS) - 3
    assert capsys.readouterr().out.startswith("| px | patches |")  # nothing to measure: only the table


def test_targets_are_met_or_missed(script: Any) -> None:
    def record(pixels: int, measure: str, run: str, **values: float) -> dict[str, Any]:
        return {"pixels": pixels, "measure": measure, "run": run, **values}

    records = [
        record(1024, "memory", "dense", bytes=100),
        record(1024, "memory", "merging", bytes=120),
        record(1024, "memory", "slices", bytes=121),
        record(1024, "time", "merging", share=0.025),
        record(1024, "time", "merging, learned scorer", share=0.025),
        record(320, "time", "merging", share=0.9),  # no target for this size
    ]
    assert [line.partition(",")[0] for line in script.verdicts(records)] == [
        "met: 1024 px",
        "MISSED: 1024 px",
        "met: 1024 px",
        "MISSED: 1024 px",
    ]


def test_the_model_of_each_size_has_the_stated_patches(script: Any, runs: Any) -> None:
    patches = []
    for pixels in script.SIZES:
        rows, cols = adapt(runs.backbone_model(script.model_name(pixels), pixels, tiny=True)).grid
        patches.append(rows * cols)
    assert patches == [196, 400, 1369, 2304, 4096, 6400, 9216]


def test_runs_are_what_their_names_say(runs: Any) -> None:
    vit, images = runs.backbone_model(MODEL, PIXELS, tiny=True), runs.random_images(1, PIXELS)
    built = {run: runs.build(run, vit, images, 0.5) for run in runs.RUNS}
    assert built["dense"] is vit
    assert {run: built[run].settings.merge for run in runs.OURS} == {run: "merging" in run for run in runs.OURS}
    kinds = {run: built[run].scorer.kind == "life-regressor" for run in runs.OURS}
    assert kinds == {run: "learned" in run for run in runs.OURS}
    assert built[runs.BOUND].schedule == built["slices"].schedule()
    assert built["ToMe"].flops(images) == pytest.approx(0.5 * dense_flops(adapt(vit), images), rel=0.05)
    with torch.inference_mode():
        assert {model(images).shape for model in built.values()} == {(1, 10)}


@pytest.mark.parametrize("run", ["merging", "slices, learned scorer"])
def test_a_run_of_ours_is_timed_beside_the_bound_of_its_own_schedule(runs: Any, run: str) -> None:
    vit, images = runs.backbone_model(MODEL, PIXELS, tiny=True), runs.random_images(1, PIXELS)
    timing = runs.time_over_bound(run, vit, images, 0.5, rounds=5, warmup=0)
    assert list(timing.seconds) == [runs.BOUND, run]
    assert timing.conditions["schedule"] == str(runs.slimmed(vit, run, 0.5).schedule())


def test_the_merges_of_the_parts_are_those_of_a_run(runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vit, images = runs.backbone_model(MODEL, PIXELS, tiny=True), runs.random_images(1, PIXELS)
    model = runs.slimmed(vit, "merging", 0.5)
    counts = list(dict.fromkeys(model.schedule().kept))
    assert len(counts) > 2
    merge, merged = runs.merge, []

    def noted(tokens: torch.Tensor, size: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> Any:
        merged.append((tokens.shape[1] - 1, tokens.shape[1] - 1 - target.shape[1]))
        return merge(tokens, size, target, weight)

    monkeypatch.setattr(runs, "merge", noted)
    parts = runs.decision_parts(model, images)
    assert parts["merge"]().shape == (1, 1 + counts[-1], 48)
    assert merged == list(pairwise(counts))
    assert parts["gather"]()[0].shape == (1, 17, 48)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_counts_what_the_call_allocates(runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = importlib.import_module("peak_memory")
    monkeypatch.setattr(script, "backbone_model", lambda *_: None)
    monkeypatch.setattr(script, "build", lambda *_: lambda images: torch.ones(25_000_000).sum())  # 100 MB, freed
    assert 99_000_000 < script.measure("dense", MODEL, PIXELS, 0.5, tiny=True) < 120_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_peak_memory_is_measured_in_a_new_process(runs: Any) -> None:
    script = importlib.import_module("peak_memory")
    assert 100_000 < script.first_call("merging", MODEL, PIXELS, 0.5, 1, tiny=True) < 500_000_000


def test_a_failed_process_is_named(runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = importlib.import_module("peak_memory")
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="the memory of dense at 64 px failed"):
        script.first_call("dense", MODEL, PIXELS, 0.5, 1)


def test_the_plot_has_a_line_for_each_method(runs: Any, tmp_path: Path) -> None:
    script = importlib.import_module("many_patches_plot")
    conditions = {"budget": 0.5, "threads": 1}
    records: list[dict[str, Any]] = []
    for patches in (196, 4096):
        for run in script.LOOK:
            seconds = {run: {"median": patches / 1e3}, script.BOUND: {"median": patches / 2e3}}
            ratios = {run: {"median": 0.9}}
            both = {"patches": patches, "run": run, "conditions": conditions, "ratios": ratios}
            records += [{**both, "measure": "time", "seconds": seconds}] * (run != script.BOUND)
            records.append({**both, "measure": "memory", "bytes": 1000 * patches})
    assert script._times(records, script.BOUND) == [(196, 0.098), (4096, 2.048)]
    assert script._memory(records, "ToMe") == [(196, 0.196), (4096, 4.096)]
    assert script._ratios(records, "ToMe") == [(196, 0.9), (4096, 0.9)]
    assert script._ratios(records, script.BOUND) == [(196, 1.0), (4096, 1.0)]
    assert script._ratios(records, "dense") == []
    assert script.plot(records).size == (1632, 528)
