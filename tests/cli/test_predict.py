"""``patchlife predict`` on a small model: records, their order, photos that cannot be read, and errors."""

from __future__ import annotations

import os
import shutil
import sys

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from small import NAME, photo, write_photos

import patchlife.runtime.inference as inference
from patchlife import LifeConfig, save, wrap
from patchlife.data import Preprocess, read_photo
from patchlife.slimming import SlimModel


def close(a: dict, b: dict) -> bool:
    """Whether two records are equal up to rounding."""
    pairs = list(zip(a["top"], b["top"], strict=True))
    same = all(x["class"] == y["class"] and abs(x["probability"] - y["probability"]) < 1e-4 for x, y in pairs)
    return bool(pairs) and same and {**a, "top": 0} == {**b, "top": 0}


def all_close(records: list[dict], expected: list[dict], count: int) -> bool:
    """Whether there are ``count`` records, each close to the expected one."""
    assert len(records) == len(expected) == count
    return all(close(a, b) for a, b in zip(records, expected, strict=True))


def test_there_is_a_record_for_each_photo_in_the_order_of_the_paths(patchlife, model, photos):
    result = patchlife("predict", *model, photos[4], photos[0].parent, "--top", 3, "--batch-size", 2)
    assert result.code == 0
    assert [r["path"] for r in result.records] == [str(photos[i]) for i in (4, 0, 1, 2, 3, 5, 6)]
    first = result.records[0]
    assert list(first) == ["path", "top", "flops", "fraction_of_dense", "kept", "run"]
    assert [list(entry) for entry in first["top"]] == [["class", "label", "probability"]] * 3
    probabilities = [entry["probability"] for entry in first["top"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert len(first["kept"]) == 6
    assert first["kept"][0] == 100
    assert 0.55 < first["fraction_of_dense"] <= 0.6
    assert f"7 photos, 0 failed, {first['fraction_of_dense']:.3f} of the dense FLOPs" in result.err
    assert "photos/s" in result.err


@pytest.mark.parametrize(("verb", "file"), [("predict", "records.jsonl"), ("embed", "vectors.npy")])
def test_the_number_of_cpu_threads_is_set(verb, file, patchlife, model, photos, tmp_path):
    assert torch.get_num_threads() == 1
    assert patchlife(verb, *model, photos[0], "--threads", 2, "--out", tmp_path / file).code == 0
    assert torch.get_num_threads() == 2


def test_budget_1_gives_the_probabilities_of_the_backbone(patchlife, model, photos, vit_file):
    result = patchlife("predict", *model, *photos, "--budget", 1, "--top", 10)
    vit = timm.create_model(NAME, num_classes=10).eval()
    vit.load_state_dict(load_file(vit_file))
    preprocess = Preprocess.from_timm_cfg(vit.pretrained_cfg)
    with torch.no_grad():
        expected = vit(torch.stack([preprocess(read_photo(p)) for p in photos])).softmax(-1)
    for record, row in zip(result.records, expected, strict=True):
        assert record["fraction_of_dense"] == 1
        for entry in record["top"]:
            assert entry["probability"] == pytest.approx(float(row[entry["class"]]), abs=2e-5)


def test_records_can_be_written_to_a_file(patchlife, model, photos, tmp_path):
    out = tmp_path / "new" / "out.jsonl"
    result = patchlife("predict", *model, *photos, "--out", out)
    assert (result.code, result.out) == (0, "")
    assert len(out.read_text().splitlines()) == 7
    assert out.read_text() == patchlife("predict", *model, *photos).out


def test_an_existing_file_is_not_overwritten(patchlife, model, photos, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("mine\n")
    result = patchlife("predict", *model, *photos, "--out", out)
    assert result.code == 2
    assert "out.jsonl already exists; continue it with --resume, or choose another --out" in result.err
    assert out.read_text() == "mine\n"


def test_photos_that_cannot_be_read_fail_alone_and_the_exit_code_is_1(patchlife, model, photos):
    good = {r["path"]: r for r in patchlife("predict", *model, *photos).records}
    photos[1].write_bytes(b"")
    photos[3].write_bytes(photos[3].read_bytes()[:200])
    photos[4].write_bytes(b"II*\0 not a photo")
    photos[6].write_text("hello")
    result = patchlife("predict", *model, photos[0].parent, "--batch-size", 3)
    assert result.code == 1
    assert [r["path"] for r in result.records] == list(map(str, photos))
    messages = {1: "found an empty file", 3: "found a damaged file", 4: "found a TIFF", 6: "begins with b'hello'"}
    for index, record in enumerate(result.records):
        if index in messages:
            assert list(record) == ["path", "error", "run"]
            assert messages[index] in record["error"]
        else:
            assert close(record, good[record["path"]])
    assert "7 photos, 4 failed (the first: " in result.err


def test_no_photo_can_be_read(patchlife, model, photos):
    for path in photos:
        path.write_bytes(b"")
    result = patchlife("predict", *model, *photos, "--mode", "adaptive")
    assert result.code == 1
    assert [record["path"] for record in result.records if "empty file" in record["error"]] == list(map(str, photos))


def test_a_decompression_bomb_is_refused(patchlife, model, photos, tmp_path):
    bomb = tmp_path / "bomb.png"
    Image.new("1", (12_000, 12_000)).save(bomb)
    result = patchlife("predict", *model, bomb, photos[0])
    assert result.code == 1
    assert "expected at most 64,000,000 pixels, found 12000 x 12000" in result.records[0]["error"]
    assert "top" in result.records[1]


@pytest.mark.parametrize("make", ["1x1", "1x20000", "CMYK", "palette", "16-bit", "animated"])
def test_unusual_photos_work(make, patchlife, model, tmp_path):
    path, image = tmp_path / f"{make}.png", photo(3)
    match make:
        case "1x1" | "1x20000":
            Image.new("RGB", tuple(map(int, make.split("x"))), "red").save(path)
        case "CMYK":
            image.convert("CMYK").save(path.with_suffix(".jpg"))
            path = path.with_suffix(".jpg")
        case "palette":
            image.quantize().save(path, transparency=0)
        case "16-bit":
            Image.fromarray((torch.arange(6000).reshape(60, 100) * 10).numpy().astype("uint16")).save(path)
        case "animated":
            path = path.with_suffix(".webp")
            image.save(path, save_all=True, append_images=[photo(4)])
    result = patchlife("predict", *model, path)
    assert (result.code, len(result.records[0]["top"])) == (0, 5)


@pytest.mark.parametrize(("tag", "stored"), [(3, "ROTATE_180"), (6, "ROTATE_90"), (8, "ROTATE_270"), (5, "TRANSPOSE")])
def test_exif_orientation_is_applied(tag, stored, patchlife, model, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = tag
    photo(1).save(tmp_path / "upright.png")
    photo(1).transpose(Image.Transpose[stored]).save(tmp_path / "rotated.png", exif=exif)
    upright, rotated = patchlife("predict", *model, tmp_path / "upright.png", tmp_path / "rotated.png").records
    assert close({**rotated, "path": upright["path"]}, upright)


def test_nan_in_one_photo_does_not_change_the_others_of_the_batch(patchlife, model, photos, monkeypatch):
    expected = patchlife("predict", *model, *photos).records
    real = inference.load_batches

    def poisoned(*args, **kwargs):
        for batch in real(*args, **kwargs):
            batch.images[2] = torch.nan
            yield batch

    monkeypatch.setattr(inference, "load_batches", poisoned)
    result = patchlife("predict", *model, *photos)
    assert result.code == 1
    assert "NaN or infinite" in result.records[2]["error"]
    assert all(close(result.records[i], expected[i]) for i in (0, 1, 3, 4, 5, 6))


def test_a_batch_too_large_is_halved_until_it_fits(patchlife, model, photos, monkeypatch):
    expected = patchlife("predict", *model, *photos).records
    real = SlimModel.predict

    def small_memory(self, images):
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB\nand more lines")
        return real(self, images)

    monkeypatch.setattr(SlimModel, "predict", small_memory)
    result = patchlife("predict", *model, *photos)
    assert result.code == 0
    assert all_close(result.records, expected, 7)


def test_a_photo_on_which_the_model_fails_fails_alone(patchlife, model, photos, monkeypatch):
    real, seen = SlimModel.predict, []

    def fragile(self, images):
        seen.append(len(images))
        if float(images[:, 0, 0, 0].min()) == marked:
            raise RuntimeError("no kernel for this\nand a long trace")
        return real(self, images)

    from patchlife.runtime.opening import ModelConfig, open_pipeline

    pipeline = open_pipeline(ModelConfig(NAME, checkpoint=model[2]))
    first = [float(pipeline.preprocess(Image.open(p))[0, 0, 0]) for p in photos]
    marked = min(first)
    monkeypatch.setattr(SlimModel, "predict", fragile)
    result = patchlife("predict", *model, *photos)
    assert result.code == 1
    failed = [i for i, record in enumerate(result.records) if "error" in record]
    assert failed == [first.index(marked)]
    assert result.records[failed[0]]["error"].endswith("no kernel for this")


@pytest.mark.parametrize("budget", [0.5, 0.7])
def test_adaptive_mode_is_calibrated_first_so_results_do_not_depend_on_the_batch_size(budget, patchlife, model, photos):
    line = ["predict", *model, *photos, "--mode", "adaptive", "--budget", budget]
    whole, single = patchlife(*line, "--batch-size", 7), patchlife(*line, "--batch-size", 1)
    assert "calibrated it on 7 of the photos" in whole.err
    assert whole.code == single.code == 0
    assert all_close(whole.records, single.records, 7)
    fractions = [record["fraction_of_dense"] for record in whole.records]
    assert len(set(fractions)) > 1, "all images keep the same number of patches"
    assert sum(fractions) / len(fractions) == pytest.approx(budget, rel=0.02)


def test_calibration_uses_evenly_spaced_photos_and_skips_those_that_cannot_be_read(tmp_path, vit_file, monkeypatch):
    from patchlife.runtime.opening import ModelConfig, open_pipeline

    paths = write_photos(tmp_path, 11)
    paths[4].write_bytes(b"")
    pipeline = open_pipeline(ModelConfig(NAME, checkpoint=vit_file, life={"mode": "adaptive"}))
    monkeypatch.setattr(inference, "CALIBRATION_PHOTOS", 4)
    chosen = []
    monkeypatch.setattr(
        inference,
        "load_batches",
        lambda paths, *rest, real=inference.load_batches: real((chosen.append(p) or p for p in paths), *rest),
    )
    assert inference.calibrate(pipeline, paths, workers=1) == 4
    assert chosen[:4] == [paths[0], paths[2], paths[5], paths[8]]
    assert pipeline.model.calibration.images == 4


def test_labelled_folders_give_top_1(patchlife, model, photos, tmp_path):
    records = patchlife("predict", *model, *photos).records
    sorted_in = []
    for index, record in enumerate(records):
        label = record["top"][0]["label"] if index < 5 else record["top"][1]["label"]  # two of seven are wrong
        sorted_in.append(tmp_path / "sorted" / label / photos[index].name)
        sorted_in[-1].parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos[index], sorted_in[-1])
    result = patchlife("predict", *model, tmp_path / "sorted", "--labelled")
    assert "top-1 71.43 % of 7" in result.err


def test_labelled_folders_must_be_classes(patchlife, model, photos):
    result = patchlife("predict", *model, *photos, "--labelled")
    assert result.code == 2
    assert "folder photos is not a class of this model, whose classes are the numbers 0 to 9;" in result.err
    assert result.out == ""


def test_class_names_from_a_file(patchlife, model, photos, tmp_path):
    names = [f"class number {i}" for i in range(10)]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    result = patchlife("predict", *model, photos[0], "--labels", tmp_path / "names.txt")
    top = result.records[0]["top"]
    assert len(top) == 5
    assert [entry["label"] for entry in top] == [names[entry["class"]] for entry in top]


def test_a_missing_photo(patchlife, model):
    result = patchlife("predict", *model, "/no/such/photo.jpg")
    assert result.code == 2
    assert "/no/such/photo.jpg: expected a photo, folder or glob, found no such file" in result.err


def test_an_unreadable_folder(patchlife, model, photos, monkeypatch):
    real = os.scandir

    def scan(folder):
        if str(folder).endswith("photos"):
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(os, "scandir", scan)
    result = patchlife("predict", *model, photos[0].parent)
    assert result.code == 2
    assert "photos: expected a folder that can be read, found Permission denied" in result.err


def test_a_closed_output_gives_exit_code_141_without_a_message(model, photos, monkeypatch, capfd):
    from patchlife.cli.main import main

    end, start = os.pipe()
    os.close(end)
    with os.fdopen(start, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        code = main([str(word) for word in ("predict", *model, *photos)])
        monkeypatch.undo()
    assert code == 141
    assert capfd.readouterr().err == ""


def test_a_full_disk_is_named(patchlife, model, photos):
    result = patchlife("predict", *model, *photos, "--out", "/dev/full")
    assert result.code == 2
    assert "No space left on device" in result.err


def test_a_bug_is_reported_as_a_bug(patchlife, model, photos, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(inference, "predict_photos", broken)
    result = patchlife("predict", *model, *photos)
    assert result.code == 70
    assert result.err.splitlines()[-1].startswith("patchlife: error: this is a bug (ZeroDivisionError)")


def test_the_progress_bar_can_be_switched_on(patchlife, model, photos):
    result = patchlife("predict", *model, *photos, "--progress")
    assert "7/7" in result.err
    assert len(result.records) == 7


@pytest.mark.parametrize("engine", ["compile", "onnx", "openvino"])
def test_an_engine_with_an_adaptive_adapter_names_the_option_that_sets_the_mode(
    engine, patchlife, model, photos, vit_file, tmp_path
):
    vit = timm.create_model(NAME, num_classes=10).eval()
    vit.load_state_dict(load_file(vit_file))
    save(wrap(vit, LifeConfig(mode="adaptive")), tmp_path / "adapter")
    line = ["predict", tmp_path / "adapter", *photos, "--checkpoint", vit_file]
    result = patchlife(*line, "--engine", engine)
    assert (result.code, result.out) == (2, "")
    assert f"--engine {engine} runs fixed mode only, got adaptive; add --mode fixed" in result.err
    assert patchlife(*line, "--mode", "fixed").code == 0
