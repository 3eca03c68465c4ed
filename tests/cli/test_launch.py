"""``accelerate launch`` with the command of the documentation: several processes give the result of one."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small import NAME, checkpoint, write_photos

PAGE = Path(__file__).parents[2] / "docs" / "learning.md"
DOCUMENTED = "vit_tiny_patch16_224"
MORE = ["--batch-size", "4", "--budget", "0.8", "--finetune", "adapter", "--finetune-epochs", "2", "--rank", "2"]


def documented() -> list[str]:
    """The command line of the page, as a list of arguments."""
    lines = PAGE.read_text().replace("\\\n", " ").splitlines()
    (line,) = (line for line in lines if line.startswith("accelerate launch"))
    return shlex.split(line)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def learned(folder: Path, out: str) -> tuple[list[dict], dict, dict]:
    work = folder / f"{out}.work"
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    tensors: dict = {}
    for file in sorted((folder / out).glob("*.safetensors")):
        tensors |= load_file(file)
    return lines, json.loads((work / "fit.json").read_text()), tensors


@pytest.mark.slow
def test_two_processes_on_cpus(patchlife, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos", 12)
    checkpoint(tmp_path / "vit_tiny.safetensors")
    launch, _, fit = " ".join(documented()).replace(DOCUMENTED, NAME).partition(" -m patchlife ")
    arguments = [*fit.split(), *MORE]
    program, *rest = launch.split()
    command = [str(Path(sys.executable).with_name(program)), *rest, "--main_process_port", str(free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    completed = subprocess.run(
        [*command, "-m", "patchlife", *arguments], env=environment, capture_output=True, text=True, timeout=240
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stderr.count("trained on 12 photos") == 1  # only the main process prints
    assert patchlife(*arguments, "--out", "alone").code == 0
    (lines, summary, tensors), (lines_alone, summary_alone, tensors_alone) = (
        learned(tmp_path, out) for out in (arguments[arguments.index("--out") + 1], "alone")
    )
    assert (summary["conditions"]["processes"], summary_alone["conditions"]["processes"]) == (2, 1)
    assert [(line["stage"], line["step"]) for line in lines] == [(line["stage"], line["step"]) for line in lines_alone]
    for line, line_alone in zip(lines, lines_alone, strict=True):
        assert line["loss"] == pytest.approx(line_alone["loss"], rel=1e-3, abs=1e-5)
    assert tensors.keys() == tensors_alone.keys()
    for name, tensor in tensors.items():  # Adam's step does not depend on the size of a gradient
        if not name.endswith("importance.bias"):  # it shifts all patches alike: its gradient is rounding noise
            assert (tensor - tensors_alone[name]).abs().max() < 1e-3, name
