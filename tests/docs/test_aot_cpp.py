"""The C++ example, from export to answers, as its README says; where there is a compiler and CMake."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "aot_cpp"


@pytest.mark.slow
@pytest.mark.timeout(900)  # compiles twice: the model, and a program with all of torch's headers
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("g++")), reason="no CMake or no C++ compiler")
def test_cpp_gives_the_same_answers(tmp_path: Path) -> None:
    def run(*words: object) -> str:
        return subprocess.run([*map(str, words)], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    said = run(sys.executable, EXAMPLE / "export.py", "test_vit")  # 160 pixels
    torch_home = Path(torch.__file__).parent
    run("cmake", "-S", EXAMPLE, "-B", "build", "-DCMAKE_BUILD_TYPE=Release", f"-DTORCH={torch_home}")
    run("cmake", "--build", "build")
    answers = run(tmp_path / "build" / "classify", "vit.pt2", "images.bin", 160)
    assert len(answers.splitlines()) == 2
    for ours, theirs in zip(said.splitlines()[1:], answers.splitlines(), strict=True):
        (which, logit), (same, close) = (line.rsplit(" ", 1) for line in (ours, theirs))
        assert which == same
        assert float(logit) == pytest.approx(float(close), abs=1e-3)
    wrong = subprocess.run(
        [tmp_path / "build" / "classify", "vit.pt2", "images.bin", "161"], cwd=tmp_path, capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert "expected images of 311052 bytes each" in wrong.stderr
