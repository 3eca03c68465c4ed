"""Every Python snippet and every `patchlife` command in README.md and docs/ runs, in the order of the page."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from versions import needs_timm

from patchlife.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def snippets(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks that run: Python, and console lines that begin with `patchlife`."""
    found = FENCE.findall(page.read_text())
    return [(kind, text) for kind, text in found if kind in ("python", "bash")]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """What the pages speak of: a photo, a folder of photos, a checkpoint, a small timm model under a big name."""
    draw = np.random.default_rng(0)
    for name in ("photo.jpg", "photos/cat/a.jpg", "photos/cat/b.jpg", "photos/dog/c.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (240, 320, 3), np.uint8)).save(path)
    torch.manual_seed(0)
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "vit_tiny.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [p for p in PAGES if snippets(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_page_runs(page, desk, capsys):
    if page.name == "checkpoints.md":
        needs_timm("1.0.31", "safetensors in a local folder")
    names = {}
    for kind, text in snippets(page):
        if kind == "python":
            exec(compile(text, str(page), "exec"), names)
        for line in text.replace("\\\n", " ").splitlines() if kind == "bash" else ():
            words = shlex.split(line, comments=True)
            if words[:1] == ["patchlife"] and words[1] != "demo":  # the demo has tests of its own
                assert main(words[1:]) == 0, (line, capsys.readouterr().err)
