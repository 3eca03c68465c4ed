"""``bench/malloc.py --tiny`` runs from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from patchlife.malloc import _has_glibc

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not _has_glibc(), reason="needs glibc")
def test_it_compares_both_settings(tmp_path: Path) -> None:
    out = tmp_path / "malloc.json"
    command = [sys.executable, "bench/malloc.py", "--tiny", "--out", str(out)]
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "131072"}  # must not reach the runs
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=240)
    result = json.loads(out.read_text())
    assert [row["run"] for row in result["rows"]] == ["dense", "slimmed"]
    assert {"cpu", "threads", "torch", "omp_wait_policy"} <= result["conditions"].keys()
    for row in result["rows"]:
        default, kept = row["default"], row["keeps freed memory"]
        assert min(kept["faults"], default["faults"]) >= 0  # how many is measured in test_malloc.py
        assert default["peak"] >= default["built"] > 0
        assert row["speed-up"] > 0
