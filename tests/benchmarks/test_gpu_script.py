"""``bench/gpu.sh --tiny`` runs from end to end on the CPU. The full script needs a GPU and is run by hand."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from patchlife.benchmarks.baselines import METHODS
from patchlife.benchmarks.result import Result

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "bench"))
import gpu_plan  # noqa: E402


def run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_a_tiny_run_is_exact_and_writes_its_files(tmp_path: Path) -> None:
    done = run("--tiny", "--device", "cpu", "--batches", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    checks = json.loads((tmp_path / "checks.json").read_text())
    assert all(check["ok"] for check in checks["exactness"])
    assert {"fixed, merge", "adaptive, merge"} <= {c["what"].partition(", ")[2] for c in checks["exactness"]}
    assert set(checks["ceilings"]) == {"copy_gb_per_s", "bf16_matmul_tflops"}
    assert checks["left_out"] == []
    assert all(seconds > 0 for seconds in checks["decision"].values())
    assert {*checks["jobs"][0]["preparation_seconds"]} == {*gpu_plan.methods_of("eager")}
    result = Result.load(tmp_path / "bench-test_vit-eager.json")
    assert result.complete
    assert {"dense", "no-decision-bound", "tome", "ours-fixed", "ours-adaptive"} <= {row.method for row in result.speed}
    assert not any(row.left_out for row in result.speed)
    assert result.conditions["dtype"] == "bfloat16"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, without its slow checks."""
    for folder in ("bench", "tests/slimming"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module, "exactness", lambda *_: [])
    monkeypatch.setattr(module, "ceilings", lambda *_: {})
    monkeypatch.setattr(module, "parts_of_the_decision", lambda *_: {})
    return module


def test_jobs_without_time_left_are_one_line(tmp_path: Path, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "adaptive_beside_fixed", lambda *_: None)
    options = ["--device", "cpu", "--minutes", "-1", "--engines", "eager", "compile", "--models", "test_vit"]
    left_out = _checks(gpu, monkeypatch, tmp_path, *options)["left_out"]
    batches = ", ".join(f"test_vit batch {batch}" for batch in (32, 256, 1))
    assert left_out == [f"{engine}: no time left for 3 jobs: {batches}" for engine in ("compile", "eager")]


def _checks(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> dict[str, Any]:
    """The checks of a run; ``--tiny`` would not plan by time, so the refusal of CPUs is turned off instead."""
    monkeypatch.setattr(gpu.sys, "exit", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out), *options])
    assert gpu.main() == 0
    return json.loads((out / "checks.json").read_text())


# ---- planning


def test_the_plan_holds_every_job_with_the_most_important_first(gpu: ModuleType) -> None:
    jobs = gpu.plan([*gpu.MODELS], gpu.ENGINES, [32, 256, 1])
    assert len(jobs) == len(set(jobs)) == 5 * 3 * 4
    usual = {"vit_base_patch16_224", "deit_small_patch16_224", "vit_tiny_patch16_224"}
    assert {(job.model, job.engine, job.batch) for job in jobs[:12]} == {
        (model, engine, batch) for model in usual for engine in ("graph", "compile") for batch in (32, 256)
    }
    assert [job.batch for job in jobs[:12]] == [32] * 6 + [256] * 6
    assert [job.engine for job in jobs[:2]] == ["graph", "compile"]  # of one model: the cache serves the second
    assert {job.model for job in jobs[:24]} == usual
    assert {job.batch for job in jobs[40:]} == {1}
    assert all(job.methods[:2] == ("dense", "ours-fixed") for job in jobs)


def test_every_method_of_the_plan_exists_and_runs_in_its_engine(gpu: ModuleType) -> None:
    for engine in gpu.ENGINES:
        methods = [METHODS[name] for name in gpu_plan.methods_of(engine)]
        assert len(methods) == len({method.name for method in methods})
        assert engine == "eager" or all(method.shapes == "static" for method in methods)
    assert {*METHODS} - {"random"} == {*gpu_plan.methods_of("eager")}


def test_a_job_that_does_not_fit_keeps_its_most_important_methods() -> None:
    job, pace = gpu_plan.plan(["vit_base_patch16_224"], ["eager"], [32])[0], gpu_plan.Pace()
    pace.add(job, seconds=60.0, prepared=6)
    assert gpu_plan.reduced(job, 1000.0, pace) == job
    shorter = gpu_plan.reduced(job, 47.0, pace)
    assert shorter is not None
    assert shorter.methods == job.methods[:3]
    assert gpu_plan.reduced(job, 31.0, pace) is None
    assert gpu_plan.reduced(job, -50.0, pace) is None


def test_large_models_are_expected_to_take_longer() -> None:
    small, large = gpu_plan.plan(["deit_small_patch16_224", "vit_large_patch16_224"], ["eager"], [32])
    pace = gpu_plan.Pace()
    pace.add(small, seconds=20.0, prepared=10)
    assert pace.of_a_method(large) == gpu_plan.LARGE * pace.of_a_method(small) == gpu_plan.LARGE * 2.0


@pytest.mark.parametrize("slow", [1.0, 3.0], ids=["as guessed", "three times as slow"])
def test_slow_methods_leave_time_for_all_important_jobs(
    slow: float, gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each method takes its guess times ``slow``; the clock is simulated."""
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0], strftime=lambda *_: "date", gmtime=lambda: None)

    def run(job: Any, results: Any, out: Any, device: Any, tiny: Any, deadline: float, seconds: dict) -> None:
        preparation = gpu.Preparation(gpu.prepare_until(job, now[0], deadline), seconds)
        for name in job.methods:
            if not preparation.before(name):
                now[0] += slow * job.weight * gpu_plan.GUESSES[job.engine]
        preparation.before("")
        now[0] += gpu.TIMING
        ran.append(job)

    ran: list[Any] = []
    monkeypatch.setattr(gpu, "time", clock)
    monkeypatch.setattr(gpu, "run", run)
    device = torch.device("cuda")
    args = SimpleNamespace(models=[*gpu.MODELS], engines=gpu.ENGINES, batches=[32, 256, 1], tiny=False)
    checks: dict[str, Any] = {"jobs": [], "left_out": []}
    gpu.run_jobs(args, device, 510.0, tmp_path, checks)
    assert {job.engine for job in ran[:2]} == {"graph", "compile"}
    assert len(ran) >= (6 if slow == 1 else 2)
    longest = slow * max(gpu_plan.GUESSES.values()) + gpu.TIMING
    assert now[0] <= 510 + longest
    assert len(checks["jobs"]) == len(ran)
    assert sum("jobs: " in line for line in checks["left_out"]) <= len(gpu.ENGINES)


def test_no_method_is_prepared_after_the_limit_of_its_job(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(gpu, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    seconds: dict[str, float] = {}
    preparation = gpu.Preparation(5.0, seconds)
    reasons = {}
    for name in ("dense", "ours-fixed", "tome", "evit", ""):
        reasons[name] = preparation.before(name)
        now[0] += 4.0
    assert [bool(reason) for reason in reasons.values()] == [False, False, True, True, False]
    assert seconds == {"dense": 4.0, "ours-fixed": 4.0}
