"""`bench/mixed_sizes.py` and `bench/similarity_width.py` run from end to end with a small model."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

SCRIPTS = Path(__file__).parents[2] / "bench"
SMALL = {"embed_dim": 48, "num_heads": 3, "depth": 4, "num_classes": 10}
NAME = "vit_tiny_patch16_224"


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts build small models, and wait for threads as they did before."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **{**SMALL, **options}))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # set by the scripts; restored after the test
    monkeypatch.syspath_prepend(str(SCRIPTS))


def run(script: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    module.main()
    return module


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_mixed_sizes_times_every_run(
    mode: str, tmp_path: Path, small_models: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sizes.json"
    options = ("--models", NAME, "--batches", "3", "--modes", mode, "--rounds", "5", "--out", str(out))
    run("mixed_sizes", monkeypatch, *options)
    (timing,) = json.loads(out.read_text())["runs"]
    assert len(timing["seconds"]) == 7
    assert timing["conditions"]["mode"] == mode
    assert len(timing["conditions"]["sizes"]) > 1


def test_padded_images_have_one_size(small_models: None) -> None:
    module = importlib.import_module("mixed_sizes")
    images = module.pictures(4, (224, 224), (16, 16))
    whole = module.padded(images)
    for image, row in zip(images, whole, strict=True):
        assert torch.equal(row[:, : image.shape[1], : image.shape[2]], image)
        assert float(row.abs().sum()) == pytest.approx(float(image.abs().sum()), rel=1e-4)


def test_similarity_width_compares_every_way(
    tmp_path: Path, small_models: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weights = timm.create_model(NAME).state_dict()
    save_file({name: value * 3 for name, value in weights.items()}, tmp_path / "weights.safetensors")
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(2):
        noise = np.random.default_rng(index).integers(0, 255, (90, 120, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((480, 360)).save(photos / f"{index}.png")
    out = tmp_path / "width.json"
    options = ("--checkpoint", str(tmp_path / "weights.safetensors"), "--pixels", "160", "--budgets", "0.5")
    module = run("similarity_width", monkeypatch, str(photos), *options, "--out", str(out))
    result = json.loads(out.read_text())
    assert [row["way"] for row in result["rows"]] == list(module.WAYS)
    assert result["pixels"] == 160
    assert all(row["kl"] > 0 and row["photos"] == 2 for row in result["rows"])
    by_way = {row["way"]: row["kl"] for row in result["rows"]}
    assert by_way["every 4th channel"] != by_way["whole tokens"]
