"""``patchlife fit`` and ``patchlife eval``: train an adapter on a folder of photos, and evaluate it."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from small import write_photos

QUICK = ["--epochs", 1, "--batch-size", 2, "--device", "cpu", "--budget", 0.8]


def labelled(folder: Path) -> Path:
    """A folder with photos of two classes of the small model."""
    for name in ("0", "1"):
        write_photos(folder / name, 4)
    return folder


def test_fit_then_eval(patchlife, model, tmp_path: Path) -> None:
    data, adapter = labelled(tmp_path / "photos"), tmp_path / "adapter"
    result = patchlife(
        "fit", *model, data, "--out", adapter, *QUICK, "--finetune", "adapter", "--finetune-epochs", 1, "--rank", 2
    )
    assert result.code == 0, result.err
    assert f"{adapter}: trained on" in result.err
    out = tmp_path / "scores.json"
    result = patchlife(
        "eval", adapter, data, "--budgets", "1.0,0.8", "--modes", "fixed,adaptive", "--out", out, "--device", "cpu"
    )
    assert result.code == 0, result.err
    assert result.out.count("fixed") == result.out.count("adaptive") == 2
    written = json.loads(out.read_text())
    assert [(score["mode"], score["budget"]) for score in written["scores"]] == [
        ("fixed", 1.0),
        ("fixed", 0.8),
        ("adaptive", 1.0),
        ("adaptive", 0.8),
    ]
    assert written["conditions"]["batch_size"] == 16
    assert out.with_suffix(".png").stat().st_size > 5000


def test_another_fit_into_the_same_folder_is_refused(patchlife, model, tmp_path: Path) -> None:
    data, adapter = labelled(tmp_path / "photos"), tmp_path / "adapter"
    command = ["fit", *model, data, "--out", adapter, *QUICK]
    assert patchlife(*command).code == 0
    before = (adapter / "adapter.safetensors").read_bytes()
    assert patchlife(*command).code == 0  # a finished run is not repeated
    result = patchlife(*command, "--learning-rate", "0.1")
    assert result.code == 2
    assert "regression learning_rate was 0.002, now 0.1. They were not used; to go on with that run" in result.err
    assert (adapter / "adapter.safetensors").read_bytes() == before
    assert patchlife(*command, "--learning-rate", "0.1", "--restart").code == 0
    assert (adapter / "adapter.safetensors").read_bytes() != before
    assert patchlife(*command, "--learning-rate", "0.1").code == 0


def test_fit_saves_schedule_and_mode(patchlife, model, tmp_path: Path) -> None:
    data, adapter = labelled(tmp_path / "photos"), tmp_path / "adapter"
    quick = [word for word in QUICK if word not in ("--budget", 0.8)]
    settings = ["--kept", "100,100,100,60,30,30", "--start", 3, "--mode", "adaptive"]
    result = patchlife("fit", *model, data, "--out", adapter, *quick, *settings, "--validation", data)
    assert result.code == 0, result.err
    config = json.loads((adapter / "adapter.json").read_text())["config"]
    assert (config["kept"], config["mode"]) == ([100, 100, 100, 60, 30, 30], "adaptive")


def test_invalid_settings_are_refused_before_a_model_is_built(patchlife, model, tmp_path: Path) -> None:
    result = patchlife("fit", *model, tmp_path, "--finetune-epochs", -1)
    assert (result.code, "finetune_epochs must be at least 0, got -1" in result.err) == (2, True)
    result = patchlife("eval", *model, tmp_path, "--budgets", "60")
    assert (result.code, "did you mean 0.6?" in result.err) == (2, True)


def test_label_weight_needs_folders_that_are_classes(patchlife, model, tmp_path: Path) -> None:
    write_photos(tmp_path / "holiday", 2)
    result = patchlife("fit", *model, tmp_path, *QUICK, "--label-weight", 0.5)
    assert result.code == 2
    assert "folder holiday is not a class of this model" in result.err


@pytest.mark.parametrize("label", [b"1", b"9", b"ten"])
def test_fit_reads_shards(patchlife, model, tmp_path: Path, label: bytes) -> None:
    photos = write_photos(tmp_path / "photos", 22)
    (tmp_path / "label.cls").write_bytes(label)
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for photo in photos[shard::2]:
                tar.add(photo, photo.name)
                tar.add(tmp_path / "label.cls", f"{photo.stem}.cls")
    finetune = ["--finetune", "full", "--finetune-epochs", 1, "--label-weight", 0.5]
    result = patchlife("fit", *model, tmp_path / "*.tar", "--out", tmp_path / "adapter", *QUICK, *finetune)
    if label == b"ten":
        assert result.code == 2
        assert ".png has the label 'ten', which is not a class of this model; its classes are 0 to 9" in result.err
        return
    assert result.code == 0, result.err
    assert "trained on 21 photos" in result.err
    report = (tmp_path / "adapter.work" / "report.html").read_text()
    assert "Life maps at budget" in report  # drawn over a photo that was opened a second time


def test_fit_reads_data_sets_of_timm(patchlife, model, tmp_path: Path) -> None:
    labelled(tmp_path / "photos" / "train")
    data, out = f"timm:folder:train:{tmp_path / 'photos'}", tmp_path / "adapter"
    result = patchlife("fit", *model, data, "--out", out, *QUICK)
    assert result.code == 0, result.err
    assert "trained on 8 photos" in result.err


def test_fit_validates_on_labelled_folders(patchlife, model, tmp_path: Path) -> None:
    data, validation = labelled(tmp_path / "photos"), labelled(tmp_path / "validation")
    write_photos(validation / "zebra", 1)
    result = patchlife("fit", *model, data, "--out", tmp_path / "a", *QUICK, "--validation", validation)
    assert result.code == 2
    assert "folder zebra is not a class of this model" in result.err
    result = patchlife(
        "fit", *model, data, "--out", tmp_path / "a", *QUICK, "--validation", f"{data},{validation / '1'}"
    )
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in (tmp_path / "a.work" / "metrics.jsonl").read_text().splitlines()]
    assert {line["validation"] for line in lines if "validation" in line} == {"photos", "1"}
