"""``patchlife fit`` and ``patchlife eval``: from a folder of photos to an adapter, and to its accuracy."""

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
    run = patchlife(
        "fit", *model, data, "--out", adapter, *QUICK, "--finetune", "adapter", "--finetune-epochs", 1, "--rank", 2
    )
    assert run.code == 0, run.err
    assert f"{adapter}: trained on" in run.err
    out = tmp_path / "scores.json"
    run = patchlife(
        "eval", adapter, data, "--budgets", "1.0,0.8", "--modes", "fixed,adaptive", "--out", out, "--device", "cpu"
    )
    assert run.code == 0, run.err
    assert run.out.count("fixed") == run.out.count("adaptive") == 2
    result = json.loads(out.read_text())
    assert [(score["mode"], score["budget"]) for score in result["scores"]] == [
        ("fixed", 1.0),
        ("fixed", 0.8),
        ("adaptive", 1.0),
        ("adaptive", 0.8),
    ]
    at_1 = result["scores"][0]
    assert (at_1["agreement"], at_1["divergence"]) == (1, pytest.approx(0, abs=1e-9)), "not the dense model at budget 1"
    assert result["conditions"]["batch_size"] == 16
    assert out.with_suffix(".png").stat().st_size > 5000


def test_another_fit_into_the_same_folder_is_refused(patchlife, model, tmp_path: Path) -> None:
    data, adapter = labelled(tmp_path / "photos"), tmp_path / "adapter"
    command = ["fit", *model, data, "--out", adapter, *QUICK]
    assert patchlife(*command).code == 0
    before = (adapter / "adapter.safetensors").read_bytes()
    assert patchlife(*command).code == 0  # the same command resumes the finished run
    run = patchlife(*command, "--learning-rate", "0.1")
    assert run.code == 2
    assert "regression learning_rate was 0.002, now 0.1. They were not used; to resume that run" in run.err
    assert (adapter / "adapter.safetensors").read_bytes() == before
    assert patchlife(*command, "--learning-rate", "0.1", "--restart").code == 0
    assert (adapter / "adapter.safetensors").read_bytes() != before
    assert patchlife(*command, "--learning-rate", "0.1").code == 0


def test_fit_keeps_schedule_and_mode(patchlife, model, tmp_path: Path) -> None:
    data, adapter = labelled(tmp_path / "photos"), tmp_path / "adapter"
    quick = [word for word in QUICK if word not in ("--budget", 0.8)]
    settings = ["--kept", "100,100,100,60,30,30", "--start", 3, "--mode", "adaptive"]
    run = patchlife("fit", *model, data, "--out", adapter, *quick, *settings, "--validation", data)
    assert run.code == 0, run.err
    config = json.loads((adapter / "adapter.json").read_text())["config"]
    assert (config["kept"], config["mode"]) == ([100, 100, 100, 60, 30, 30], "adaptive")


def test_settings_that_cannot_work_are_refused_before_any_model_is_built(patchlife, model, tmp_path: Path) -> None:
    run = patchlife("fit", *model, tmp_path, "--finetune-epochs", -1)
    assert (run.code, "finetune_epochs must be at least 0, got -1" in run.err) == (2, True)
    run = patchlife("fit", *model, tmp_path, "--tracker", "tensorbord")
    assert (run.code, "tracker must be one of" in run.err) == (2, True)
    run = patchlife("eval", *model, tmp_path, "--budgets", "60")
    assert (run.code, "did you mean 0.6?" in run.err) == (2, True)


def test_labels_need_folders_that_are_classes(patchlife, model, tmp_path: Path) -> None:
    write_photos(tmp_path / "holiday", 2)
    run = patchlife("fit", *model, tmp_path, *QUICK, "--label-weight", 0.5)
    assert run.code == 2
    assert "folder holiday is not a class of this model" in run.err


@pytest.mark.parametrize("label", [b"1", b"9", b"ten"])
def test_fit_reads_shards(patchlife, model, tmp_path: Path, label: bytes) -> None:
    photos = write_photos(tmp_path / "photos", 22)
    (tmp_path / "label.cls").write_bytes(label)
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for photo in photos[shard::2]:
                tar.add(photo, photo.name)
                tar.add(tmp_path / "label.cls", f"{photo.stem}.cls")
    learned = ["--finetune", "full", "--finetune-epochs", 1, "--label-weight", 0.5]
    run = patchlife("fit", *model, tmp_path / "*.tar", "--out", tmp_path / "adapter", *QUICK, *learned)
    if label == b"ten":
        assert run.code == 2
        assert ".png has the label 'ten', which is not a class of this model; its classes are 0 to 9" in run.err
        return
    assert run.code == 0, run.err
    assert "trained on 21 photos" in run.err
    report = (tmp_path / "adapter.work" / "report.html").read_text()
    assert "Life maps at budget" in report  # it shows photos of the shards


def test_fit_reads_what_timm_opens(patchlife, model, tmp_path: Path) -> None:
    labelled(tmp_path / "photos" / "train")
    data, out = f"timm:folder:train:{tmp_path / 'photos'}", tmp_path / "adapter"
    run = patchlife("fit", *model, data, "--out", out, *QUICK)
    assert run.code == 0, run.err
    assert "trained on 8 photos" in run.err


def test_fit_validates_on_labelled_folders(patchlife, model, tmp_path: Path) -> None:
    data, validation = labelled(tmp_path / "photos"), labelled(tmp_path / "validation")
    write_photos(validation / "zebra", 1)
    run = patchlife("fit", *model, data, "--out", tmp_path / "a", *QUICK, "--validation", validation)
    assert run.code == 2
    assert "folder zebra is not a class of this model" in run.err
    run = patchlife("fit", *model, data, "--out", tmp_path / "a", *QUICK, "--validation", f"{data},{validation / '1'}")
    assert run.code == 0, run.err
    lines = [json.loads(line) for line in (tmp_path / "a.work" / "metrics.jsonl").read_text().splitlines()]
    assert {line["validation"] for line in lines if "validation" in line} == {"photos", "1"}


@pytest.mark.parametrize("option", [("--budget", 0.5), ("--speedup", 2), ("--mode", "adaptive")])
def test_eval_refuses_options_without_effect(patchlife, model, tmp_path: Path, option) -> None:
    run = patchlife("eval", *model, labelled(tmp_path / "photos"), *option)
    assert run.code == 2
    assert f"{option[0]} has no effect in eval; give --budgets and --modes instead" in run.err
