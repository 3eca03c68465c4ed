"""Every example runs from its command line."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
ARGUMENTS = {
    "slim_your_vit.py": ["a.jpg"],
    "easy_and_crowded.py": ["."],
    "your_own_scorer.py": [],
    "clip_zero_shot.py": ["a.jpg"],
    "huggingface_classifier.py": ["a.jpg"],
    "dino_retrieval.py": [],
    "segment.py": [],
    "vision_language.py": [],
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "segment.py" else ()) for name in ARGUMENTS]
)
def test_example_runs(name, tmp_path, monkeypatch, capsys):
    for seed, photo in enumerate(("a.jpg", "b.jpg", "c.jpg")):
        generator = np.random.default_rng(seed)
        Image.fromarray(generator.integers(0, 255, (240, 320, 3), np.uint8)).save(tmp_path / photo)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *ARGUMENTS[name]])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out


def test_every_example_without_a_data_folder_is_run():
    runnable = {p.name for p in EXAMPLES.glob("*.py") if "data folder" not in p.read_text().split('"""')[1]}
    assert runnable == set(ARGUMENTS)
