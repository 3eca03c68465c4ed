"""``patchlife demo`` on a stand-in that is pipeline at once: what it writes and says."""

from __future__ import annotations

import hashlib
import json
import re

import pytest
import torch
from families import liven
from safetensors.torch import save_file
from small import write_photos
from timm.models import VisionTransformer

import patchlife
import patchlife.runtime.opening as models
from patchlife import wrap
from patchlife.config import ModelConfig
from patchlife.slimming.regressor import LifeRegressor
from patchlife.slimming.scorers import AttentionScorer

ARCHITECTURE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 2, "num_classes": 2}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A tiny model and six photos, laid out as the embedded ones are."""
    folder = tmp_path / "demo"
    write_photos(folder / "photos" / "cat", 3)
    write_photos(folder / "photos" / "dog", 3, first=3)
    weights = {name: t.clone().half() for name, t in liven(VisionTransformer(**ARCHITECTURE)).state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    about = {
        "architecture": ARCHITECTURE,
        "classes": ["cat", "dog"],
        "input": {
            "size": [3, 32, 32],
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        },
        "weights": {"file": "model.safetensors", "sha256": sha256},
    }
    (folder / "model.json").write_text(json.dumps(about))
    monkeypatch.setattr(models, "demo_folder", lambda: folder)
    patchlife.save(
        wrap(models.demo_backbone(), scorer=LifeRegressor(ARCHITECTURE["embed_dim"], 1, width=8, embedding_dim=4)),
        folder / "adapter",
    )
    return folder


@pytest.mark.parametrize("settings", [[], ["--mode", "adaptive"], ["--kept", "16,16,9,9,4,4"]])
def test_numbers_pictures_and_a_report(settings, stand_in, patchlife, tmp_path):
    out = tmp_path / "report"
    said = patchlife("demo", "--out", out, "--rounds", 5, "--batch-size", 4, *settings)
    assert said.code == 0
    assert sorted(p.name for p in out.iterdir()) == ["contact-sheet.png", "demo.json", "report.html", "strips.png"]
    assert f"open {out / 'report.html'}" in said.out
    assert re.search(r"^dense .* 100.0 %", said.out, re.MULTILINE)
    assert re.search(r"^1 +[\d.]+ ms +[\d.]+ ms +", said.out, re.MULTILINE)
    numbers = json.loads((out / "demo.json").read_text())
    dense, slimmed, *others = numbers["outcomes"]
    assert (dense["name"], dense["photos"], dense["agreeing"], dense["fraction_of_dense"]) == ("dense", 6, 6, 1)
    assert slimmed["fraction_of_dense"] < 0.7
    assert {o["name"] for o in others} >= {"budget 0.8", "budget 0.45", "budget 0.35"}
    assert set(numbers["timings"]) == {"1", "4"}
    assert numbers["timings"]["4"]["conditions"]["batch"] == 4


def test_the_report_opens_offline(stand_in, patchlife, tmp_path):
    patchlife("demo", "--out", tmp_path / "report", "--rounds", 5)
    html = (tmp_path / "report" / "report.html").read_text()
    assert not re.search(r"https?://|src=\"(?!data:)|<script|@import|url\(", html)
    assert html.count("<img ") == 2
    assert html.count("<table>") == 2
    assert "torch" in html


def test_a_photo_that_broke_is_said(stand_in, patchlife, tmp_path):
    next((stand_in / "photos" / "dog").iterdir()).write_bytes(b"")
    said = patchlife("demo", "--out", tmp_path / "report", "--rounds", 5)
    assert said.code == 2
    assert "found an empty file" in said.err
    assert "reinstall patchlife" in said.err


def test_the_embedded_photos_are_of_the_embedded_classes():
    folder = models.demo_folder()
    about = json.loads((folder / "model.json").read_text())
    assert sorted(p.name for p in (folder / "photos").iterdir()) == sorted(about["classes"])
    assert sum(1 for _ in folder.glob("photos/*/*.jpg")) == 100


def test_lives_are_learned_unless_they_end_elsewhere(stand_in):
    def opened(**life):
        return models.open_pipeline(ModelConfig("demo", life=life)).model

    assert isinstance(opened().scorer, LifeRegressor)
    assert isinstance(opened(budget=0.45, mode="fixed").scorer, LifeRegressor)
    later = opened(start=3, budget=0.8)
    assert isinstance(later.scorer, AttentionScorer)
    assert later.start == 3


def test_the_shipped_demo_has_learned_lives():
    model = models.open_pipeline(ModelConfig("demo")).model
    assert isinstance(model.scorer, LifeRegressor)
    assert model.calibration is not None
    images = torch.randn(2, 3, *model.backbone.image_size)
    assert torch.equal(model.set_budget(1.0)(images), model.backbone.vit(images))  # the backbone is untouched
