"""``--labels-from table.csv`` and ``--multi-label``: accuracy without class folders."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from small import CLASSES, NAME, checkpoint, write_photos


@pytest.fixture
def predicted(patchlife, model, photos) -> list[list[float]]:
    """The probability of every class for each photo, by softmax, at budget 1."""
    records = patchlife("predict", *model, *photos, "--budget", 1, "--top", CLASSES).records
    return [[probability for _, probability in sorted(_pairs(record))] for record in records]


def _pairs(record: dict) -> list[tuple[int, float]]:
    return [(entry["class"], entry["probability"]) for entry in record["top"]]


def table(folder: Path, photos: list[Path], labels: list[object]) -> Path:
    """A CSV file beside the folder of the photos."""
    rows = [f"photos/{photo.name},{label}" for photo, label in zip(photos, labels, strict=True)]
    (folder / "t.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    return folder / "t.csv"


@pytest.fixture
def names(tmp_path) -> Path:
    (tmp_path / "names.txt").write_text("\n".join(f"class {chr(97 + i)}" for i in range(CLASSES)))
    return tmp_path / "names.txt"


def test_labels_of_a_table_replace_folders(patchlife, model, photos, predicted, tmp_path, names):
    best = [max(range(CLASSES), key=row.__getitem__) for row in predicted]
    labels = [f"class {chr(97 + c)}" if i % 2 else c for i, c in enumerate(best)]  # names and numbers
    labels[2] = (best[2] + 1) % CLASSES
    file = table(tmp_path, photos, labels)
    options = ["--labels", names, "--labels-from", file]
    result = patchlife("predict", *model, photos[0].parent, "--budget", 1, *options)
    assert result.code == 0
    assert "top-1 85.71 % of 7" in result.err
    assert "folders" not in result.err
    out = tmp_path / "scores.json"
    result = patchlife("eval", *model, photos[0].parent, "--budgets", 1, *options, "--out", out)
    assert result.code == 0
    scores = json.loads(out.read_text())
    assert scores["scores"][0]["top1"] == pytest.approx(6 / 7)
    assert scores["labels_from"] == str(file)


def test_class_order_number_applies_to_the_labels_of_a_table(patchlife, model, photos, predicted, tmp_path, names):
    best = [max(range(CLASSES), key=row.__getitem__) for row in predicted]
    names.write_text("\n".join(str(9 - i) for i in range(CLASSES)))  # names that are other classes' numbers
    file = table(tmp_path, photos, [f"00{c}" if i % 2 else c for i, c in enumerate(best)])
    line = ["predict", *model, *photos, "--budget", 1, "--labels", names, "--labels-from", file]
    assert "top-1 100.00 % of 7" in patchlife(*line, "--class-order", "number").err
    assert "top-1 100.00 %" not in patchlife(*line).err


def test_class_order_imagefolder_numbers_the_labels_of_a_table(patchlife, model, tmp_path):
    photos = write_photos(tmp_path / "photos", 14)
    records = patchlife("predict", *model, *photos, "--budget", 1).records
    best = [record["top"][0]["class"] for record in records]
    words = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay"]
    labels = [*words, *(words[c] for c in best[10:])]  # every class occurs
    right = sum(words.index(label) == c for label, c in zip(labels, best, strict=True))
    line = ["predict", *model, *photos, "--budget", 1, "--class-order", "imagefolder"]
    result = patchlife(*line, "--labels-from", table(tmp_path, photos, labels))
    assert right >= 4
    assert f"top-1 {100 * right / 14:.2f} % of 14" in result.err
    result = patchlife(*line, "--labels-from", table(tmp_path, photos, ["ant"] * 14))
    assert result.code == 2
    assert "needs one label for each of the 10 classes, got 1 labels (ant); give all labels" in result.err


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("zebra", "t.csv, line 4 has the label 'zebra', which is not a class of this model; its classes are 0 to 9"),
        ("10", "line 4 has the label '10', which is not a class"),
        ("", "line 4 has the label '', which is not a class"),
        ("1;2", "line 4 has the label '1;2', .* several labels of a photo need a multi-label model"),
    ],
)
def test_an_unknown_label(label, message, patchlife, model, photos, tmp_path):
    file = table(tmp_path, photos, [0, 1, label, 3, 4, 5, 6])
    for verb in ("predict", "eval"):
        result = patchlife(verb, *model, photos[0].parent, "--labels-from", file)
        assert result.code == 2
        assert re.search(message, result.err), result.err


def test_a_photo_without_a_row(patchlife, model, photos, tmp_path):
    file = table(tmp_path, photos[:5], [0, 1, 2, 3, 4])
    result = patchlife("predict", *model, *photos, "--labels-from", file)
    assert result.code == 2
    assert f"has no row for 2 of the 7 photos (the first: {photos[5]})" in result.err


def test_eval_of_a_model_without_classifier_takes_the_classes_of_the_table(patchlife, photos, tmp_path):
    model = [NAME, "--checkpoint", checkpoint(tmp_path / "headless.safetensors", num_classes=0)]
    line = ["eval", *model, photos[0].parent, "--budgets", "0.8", "--labels-from"]
    result = patchlife(
        *line, table(tmp_path, photos, ["red panda", "tram", "tram", "tram", "tram", "tram", "red panda"])
    )
    assert result.code == 0, result.err
    assert "kNN dense" in result.out
    result = patchlife(*line, table(tmp_path, photos, ["tram"] * 7))
    assert "has no photos of several classes" in result.err
    assert "kNN" not in result.out


# ---- multi-label models


def precision(scores: list[float], positive: list[bool]) -> float:
    """Average precision from its definition, for scores without ties."""
    ranked = [right for _, right in sorted(zip(scores, positive, strict=True), reverse=True)]
    return sum(sum(ranked[: n + 1]) / (n + 1) for n, right in enumerate(ranked) if right) / sum(ranked)


def mean_precision(probabilities: list[list[float]], sets: list[set[int]]) -> float:
    present = sorted(set().union(*sets))
    columns = [([row[c] for row in probabilities], [c in found for found in sets]) for c in present]
    return sum(precision(*column) for column in columns) / len(present)


def test_probabilities_are_sigmoids(patchlife, model, photos, predicted):
    records = patchlife("predict", *model, *photos, "--budget", 1, "--top", CLASSES, "--multi-label").records
    for record, softmax in zip(records, predicted, strict=True):
        sigmoid = torch.tensor([p for _, p in sorted(_pairs(record))]).double()
        logits = (sigmoid / (1 - sigmoid)).log()
        assert torch.allclose(logits.softmax(0), torch.tensor(softmax).double(), atol=1e-4)
        assert abs(sigmoid.sum() - 1) > 0.05
        assert [p for _, p in _pairs(record)] == sorted((p for _, p in _pairs(record)), reverse=True)


@pytest.mark.parametrize("separator", [";", "|"])
def test_mean_average_precision(separator, patchlife, model, photos, tmp_path):
    sets = [{0, 3}, {1}, {3}, set(), {0, 1, 3}, {2}, {0}]
    file = table(tmp_path, photos, [separator.join(map(str, sorted(found))) for found in sets])
    line = [*model, photos[0].parent, "--multi-label", "--labels-from", file]
    result = patchlife("predict", *line, "--top", CLASSES, "--budget", 0.6)
    assert result.code == 0
    probabilities = [[p for _, p in sorted(_pairs(record))] for record in result.records]
    expected = 100 * mean_precision(probabilities, sets)
    assert f"mean average precision {expected:.2f} % of 7" in result.err
    evaluated = patchlife("eval", *line, "--budgets", "1,0.6", "--out", tmp_path / "scores.json")
    assert evaluated.code == 0
    assert "mAP" in evaluated.out
    assert (tmp_path / "scores.png").exists()
    dense, slim = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert (dense["budget"], dense["drop"], dense["difference"] < 1e-6) == (1, 0, True)
    assert slim["mean_average_precision"] == pytest.approx(expected / 100, abs=2e-3)
    assert slim["drop"] == pytest.approx(dense["mean_average_precision"] - slim["mean_average_precision"])
    assert slim["difference"] > 1e-3


def test_mean_average_precision_needs_the_probabilities_of_all_classes(patchlife, model, photos, tmp_path):
    file = table(tmp_path, photos, [0, 1, 2, 3, 4, 5, 6])
    result = patchlife("predict", *model, *photos, "--multi-label", "--labels-from", file)
    assert result.code == 2
    assert "needs the probability of every class, got --top 5; give --top 10" in result.err


def test_a_multi_label_run_is_not_continued_without_the_option(patchlife, model, photos, tmp_path):
    line = ["predict", *model, *photos, "--out", tmp_path / "p.jsonl"]
    assert patchlife(*line, "--multi-label").code == 0
    assert "was started with another model or other settings" in patchlife(*line, "--resume").err
