"""What the verbs print about the photos that they find and about the classes of folders."""

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
    """The arguments that select a model of twelve classes without names."""
    return [NAME, "--checkpoint", checkpoint(tmp_path_factory.mktemp("twelve") / "vit.safetensors", num_classes=12)]


@pytest.fixture
def sorted_photos(twelve, patchlife, tmp_path) -> tuple[Path, list[tuple[str, int]]]:
    """A folder of photos, sorted into folders 0 to 11 so that predictions are correct in the order of ImageFolder.

    Also returns (folder, predicted class) of each photo.
    """
    photos = write_photos(tmp_path / "unsorted", 14)
    predicted = [r["top"][0]["class"] for r in patchlife("predict", *twelve, *photos, "--budget", 1).records]
    placed = [(IN_TEXT_ORDER[index], index) for index in predicted]
    placed += [(folder, predicted[0]) for folder in TWELVE]  # so that no folder is empty
    for index, (folder, _) in enumerate(placed):
        (tmp_path / "sorted" / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(photos[index if index < 14 else 0], tmp_path / "sorted" / folder / f"{index}.png")
    return tmp_path / "sorted", placed


def top1(placed: list[tuple[str, int]], order: list[str]) -> float:
    """Top-1 in % if the folders are classes in this order."""
    return 100 * sum(order[predicted] == folder for folder, predicted in placed) / len(placed)


@pytest.mark.parametrize(
    ("options", "order", "message"),
    [
        ([], TWELVE, "folders are read as class numbers: 10 is class 10. torchvision's ImageFolder sorts"),
        (["--class-order", "number"], TWELVE, "folders are read as class numbers"),
        (["--class-order", "imagefolder"], IN_TEXT_ORDER, "sorted by name as text: 0 is class 0, 1 is"),
    ],
)
def test_predict_and_eval_print_how_folders_are_read(
    options, order, message, twelve, sorted_photos, patchlife, tmp_path
):
    folder, placed = sorted_photos
    expected = top1(placed, order)
    result = patchlife("predict", *twelve, folder, "--labelled", "--budget", 1, *options)
    assert result.code == 0
    assert message in result.err
    assert f"top-1 {expected:.2f} % of {len(placed)}" in result.err
    out = tmp_path / "scores.json"
    result = patchlife("eval", *twelve, folder, "--budgets", 1.0, "--out", out, "--device", "cpu", *options)
    assert result.code == 0
    assert message in result.err
    (score,) = json.loads(out.read_text())["scores"]
    assert score["top1"] == pytest.approx(expected / 100)
    assert json.loads(out.read_text())["class_order"] == (options[1] if options else None)


def test_the_orders_give_different_accuracy(sorted_photos):
    _, placed = sorted_photos
    assert top1(placed, TWELVE) < top1(placed, IN_TEXT_ORDER)


def test_every_nth_photo_does_not_change_the_classes_of_folders(twelve, sorted_photos, patchlife):
    """Every 13th photo leaves folders out; the class numbers still come from the list of all folders."""
    result = patchlife(
        "eval", *twelve, sorted_photos[0], "--every", 13, "--budgets", 1.0, "--class-order", "imagefolder"
    )
    assert result.code == 0, result.err
    result = patchlife("predict", *twelve, sorted_photos[0] / "10", "--labelled", "--class-order", "imagefolder")
    assert result.code == 2
    assert "each of the 12 classes, got 1 folders (10); give all folders" in result.err


def test_class_order_imagefolder_allows_any_folder_names(patchlife, tmp_path, model):
    for name in "jihgfedcba":
        write_photos(tmp_path / "data" / name, 1)
    result = patchlife("predict", *model, tmp_path / "data", "--labelled")
    assert (result.code, result.out) == (2, "")
    assert (
        "folder a is not a class of this model (also not: b, c, d, e, 5 more), whose classes are the numbers"
        in result.err
    )
    assert "--class-order imagefolder" in result.err
    result = patchlife("predict", *model, tmp_path / "data", "--labelled", "--class-order", "imagefolder")
    assert result.code == 0
    assert "a is class 0, b is class 1, c is class 2" in result.err


def test_export_and_bench_read_folders_in_the_same_way(patchlife, tmp_path, model):
    for name in "jihgfedcba":
        write_photos(tmp_path / "data" / name, 1)
    export = ["export", *model, "--format", "torch", "--out", tmp_path / "m.pt2", "--photos", tmp_path / "data"]
    result = patchlife(*export, "--labelled")
    assert (result.code, (tmp_path / "m.pt2").exists()) == (2, False)
    assert "folder a is not a class" in result.err
    bench = ["bench", *model, "--data", tmp_path / "data", "--no-speed", "--out", tmp_path / "b", "--methods", "dense"]
    result = patchlife(*bench)
    assert result.code == 2
    assert "folder a is not a class" in result.err
    result = patchlife(*bench, "--class-order", "imagefolder")
    assert result.code == 0, result.err
    assert "a is class 0, b is class 1" in result.err


def test_fit_reads_folders_in_the_same_way(patchlife, tmp_path, model):
    for name in "jihgfedcba":
        write_photos(tmp_path / "data" / name, 1)
    fit = ["fit", *model, tmp_path / "data", "--epochs", 1, "--batch-size", 2, "--budget", 0.8, "--device", "cpu"]
    fit += ["--out", tmp_path / "a", "--validation", tmp_path / "data"]
    result = patchlife(*fit)
    assert result.code == 2
    assert "folder a is not a class of this model" in result.err
    result = patchlife(*fit, "--class-order", "imagefolder")
    assert result.code == 0, result.err
    assert result.err.count("a is class 0, b is class 1, c is class 2") == 1


def test_a_labels_file_with_a_byte_order_mark_and_accents(patchlife, tmp_path, model):
    accented = unicodedata.normalize("NFD", "café")
    write_photos(tmp_path / "data" / accented, 2)
    (tmp_path / "names.txt").write_bytes("café\nb\nc\nd\ne\nf\ng\nh\ni\nj\n".encode("utf-8-sig"))
    result = patchlife("predict", *model, tmp_path / "data", "--labelled", "--labels", tmp_path / "names.txt")
    assert result.code == 0, result.err
    assert "folders are read as class names\n" in result.err
    assert "of 2" in result.err


# ---- files that are not photos


LEFT_OUT = (
    "patchlife: 4 files are left out, by suffix: .heic (2), .txt (1), no suffix (1); suffixes of photos are .jpg,"
)


@pytest.fixture
def mixed(tmp_path) -> Path:
    photos = write_photos(tmp_path / "mixed" / "0", 3)
    photos[0].rename(photos[0].with_suffix(".jfif"))
    for name in ("a.heic", "b.HEIC", "notes.txt", "LICENSE", ".hidden.heic", ".DS_Store"):
        (photos[0].parent / name).touch()
    return tmp_path / "mixed"


def lines_of(err: str) -> list[str]:
    return re.findall("^patchlife: .* left out.*$", err, re.MULTILINE)


def test_files_that_are_not_photos_are_counted_in_one_line(patchlife, model, mixed, tmp_path):
    for verb in (
        ["predict", *model, mixed, mixed / "0"],
        ["predict", *model, mixed / "0" / "*"],
        ["draw", *model, mixed, "--out", tmp_path / "pictures"],
        ["eval", *model, mixed, "--budgets", 1.0],
        ["export", *model, "--format", "torch", "--photos", mixed, "--out", tmp_path / "m.pt2"],
        ["fit", *model, mixed, "--epochs", 1, "--batch-size", 2, "--budget", 0.8, "--out", tmp_path / "a"],
    ):
        result = patchlife(*verb)
        assert result.code == 0, result.err
        (line,) = lines_of(result.err)
        assert line.startswith(LEFT_OUT)


def test_nothing_is_printed_if_all_files_are_photos(patchlife, model, photos):
    result = patchlife("predict", *model, photos[0].parent, photos[1])
    assert (result.code, lines_of(result.err)) == (0, [])


def test_a_single_file_left_out(patchlife, model, photos):
    (photos[0].parent / "a.txt").touch()
    (line,) = lines_of(patchlife("predict", *model, photos[0].parent).err)
    assert line.startswith("patchlife: 1 file is left out, by suffix: .txt (1);")


def test_the_error_of_a_large_photo_names_the_fix(patchlife, model, tmp_path):
    from PIL import Image

    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")
    result = patchlife("predict", *model, tmp_path / "large.png")
    assert result.records[0]["error"].endswith("found 9000 x 9000 = 81,000,000; scale the photo down")
