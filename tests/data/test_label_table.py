"""Labels of photos from a CSV file: which row is the photo's, and files with faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from patchlife.data.label_table import read_label_table, separated
from patchlife.errors import ConfigError


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A function that writes a CSV file into the folder ``tables`` beside the working folder ``work``."""
    for folder in ("tables", "work"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def write(content: str | bytes) -> Path:
        file = tmp_path / "tables" / "t.csv"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    return write


def labels(file: Path, *photos: str | Path) -> list[str]:
    return [row.label for row in read_label_table(file, [Path(photo) for photo in photos])]


def test_a_path_is_relative_to_the_file_or_to_the_working_folder_or_absolute(table, tmp_path):
    file = table(f"path,label\na/1.jpg,cat\n./a/../a/2.jpg,dog\n{tmp_path}/x/3.jpg,cow\n")
    assert labels(file, tmp_path / "tables/a/1.jpg", tmp_path / "tables/a/2.jpg") == ["cat", "dog"]
    assert labels(file, "a/2.jpg", tmp_path / "work/a/1.jpg", "../x/3.jpg") == ["dog", "cat", "cow"]


def test_the_folder_of_the_file_goes_before_the_working_folder(table, tmp_path):
    file = table("path,label\na/1.jpg,cat\n../work/a/1.jpg,dog\n")
    assert labels(file, "a/1.jpg", "../tables/a/1.jpg") == ["dog", "cat"]


def test_a_name_alone_stands_for_the_photo_of_this_name(table):
    file = table("path,label\n1.jpg,cat\n2.jpg,dog\n")
    assert labels(file, "deep/down/2.jpg", "other/1.jpg") == ["dog", "cat"]
    with pytest.raises(ConfigError, match=r"t.csv, line 2: 1.jpg is the name of 2 photos, among them a/1.jpg; give"):
        labels(file, "a/1.jpg", "b/1.jpg")


def test_a_path_with_a_folder_does_not_stand_for_photos_of_other_folders(table):
    with pytest.raises(ConfigError, match=r"t.csv has no row for 1 of the 2 photos \(the first: b/1.jpg\); add rows"):
        labels(table("path,label\na/1.jpg,cat\n"), "a/1.jpg", "b/1.jpg")


def test_columns_may_be_in_any_order_with_others_quotes_and_a_byte_order_mark(table):
    file = table('\ufefflabel,size,path\r\n"cat, big",3, a/1.jpg \r\n café ,4,"a/2,x.jpg"\r\n')
    assert labels(file, "a/1.jpg", "a/2,x.jpg") == ["cat, big", "café"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected a CSV file with the header path,label, got an empty file"),
        ("a/1.jpg,cat\n", "expected a CSV file with the header path,label, got a/1.jpg, cat"),
        ("path;label\na/1.jpg;cat\n", "with the header path,label, got path;label"),
        ("path,label\na/1.jpg\n", "t.csv, line 2: expected a path and a label, got a/1.jpg"),
        ("path,label\n,cat\n", "line 2: expected a path and a label"),
        ("path,label\na/1.jpg,cat\nb.jpg,dog\na/1.jpg,cat\n", "line 4: a/1.jpg is the photo of line 2, too"),
        ("path,label\na/1.jpg,cat\n./a//1.jpg,dog\n", "line 3: ./a//1.jpg is the photo of line 2, too"),
        ("path,label\né,cat\n".encode("latin-1"), "expected a UTF-8 CSV file"),
        (b"path,label\na/1.jpg,\xff\n", "expected a UTF-8 CSV file"),
    ],
)
def test_a_file_with_a_fault(content, message, table):
    with pytest.raises(ConfigError, match=message):
        labels(table(content), "a/1.jpg")


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none.csv: expected a UTF-8 CSV file .* got: .*No such file"):
        labels(tmp_path / "none.csv", "a.jpg")


@pytest.mark.parametrize(
    ("text", "parts"), [("cat", ["cat"]), ("a;b|c", ["a", "b", "c"]), (" a ;; b ", ["a", "b"]), ("", []), (";", [])]
)
def test_labels_are_separated(text, parts):
    assert separated(text) == parts
