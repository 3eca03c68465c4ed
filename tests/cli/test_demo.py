"""``patchlife demo`` on a tiny model: the files it writes and the text it prints."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from html import escape

import pytest
import torch
from families import liven
from safetensors.torch import save_file
from small import write_photos
from timm.models import VisionTransformer

import patchlife
import patchlife.cli.demo_measurements as demo_measurements
import patchlife.evaluation.threads as threads
import patchlife.runtime.demo_model as demo_model
import patchlife.runtime.opening as opening
from patchlife import wrap
from patchlife.config import ModelConfig
from patchlife.data import list_photos, read_photo
from patchlife.evaluation.threads import ThreadTimes
from patchlife.evaluation.timing import Spread
from patchlife.runtime.inference import predict_photos
from patchlife.slimming.regressor import LifeRegressor, LifeRegressors
from patchlife.slimming.scorers import AttentionScorer

ARCHITECTURE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 2, "num_classes": 2}


@pytest.fixture(autouse=True)
def without_onnx(monkeypatch):
    """Exporting takes seconds; one test here does it."""
    monkeypatch.setattr(demo_measurements, "installed", lambda package: False)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A folder with a tiny model and six photos, in the layout of the embedded demo folder."""
    folder = tmp_path / "demo"
    write_photos(folder / "photos" / "cat", 3)
    write_photos(folder / "photos" / "dog", 3, first=3)
    weights = {name: t.clone().half() for name, t in liven(VisionTransformer(**ARCHITECTURE)).state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    metadata = {
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
    (folder / "model.json").write_text(json.dumps(metadata))
    for module in (demo_model, opening):
        monkeypatch.setattr(module, "demo_folder", lambda: folder)
    patchlife.save(
        wrap(demo_model.demo_backbone(), scorer=LifeRegressor(ARCHITECTURE["embed_dim"], 1, width=8, embedding_dim=4)),
        folder / "adapter",
    )
    return folder


@pytest.mark.parametrize("settings", [[], ["--mode", "adaptive"], ["--kept", "16,16,9,9,4,4"]])
def test_it_writes_numbers_pictures_and_a_report(settings, stand_in, patchlife, tmp_path):
    out = tmp_path / "report"
    result = patchlife("demo", "--out", out, "--rounds", 5, "--batch-size", 4, *settings)
    assert result.code == 0
    assert sorted(p.name for p in out.iterdir()) == ["contact-sheet.png", "demo.json", "report.html", "strips.png"]
    assert f"open {out / 'report.html'}" in result.out
    headline = result.out.splitlines()[0]
    assert re.match(
        r"With \d+ % of the FLOPs the slimmed model gave the dense model's answer on [0-6] of 6 photos", headline
    )
    assert escape(headline, quote=True) in (out / "report.html").read_text()
    assert re.search(r"^dense .* 100.0 %", result.out, re.MULTILINE)
    assert re.search(r"^PyTorch +1 +[\d.]+ ms +1 +[\d.]+ ms +1 +", result.out, re.MULTILINE)
    numbers = json.loads((out / "demo.json").read_text())
    dense, slimmed, *others = numbers["outcomes"]
    assert (dense["name"], dense["photos"], dense["agreeing"], dense["fraction_of_dense"]) == ("dense", 6, 6, 1)
    assert slimmed["fraction_of_dense"] < 0.7
    assert 0 <= slimmed["correct"] <= 6
    assert {o["name"] for o in others} >= {"budget 0.8", "budget 0.45", "budget 0.35"}
    assert set(numbers["timings"]) == {"1", "4"}
    assert numbers["timings"]["4"]["conditions"]["batch"] == 4


def test_dense_and_slimmed_each_run_on_their_best_number_of_threads(stand_in, patchlife, tmp_path, monkeypatch):
    tried = []

    def fastest(runs, counts, *_):
        tried.append(tuple(counts))
        times = {1: Spread(0.002, 0.002, 0.002), 3: Spread(0.001, 0.001, 0.001)}
        return {"dense": ThreadTimes(times, 3), "slimmed": ThreadTimes(times, 1)}

    monkeypatch.setattr(threads, "fastest_threads", fastest)
    monkeypatch.setattr(threads, "thread_counts", lambda: (1, 3))
    present = torch.get_num_threads()
    result = patchlife("demo", "--out", tmp_path / "report", "--rounds", 5, "--batch-size", 1)
    assert tried == [(1, 3)]
    assert re.search(r"^engine +batch +dense +threads +slimmed +threads +speed-up$", result.out, re.MULTILINE)
    assert re.search(r"^PyTorch +1 +[\d.]+ ms +3 +[\d.]+ ms +1 +", result.out, re.MULTILINE)
    conditions = json.loads((tmp_path / "report" / "demo.json").read_text())["timings"]["1"]["conditions"]
    assert conditions["threads"] == {"dense": 3, "slimmed": 1}
    assert conditions["ms_by_threads"]["dense"] == {"1": 2, "3": 1}
    assert "malloc" in conditions
    assert torch.get_num_threads() == present


def test_onnx_runtime_is_timed_beside_pytorch(stand_in, patchlife, tmp_path, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.setattr(demo_measurements, "installed", lambda package: True)
    monkeypatch.setenv("PATCHLIFE_CACHE", str(tmp_path / "cache"))
    result = patchlife("demo", "--out", tmp_path / "report", "--rounds", 5, "--batch-size", 4, "--threads", 1)
    assert re.search(r"^PyTorch +4 +[\d.]+ ms +1 +[\d.]+ ms +1 +", result.out, re.MULTILINE)
    assert re.search(r"^ONNX Runtime +1 +[\d.]+ ms +1 +[\d.]+ ms +1 +", result.out, re.MULTILINE)
    assert len(list((tmp_path / "cache").glob("*/onnx"))) == 2, "dense and slimmed are exported once each"
    timings = json.loads((tmp_path / "report" / "demo.json").read_text())["onnx_timings"]
    assert {size: timing["conditions"]["batch"] for size, timing in timings.items()} == {"1": 1, "4": 4}
    assert timings["1"]["conditions"]["onnxruntime"] in (tmp_path / "report" / "report.html").read_text()


def test_onnx_runtime_is_left_out_in_adaptive_mode(stand_in, patchlife, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_measurements, "installed", lambda package: True)
    result = patchlife("demo", "--out", tmp_path / "report", "--rounds", 5, "--mode", "adaptive")
    assert result.code == 0
    assert "ONNX" not in result.out


def test_a_given_number_of_threads_is_not_changed(stand_in, patchlife, tmp_path):
    result = patchlife("demo", "--out", tmp_path / "report", "--rounds", 5, "--batch-size", 1, "--threads", 2)
    assert re.search(r"^PyTorch +1 +[\d.]+ ms +2 +[\d.]+ ms +2 +", result.out, re.MULTILINE)


def test_the_report_needs_no_network_or_script(stand_in, patchlife, tmp_path):
    patchlife("demo", "--out", tmp_path / "report", "--rounds", 5)
    html = (tmp_path / "report" / "report.html").read_text()
    assert not re.search(r"https?://|src=\"(?!data:)|<script|@import|url\(", html)
    assert html.count("<img ") == 2
    assert html.count("<table>") == 2
    assert "torch" in html


def test_a_damaged_photo_is_an_error(stand_in, patchlife, tmp_path):
    next((stand_in / "photos" / "dog").iterdir()).write_bytes(b"")
    result = patchlife("demo", "--out", tmp_path / "report", "--rounds", 5)
    assert result.code == 2
    assert "found an empty file" in result.err
    assert "reinstall patchlife" in result.err


def test_the_embedded_model_answers_as_its_file_states():
    folder = demo_model.demo_folder()
    facts = json.loads((folder / "model.json").read_text())
    stated = facts["accuracy"]["test"]
    assert stated["right"] >= 0.92 * stated["photos"]
    assert not [name for name in facts["classes"] if "face" in name.lower()]
    photos = list_photos(folder / "photos")
    pipeline = opening.open_pipeline(ModelConfig("demo", life={"budget": 1.0}))
    answers = [found.top(pipeline.labels, 1)[0]["label"] for found in predict_photos(pipeline, photos)]
    right = sum(answer == photo.parent.name for answer, photo in zip(answers, photos, strict=True))
    assert abs(right - facts["accuracy"]["demo_photos"]["right"]) <= 1  # rounding differs between processors


def test_the_embedded_folder_has_as_many_photos_of_each_class():
    folder = demo_model.demo_folder()
    classes = json.loads((folder / "model.json").read_text())["classes"]
    photos = sorted(path.relative_to(folder / "photos") for path in (folder / "photos").rglob("*") if path.is_file())
    assert Counter(path.parent.as_posix() for path in photos) == dict.fromkeys(classes, 100 // len(classes))
    assert len(photos) == 100
    assert [photo for photo in photos if photo.suffix != ".jpg"] == []
    for photo in photos:
        assert min(read_photo(folder / "photos" / photo).size) >= 112, photo


def test_the_learned_scorer_is_used_unless_the_start_block_differs(stand_in):
    def opened(**life):
        return opening.open_pipeline(ModelConfig("demo", life=life)).model

    assert isinstance(opened().scorer, LifeRegressor)
    assert isinstance(opened(budget=0.45, mode="fixed").scorer, LifeRegressor)
    later = opened(start=3, budget=0.8)
    assert isinstance(later.scorer, AttentionScorer)
    assert later.start == 3


def test_the_embedded_demo_has_a_learned_scorer():
    model = opening.open_pipeline(ModelConfig("demo")).model
    assert isinstance(model.scorer, LifeRegressors)
    assert model.calibration is not None
    images = torch.randn(2, 3, *model.backbone.image_size)
    assert torch.equal(model.set_budget(1.0)(images), model.backbone.model(images))  # the backbone is not modified
