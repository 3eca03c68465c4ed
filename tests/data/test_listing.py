from __future__ import annotations

import os
from pathlib import Path

import pytest

from patchlife.data import PHOTO_SUFFIXES, by_suffix, list_photos
from patchlife.errors import ImageError


@pytest.fixture
def tree(tmp_path) -> Path:
    """Some photos among other files; all are empty, because listing never opens a file."""
    for name in [
        "b.jpg",
        "a.PNG",
        "notes.txt",
        ".hidden.jpg",
        "cats/2.jpeg",
        "cats/10.webp",
        "cats/deep/x.jpg",
        ".thumbs/t.jpg",
        "empty/readme.md",
    ]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names(root: Path, photos: list[Path]) -> list[str]:
    return [photo.relative_to(root).as_posix() for photo in photos]


EVERYTHING = ["a.PNG", "b.jpg", "cats/10.webp", "cats/2.jpeg", "cats/deep/x.jpg"]


def test_a_folder_is_searched_recursively_in_sorted_order(tree):
    assert names(tree, list_photos(tree)) == EVERYTHING
    assert names(tree, list_photos(str(tree))) == EVERYTHING


def test_arguments_keep_their_order_and_no_photo_is_listed_twice(tree):
    photos = list_photos([tree / "cats/2.jpeg", tree / "b.jpg", tree / "cats", tree / "cats" / ".." / "b.jpg"])
    assert names(tree, photos) == ["cats/2.jpeg", "b.jpg", "cats/10.webp", "cats/deep/x.jpg"]


def test_a_file_that_is_given_itself_may_have_any_suffix(tree):
    assert list_photos(tree / "notes.txt") == [tree / "notes.txt"]


def test_globs(tree):
    assert names(tree, list_photos(f"{tree}/*.jpg")) == ["b.jpg"]
    assert names(tree, list_photos(f"{tree}/*")) == EVERYTHING  # includes the photos in folders, without notes.txt
    assert names(tree, list_photos(f"{tree}/**/*.jpg")) == ["b.jpg", "cats/deep/x.jpg"]


def test_an_existing_file_is_not_read_as_a_glob(tree):
    file = tree / "cat[1].jpg"
    file.touch()
    assert list_photos(file) == [file]


@pytest.mark.parametrize("name", ["a.jfif", "a.JPE", "a.jif", "a.apng", "a.WebP", "a.jpeg"])
def test_all_suffixes_of_the_supported_formats(tmp_path, name):
    (tmp_path / name).touch()
    assert names(tmp_path, list_photos(tmp_path)) == [name]


def test_the_suffixes_include_those_of_pillow():
    from PIL import Image

    Image.init()
    formats = {"JPEG", "PNG", "WEBP"}
    assert {suffix for suffix, kind in Image.EXTENSION.items() if kind in formats} <= set(PHOTO_SUFFIXES)


def test_other_files_are_reported_as_left_out(tree):
    left_out = set()
    list_photos([tree, tree / "cats", f"{tree}/*", tree / "b.jpg"], left_out)
    assert left_out == {tree / "notes.txt", tree / "empty/readme.md"}
    left_out = set()
    list_photos([tree, tree / "notes.txt"], left_out)  # given itself, so it is listed
    assert left_out == {tree / "empty/readme.md"}


def test_counts_by_suffix():
    files = [Path(f"x{n}{suffix}") for n, suffix in enumerate([".a", ".b", ".A", "", ".c", ".d", ".e", ".f", ".g"])]
    assert by_suffix(files) == ".a (2), .b (1), .c (1), .d (1), .e (1), 3 other suffixes"
    assert by_suffix([Path("LICENSE"), Path("a.tar.gz")]) == ".gz (1), no suffix (1)"


def test_the_error_of_a_folder_without_photos_counts_the_suffixes(tmp_path):
    for name in ("a.heic", "b.heic", "c.txt", ".d.png"):
        (tmp_path / name).touch()
    expected = r"found none in this folder \(looked for \.jpg.*\) but files with the suffixes \.heic \(2\), \.txt \(1\)"
    with pytest.raises(ImageError, match=expected):
        list_photos(tmp_path)
    with pytest.raises(ImageError, match=r"found none \(looked for .*but files with the suffixes \.heic \(2\);"):
        list_photos(f"{tmp_path}/*.heic")


def test_links_are_followed_without_an_endless_loop(tree):
    (tree / "cats/deep/up").symlink_to(tree, target_is_directory=True)
    (tree / "linked.jpg").symlink_to(tree / "b.jpg")
    assert names(tree, list_photos(tree)) == sorted([*EVERYTHING, "linked.jpg"])


def test_a_missing_path(tree):
    with pytest.raises(ImageError, match=r"dogs: expected a photo, folder or glob, found no such file"):
        list_photos([tree, tree / "dogs"])


def test_a_folder_or_glob_without_photos(tree):
    with pytest.raises(ImageError, match=r"empty: expected photos, found none in this folder \(looked for \.jpg"):
        list_photos(tree / "empty")
    with pytest.raises(ImageError, match=r"\*\.bmp: expected photos, found no file that matches this glob"):
        list_photos(f"{tree}/*.bmp")
    with pytest.raises(ImageError, match="got an empty list"):
        list_photos([])


def test_an_unreadable_folder(tree, monkeypatch):
    real = os.scandir

    def scan(folder):
        if str(folder).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(ImageError, match=r"deep: expected a folder that can be read, found Permission denied;"):
        list_photos(tree)


@pytest.mark.shared
def test_a_folder_of_class_folders(shared):
    paths = list_photos(shared / "data/in20/val")
    assert len(paths) == 1000
    assert len({path.parent for path in paths}) == 20
    assert paths == sorted(paths)
