"""Every Python snippet and every `patchlife` command of README.md and docs/ runs, in the order of its page."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from local_hub import local_hub
from PIL import Image
from safetensors.torch import save_file
from versions import needs_timm

from patchlife.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LONG = ("README.md", "docs/learning.md", *(f"docs/how_to/{page}.md" for page in ("export", "tune", "tensorrt")))
"""Pages that take most of the time; they run with the slow tests."""


def snippets(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks in Python and bash."""
    return [(language, text) for language, text in FENCE.findall(page.read_text()) if language in ("python", "bash")]


@pytest.fixture
def files_of_the_pages(tmp_path, monkeypatch):
    """The files that the pages use: a photo, a folder of photos, a checkpoint with random weights."""
    generator = np.random.default_rng(0)
    for name in ("photo.jpg", "photos/cat/a.jpg", "photos/cat/b.jpg", "photos/dog/c.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (240, 320, 3), np.uint8)).save(path)
    torch.manual_seed(0)
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "vit_tiny.safetensors")
    monkeypatch.chdir(tmp_path)
    with local_hub(tmp_path / "cache"):
        yield tmp_path


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft calls it
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, id=(name := str(p.relative_to(ROOT))), marks=pytest.mark.slow if name in LONG else ())
        for p in PAGES
        if snippets(p)
    ],
)
def test_page_runs(page, files_of_the_pages, capsys):
    if page.name == "transformers.md":
        pytest.importorskip("transformers")
    if page.name == "checkpoints.md":
        needs_timm("1.0.31", "safetensors in a local folder")
    names, threads = {}, torch.get_num_threads()
    for language, text in snippets(page):
        if language == "python":
            exec(compile(text, str(page), "exec"), names)
        for line in text.replace("\\\n", " ").splitlines() if language == "bash" else ():
            words = shlex.split(line, comments=True)
            if words[:1] == ["patchlife"] and words[1] != "demo":  # tests/cli/test_demo.py runs the demo
                assert main(words[1:]) == 0, (line, capsys.readouterr().err)
    torch.set_num_threads(threads)
