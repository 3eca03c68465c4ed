"""The C++ example, from export to predictions, as in its README. Needs a C++ compiler and CMake."""

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
def test_cpp_gives_the_same_predictions(tmp_path: Path) -> None:
    def run(*words: object) -> str:
        return subprocess.run([*map(str, words)], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    from_python = run(sys.executable, EXAMPLE / "export.py", "test_vit")  # 160 pixels
    torch_home = Path(torch.__file__).parent
    run("cmake", "-S", EXAMPLE, "-B", "build", "-DCMAKE_BUILD_TYPE=Release", f"-DTORCH={torch_home}")
    run("cmake", "--build", "build")
    from_cpp = run(tmp_path / "build" / "classify", "vit.pt2", "images.bin", 160)
    assert len(from_cpp.splitlines()) == 2
    for lines in zip(from_python.splitlines()[1:], from_cpp.splitlines(), strict=True):
        (expected_class, expected_logit), (actual_class, actual_logit) = (line.rsplit(" ", 1) for line in lines)
        assert actual_class == expected_class
        assert float(actual_logit) == pytest.approx(float(expected_logit), abs=1e-3)
    refused = subprocess.run(
        [tmp_path / "build" / "classify", "vit.pt2", "images.bin", "161"], cwd=tmp_path, capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "expected images of 311052 bytes each" in refused.stderr
