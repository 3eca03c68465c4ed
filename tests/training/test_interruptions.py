"""A fit gives the same result after `kill -9` at any moment, and on several processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_targets import PREPROCESS, QUICK, small_model, some_photos

import patchlife
from patchlife.training import loop
from patchlife.training.fit import accelerator_for, fit, work_folder

LONG = replace(QUICK, epochs=8, finetune="full", finetune_epochs=6)


def run(out: Path, photo_folder: Path) -> None:
    """The fit of all tests below."""
    torch.set_num_threads(1)
    photos = some_photos(photo_folder)
    fit(small_model(), photos, PREPROCESS, out, LONG, accelerator_for("cpu"), {"seen": photos[::3]})


def metrics(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (work_folder(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("photos_per_s", "seconds")} for line in lines]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_kill_9_at_twelve_random_moments_changes_nothing(tmp_path: Path) -> None:
    photo_folder = tmp_path / "photos"
    some_photos(photo_folder)
    begin = time.monotonic()
    run(tmp_path / "whole", photo_folder)
    whole = time.monotonic() - begin
    rng, processes = random.Random(0), multiprocessing.get_context("fork")
    for _ in range(12):
        process = processes.Process(target=run, args=(tmp_path / "killed", photo_folder))
        process.start()
        time.sleep(rng.uniform(0, 0.6 * whole))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        process.close()
    run(tmp_path / "killed", photo_folder)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    vit, images = small_model().backbone.model, torch.randn(2, 3, 48, 48)
    assert torch.equal(*(patchlife.load(tmp_path / name, vit)(images) for name in ("whole", "killed")))


def run_on_two_processes(folder: Path, out: str) -> None:
    """The same fit, on two processes."""
    script = folder / "run_fit.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\n"
        f"sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]}\n"
        "from test_interruptions import run\n"
        f"run(Path({str(folder / out)!r}), Path({str(folder / 'photos')!r}))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517", str(script)]
    subprocess.run(launch, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240)


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    some_photos(tmp_path / "photos")
    run(tmp_path / "one", tmp_path / "photos")
    run_on_two_processes(tmp_path, "two")
    assert_nearly_equal(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some_photos(tmp_path / "photos")
    run(tmp_path / "one", tmp_path / "photos")
    original = loop.save_checkpoint

    def save_then_interrupt(path: Path, step: int, *state: object) -> None:
        original(path, step, *state)
        if path.name.startswith("slimming") and step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", save_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "both", tmp_path / "photos")
    run_on_two_processes(tmp_path, "both")
    assert_nearly_equal(tmp_path / "one", tmp_path / "both")
    monkeypatch.setattr(loop, "save_checkpoint", lambda *args: pytest.fail("a step was taken"))
    run(tmp_path / "both", tmp_path / "photos")


def assert_nearly_equal(one: Path, two: Path) -> None:
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a["step"] == b["step"]
        measure = "kl" if "validation" in a else "loss"
        assert b[measure] == pytest.approx(a[measure], rel=1e-3, abs=1e-5)
