"""What every verb says about the photos that it finds and about the folders that they lie in."""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from pathlib import Path

import pytest
from small import NAME, checkpoint, write_photos

TWELVE = [str(n) for n in range(12)]
IN_TEXT_ORDER = sorted(TWELVE)


@pytest.fixture(scope="session")
def twelve(tmp_path_factory) -> list[object]:
    """A model of twelve classes that have only numbers."""
    return [NAME, "--checkpoint", checkpoint(tmp_path_factory.mktemp("twelve") / "vit.safetensors", num_classes=12)]


@pytest.fixture
def sorted_photos(twelve, patchlife, tmp_path) -> tuple[Path, list[tuple[str, int]]]:
    """Photos in folders 0 to 11 as ImageFolder would number the model's answers, and (folder, answer) of each."""
    photos = write_photos(tmp_path / "unsorted", 14)
    answers = [r["top"][0]["class"] for r in patchlife("predict", *twelve, *photos, "--budget", 1).records]
    placed = [(IN_TEXT_ORDER[answer], answer) for answer in answers]
    placed += [(folder, answers[0]) for folder in TWELVE]  # so that no folder is empty
    for index, (folder, _) in enumerate(placed):
        (tmp_path / "sorted" / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(photos[index if index < 14 else 0], tmp_path / "sorted" / folder / f"{index}.png")
    return tmp_path / "sorted", placed


def right(placed: list[tuple[str, int]], order: list[str]) -> float:
    return 100 * sum(order[answer] == folder for folder, answer in placed) / len(placed)


@pytest.mark.parametrize(
    ("options", "order", "told"),
    [
        ([], TWELVE, "folders are read as class numbers: 10 is class 10. torchvision's ImageFolder takes"),
        (["--class-order", "number"], TWELVE, "folders are read as class numbers"),
        (["--class-order", "imagefolder"], IN_TEXT_ORDER, "in the order of their names as text: 0 is class 0, 1 is"),
    ],
)
def test_predict_and_eval_say_how_folders_are_read(options, order, told, twelve, sorted_photos, patchlife, tmp_path):
    folder, placed = sorted_photos
    expected = right(placed, order)
    said = patchlife("predict", *twelve, folder, "--labelled", "--budget", 1, *options)
    assert said.code == 0
    assert told in said.err
    assert f"top-1 {expected:.2f} % of {len(placed)}" in said.err
    out = tmp_path / "scores.json"
    said = patchlife("eval", *twelve, folder, "--budgets", 1.0, "--out", out, "--device", "cpu", *options)
    assert said.code == 0
    assert told in said.err
    (score,) = json.loads(out.read_text())["scores"]
    assert score["top1"] == pytest.approx(expected / 100)
    assert json.loads(out.read_text())["class_order"] == (options[1] if options else None)


def test_the_orders_differ_in_what_is_right(sorted_photos):
    _, placed = sorted_photos
    assert right(placed, TWELVE) < right(placed, IN_TEXT_ORDER)


def test_a_part_of_the_photos_keeps_all_the_folders(twelve, sorted_photos, patchlife):
    """Taking every 13th photo leaves folders out; their order is still that of all folders."""
    said = patchlife("eval", *twelve, sorted_photos[0], "--every", 13, "--budgets", 1.0, "--class-order", "imagefolder")
    assert said.code == 0, said.err
    said = patchlife("predict", *twelve, sorted_photos[0] / "10", "--labelled", "--class-order", "imagefolder")
    assert said.code == 2
    assert "takes 12 folders of photos, got 1 (10); give all of them" in said.err


def test_folders_of_any_name_in_imagefolders_order(patchlife, tmp_path, model):
    for name in "jihgfedcba":
        write_photos(tmp_path / "data" / name, 1)
    said = patchlife("predict", *model, tmp_path / "data", "--labelled")
    assert (said.code, said.out) == (2, "")
    assert "folder a is not a class of this model (also not: b, c, d, e, 5 more), whose classes are numbers" in said.err
    assert "--class-order imagefolder" in said.err
    said = patchlife("predict", *model, tmp_path / "data", "--labelled", "--class-order", "imagefolder")
    assert said.code == 0
    assert "a is class 0, b is class 1, c is class 2" in said.err


def test_export_and_bench_read_folders_alike(patchlife, tmp_path, model):
    for name in "jihgfedcba":
        write_photos(tmp_path / "data" / name, 1)
    export = ["export", *model, "--format", "torch", "--out", tmp_path / "m.pt2", "--photos", tmp_path / "data"]
    said = patchlife(*export, "--labelled")
    assert (said.code, (tmp_path / "m.pt2").exists()) == (2, False)
    assert "folder a is not a class" in said.err
    bench = ["bench", *model, "--data", tmp_path / "data", "--no-speed", "--out", tmp_path / "b", "--methods", "dense"]
    said = patchlife(*bench)
    assert said.code == 2
    assert "folder a is not a class" in said.err
    said = patchlife(*bench, "--class-order", "imagefolder")
    assert said.code == 0, said.err
    assert "a is class 0, b is class 1" in said.err


def test_fit_reads_folders_alike(patchlife, tmp_path, model):
    for name in "jihgfedcba":
        write_photos(tmp_path / "data" / name, 1)
    fit = ["fit", *model, tmp_path / "data", "--epochs", 1, "--batch-size", 2, "--budget", 0.8, "--device", "cpu"]
    fit += ["--out", tmp_path / "a", "--validation", tmp_path / "data"]
    said = patchlife(*fit)
    assert said.code == 2
    assert "folder a is not a class of this model" in said.err
    said = patchlife(*fit, "--class-order", "imagefolder")
    assert said.code == 0, said.err
    assert said.err.count("a is class 0, b is class 1, c is class 2") == 1


def test_a_labels_file_with_a_mark_and_accents(patchlife, tmp_path, model):
    accented = unicodedata.normalize("NFD", "café")
    write_photos(tmp_path / "data" / accented, 2)
    (tmp_path / "names.txt").write_bytes("café\nb\nc\nd\ne\nf\ng\nh\ni\nj\n".encode("utf-8-sig"))
    said = patchlife("predict", *model, tmp_path / "data", "--labelled", "--labels", tmp_path / "names.txt")
    assert said.code == 0, said.err
    assert "folders are read as class names\n" in said.err
    assert "of 2" in said.err


# ---- files beside photos


LEFT_OUT = "patchlife: 4 files are left out, by suffix: .heic (2), .txt (1), no suffix (1); read are .jpg, .jpeg, .jpe,"


@pytest.fixture
def mixed(tmp_path) -> Path:
    photos = write_photos(tmp_path / "mixed" / "0", 3)
    photos[0].rename(photos[0].with_suffix(".jfif"))
    for name in ("a.heic", "b.HEIC", "notes.txt", "LICENSE", ".hidden.heic", ".DS_Store"):
        (photos[0].parent / name).touch()
    return tmp_path / "mixed"


def lines_of(err: str) -> list[str]:
    return re.findall("^patchlife: .* left out.*$", err, re.MULTILINE)


def test_what_is_no_photo_is_counted_in_one_line(patchlife, model, mixed, tmp_path):
    for verb in (
        ["predict", *model, mixed, mixed / "0"],
        ["predict", *model, mixed / "0" / "*"],
        ["draw", *model, mixed, "--out", tmp_path / "pictures"],
        ["eval", *model, mixed, "--budgets", 1.0],
        ["export", *model, "--format", "torch", "--photos", mixed, "--out", tmp_path / "m.pt2"],
        ["fit", *model, mixed, "--epochs", 1, "--batch-size", 2, "--budget", 0.8, "--out", tmp_path / "a"],
    ):
        said = patchlife(*verb)
        assert said.code == 0, said.err
        (line,) = lines_of(said.err)
        assert line.startswith(LEFT_OUT)


def test_nothing_is_said_where_all_are_photos(patchlife, model, photos):
    said = patchlife("predict", *model, photos[0].parent, photos[1])
    assert (said.code, lines_of(said.err)) == (0, [])


def test_one_file_is_one(patchlife, model, photos):
    (photos[0].parent / "a.txt").touch()
    (line,) = lines_of(patchlife("predict", *model, photos[0].parent).err)
    assert line.startswith("patchlife: 1 file is left out, by suffix: .txt (1);")


def test_a_photo_that_is_too_large_is_told_what_can_be_done(patchlife, model, tmp_path):
    from PIL import Image

    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")
    said = patchlife("predict", *model, tmp_path / "large.png")
    assert said.records[0]["error"].endswith("found 9000 x 9000 = 81,000,000; scale the photo down")
