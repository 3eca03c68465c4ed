"""``bench/gpu.sh --tiny`` runs from end to end on the CPU. The full script needs a GPU and is run by hand."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from patchlife.benchmarks.result import Result

ROOT = Path(__file__).parents[2]


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
    return module


def test_jobs_without_time_left_are_listed(tmp_path: Path, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--tiny", "--device", "cpu", "--minutes", "-1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    assert gpu.main() == 0
    left_out = json.loads((tmp_path / "checks.json").read_text())["left_out"]
    assert [text.partition(":")[0] for text in left_out] == ["test_vit, eager, batch 1", "test_vit, eager, batch 2"]


def test_the_plan_holds_every_job_with_the_most_important_first(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    jobs = list(gpu.plan(gpu._arguments()))
    assert len(jobs) == len(set(jobs)) == 5 * 3 * 4
    assert jobs[0].engine == "eager"
    first_compiled = next(job for job in jobs if job.engine == "compile")
    assert (first_compiled.model, first_compiled.batch) == ("deit_small_patch16_224", 32)
    assert all("ours-fixed" in job.methods and "no-decision-bound" in job.methods for job in jobs)
