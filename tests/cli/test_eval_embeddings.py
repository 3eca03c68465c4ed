"""``patchlife fit`` and ``patchlife eval`` of a model without a classifier."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file
from small import NAME, weights, write_photos

QUICK = ["--epochs", 1, "--batch-size", 4, "--device", "cpu", "--budget", 0.8]


@pytest.fixture(scope="session")
def headless_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "headless.safetensors"
    save_file(weights(num_classes=0), path)
    return path


@pytest.fixture
def headless(headless_file: Path) -> list[object]:
    return [NAME, "--checkpoint", headless_file]


def labelled(folder: Path) -> Path:
    """Photos of two classes, whose names no model knows."""
    for index, name in enumerate(("red panda", "tram")):
        write_photos(folder / name, 5, first=10 * index)
    return folder


def test_fit_then_eval_without_a_classifier(patchlife, headless, tmp_path: Path) -> None:
    data, adapter, out = labelled(tmp_path / "photos"), tmp_path / "adapter", tmp_path / "scores.json"
    without = ["--model-args", "num_classes=0"]
    learned = ["--finetune", "adapter", "--finetune-epochs", 1, "--rank", 2, "--lowest-budget", 0.7]
    run = patchlife(
        "fit", *headless, data, "--out", adapter, *QUICK, *learned, "--validation", f"{data},{data / 'tram'}", *without
    )
    assert run.code == 0, run.err
    lines = [json.loads(line) for line in (tmp_path / "adapter.work" / "metrics.jsonl").read_text().splitlines()]
    knn = {line["validation"]: line["knn"] for line in lines if "validation" in line}
    assert knn["tram"] is None  # one folder: its classes are not known
    assert 0 <= knn["photos"] <= 1
    settings = ["--budgets", "1.0,0.8", "--modes", "fixed,adaptive", "--device", "cpu"]
    run = patchlife("eval", adapter, data, *settings, "--neighbours", 3, "--out", out)
    assert run.code == 0, run.err
    assert run.out.count("fixed") == run.out.count("adaptive") == 2
    assert "accuracy of 3 nearest neighbours" in run.out
    result = json.loads(out.read_text())
    assert (result["neighbours"], result["gallery"], result["photos"]) == (3, None, 10)
    assert all(0 < score["cosine"] <= 1.001 and 0 <= score["knn"] <= 1 for score in result["scores"])
    assert len({score["dense_knn"] for score in result["scores"]}) == 1
    assert out.with_suffix(".png").stat().st_size > 5000
    run = patchlife("eval", adapter, data, *settings, "--gallery", data, "--neighbours", 1, "--out", out)
    assert run.code == 0, run.err
    assert all(score["knn"] == 1 for score in json.loads(out.read_text())["scores"])  # each photo finds itself


def test_eval_without_labels_measures_the_cosine_only(patchlife, headless, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 4)
    run = patchlife("eval", *headless, tmp_path / "photos", "--budgets", "0.8", "--model-args", "num_classes=0")
    assert run.code == 0, run.err
    assert "no photos of several classes" in run.err
    assert "cosine" in run.out
    assert "kNN" not in run.out


def test_a_photo_that_cannot_be_read_is_left_out(patchlife, headless, tmp_path: Path) -> None:
    data, out = labelled(tmp_path / "photos"), tmp_path / "scores.json"
    (data / "tram" / "zz.png").write_bytes(b"no photo")
    run = patchlife("eval", *headless, data, "--budgets", "0.8", "--out", out, "--model-args", "num_classes=0")
    assert run.code == 1
    assert "1 photos failed" in run.err
    result = json.loads(out.read_text())
    assert (result["photos"], len(result["failures"])) == (10, 1)


def test_options_that_do_not_fit_are_refused(patchlife, model, headless, tmp_path: Path) -> None:
    data, gallery = labelled(tmp_path / "photos"), tmp_path / "gallery"
    write_photos(gallery / "tram", 2)
    write_photos(gallery / "bus", 2)
    run = patchlife("eval", *headless, data, "--gallery", gallery, "--model-args", "num_classes=0")
    assert (run.code, "has no photos of red panda" in run.err) == (2, True)
    run = patchlife("eval", *headless, data, "--class-order", "number", "--model-args", "num_classes=0")
    assert (run.code, "--class-order has no effect for a model without a classifier" in run.err) == (2, True)
    write_photos(tmp_path / "numbers" / "0", 2)
    run = patchlife("eval", *model, tmp_path / "numbers", "--gallery", gallery)
    assert (run.code, "--gallery is for models without a classifier" in run.err) == (2, True)
    run = patchlife("eval", *model, tmp_path / "numbers", "--neighbours", 0)
    assert (run.code, "neighbours must be at least 1, got 0" in run.err) == (2, True)
    run = patchlife("fit", *headless, data, *QUICK, "--label-weight", 0.5, "--model-args", "num_classes=0")
    assert (run.code, "label_weight needs a classifier" in run.err) == (2, True)
