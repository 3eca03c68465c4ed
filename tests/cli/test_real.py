"""The command line on the real ViT-Tiny and real photos, as in the README."""

from __future__ import annotations

import json
import re

import pytest

pytestmark = pytest.mark.shared


@pytest.fixture
def real(shared) -> list[object]:
    """The shared ViT-Tiny and one photo of each class of in20/val, in its class folder."""
    photos = [sorted(folder.iterdir())[5] for folder in sorted((shared / "data/in20/val").iterdir())]
    return ["vit_tiny_patch16_224", *photos, "--checkpoint", shared / "weights/vit_tiny_patch16_224.safetensors"]


def test_predict(real, patchlife):
    result = patchlife("predict", *real, "--labelled", "--budget", 0.61)
    assert result.code == 0
    assert float(re.search(r"top-1 ([\d.]+) % of 20", result.err)[1]) >= 60
    assert re.search(r"20 photos, 0 failed, 0\.6\d+ of the dense FLOPs", result.err)
    assert any(record["top"][0]["label"] == "tench" for record in result.records)


def test_draw(real, patchlife, tmp_path):
    result = patchlife("draw", *real[:3], *real[-2:], "--strip", "--out", tmp_path)
    assert result.code == 0
    assert len(list(tmp_path.rglob("*.life.png"))) == len(list(tmp_path.rglob("*.strip.png"))) == 2


def test_info(real, patchlife):
    description = json.loads(patchlife("info", real[0], *real[-2:], "--budget", 0.61, "--json").out)
    assert description["flops"]["dense"] == pytest.approx(2.507e9, rel=1e-3)
    assert 0.97 * 0.61 <= description["flops"]["fraction_of_dense"] <= 0.61
