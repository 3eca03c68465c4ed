"""Class names and the folders of photos: accents, numbers, orders, and lists that do not do."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from patchlife.data.labels import Labels, imagenet_labels, numbered_labels, read_labels
from patchlife.errors import ConfigError

COMPOSED = "café"
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)
TWELVE = [str(n) for n in range(12)]


def photos(*folders: str) -> list[Path]:
    return [Path("data", folder, "1.jpg") for folder in folders]


@pytest.fixture
def names(tmp_path):
    """Write a file of class names; gives its path."""

    def write(content: str | bytes) -> Path:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "names.txt").write_bytes(data)
        return tmp_path / "names.txt"

    return write


# ---- files of names


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbfcat\ndog\n", b"cat\r\ndog\r\n", b"\xef\xbb\xbfcat\r\n\r\n  dog  ", b"\ncat\n\ndog"]
)
def test_how_a_file_may_be_written(names, content):
    assert read_labels(names(content), 2) == Labels(("cat", "dog"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cat\ndog\ncat\n", "lists 'cat' in lines 1 and 3; give each class a name of its own"),
        ("\ncat\n\ncat\ndog\n cat ", "lists 'cat' in lines 2 and 4 and 6"),
        (f"{COMPOSED}\ndog\n{DECOMPOSED}", "in lines 1 and 3"),
        ("\ufeffcat\ncat\nx", "lists 'cat' in lines 1 and 2"),
        ("cat", "names 1 classes, the model has 3; give one name a line"),
        ("a\nb\nc\nd", "names 4 classes, the model has 3"),
        ("a\nb\nc".encode("utf-16"), "is no text file of class names in UTF-8"),
        (b"\xff\xd8\xff", "is no text file of class names in UTF-8"),
    ],
)
def test_a_file_that_does_not_do(names, content, message):
    with pytest.raises(ConfigError, match=message):
        read_labels(names(content), 3)


def test_names_that_differ_by_case_or_spaces_inside_are_two(names):
    assert read_labels(names("cat\nCat\nca t"), 3).names == ("cat", "Cat", "ca t")


# ---- folders by name


@pytest.mark.parametrize("listed", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("folder", [COMPOSED, DECOMPOSED])
def test_an_accent_is_the_same_however_it_is_stored(listed, folder):
    labels = Labels(("tea", listed))
    assert labels.classes_of(photos(folder, "tea")) == [1, 0]
    assert labels.class_said(folder, "x") == 1


def test_a_folder_that_is_not_a_class():
    labels = Labels(("cat", "dog", "eel", "fox"))
    with pytest.raises(ConfigError) as caught:
        labels.classes_of(photos("cat", "zebra"))
    assert str(caught.value) == (
        "folder zebra is not a class of this model; its classes are 0 to 3, also as cat, dog, eel, ...: rename the "
        "folders, or name the classes with --labels FILE"
    )
    with pytest.raises(ConfigError, match=r"folder Cat is not a class of this model \(also not: a, b, c, d, 2 more\);"):
        labels.classes_of(photos("Cat", *"fedcba", "dog"))


def test_imagenets_ids_are_shown():
    with pytest.raises(ConfigError, match="its classes are 0 to 999, also as n01440764, n01443537"):
        imagenet_labels().classes_of(photos("zebra crossing"))
    assert imagenet_labels().reading(photos("tench")) == "folders are read as class names or WordNet ids"


def test_a_name_that_two_classes_share_says_so():
    labels = Labels(("crane", "dog", "crane"))
    assert labels.classes_of(photos("dog")) == [1]
    with pytest.raises(ConfigError, match=r"crane is the name of classes 0, 2 of this model; .* --class-order number"):
        labels.classes_of(photos("crane"))
    assert labels.classes_of(photos("2", "0"), "number") == [2, 0]


# ---- folders by number


def test_numbers_are_numbers_and_the_other_reading_is_told():
    labels = numbered_labels(12)
    assert labels.classes_of(photos(*TWELVE)) == list(range(12))
    assert labels.reading(photos(*TWELVE)) == (
        "folders are read as class numbers: 10 is class 10. torchvision's ImageFolder takes folders in the order of "
        "their names as text, where 10 is class 2: if the model was trained that way, give --class-order imagefolder"
    )
    assert "10 is class 2" in labels.reading(photos("0", "10"))  # of a set in which not every class is present


@pytest.mark.parametrize(
    "folders", [TWELVE[:1], TWELVE[:2], [f"{n:02}" for n in range(12)], [f"{n:03}" for n in range(12)]]
)
def test_nothing_is_told_where_both_readings_agree(folders):
    labels = numbered_labels(12)
    assert labels.reading(photos(*folders)) == "folders are read as class numbers"
    assert labels.classes_of(photos(*folders)) == list(range(len(folders)))


def test_few_numbers_have_one_order():
    assert numbered_labels(10).reading(photos(*TWELVE[:10])) == "folders are read as class numbers"


@pytest.mark.parametrize("folder", ["12", "-1", "1.0", "cat", "٣", "1" * 20])
def test_a_folder_that_is_no_number_of_a_class(folder):
    message = (
        f"folder {folder} is not a class of this model, whose classes are numbers, 0 to 11; name the classes with "
        "--labels FILE, or give --class-order imagefolder if the model was trained on these folders in the order"
    )
    for order in (None, "number"):
        with pytest.raises(ConfigError, match=message):
            numbered_labels(12).classes_of(photos("0", folder), order)


def test_numbers_may_be_asked_for_where_classes_have_names():
    labels = Labels(("cat", "dog"))
    assert labels.classes_of(photos("1", "0"), "number") == [1, 0]
    assert labels.reading(photos("1", "0"), "number") == "folders are read as class numbers"
    with pytest.raises(ConfigError, match=r"folder 0 is not a class .* --class-order number if the folders are called"):
        labels.classes_of(photos("1", "0"))


# ---- ImageFolder's order


def test_imagefolders_order_is_that_of_torchvision(tmp_path):
    from PIL import Image
    from torchvision.datasets import ImageFolder

    folders = [*TWELVE, "zebra", "Ant", "ant", "n0144", "class 2", "class 10", COMPOSED]
    for folder in folders:
        (tmp_path / folder).mkdir()
        Image.new("RGB", (2, 2)).save(tmp_path / folder / "1.png")
    expected = ImageFolder(str(tmp_path)).class_to_idx
    labels = numbered_labels(len(folders))
    paths = [tmp_path / folder / "1.png" for folder in folders]
    assert labels.classes_of(paths, "imagefolder") == [expected[folder] for folder in folders]


def test_twelve_numbers_in_imagefolders_order():
    labels = numbered_labels(12)
    assert labels.classes_of(photos(*TWELVE), "imagefolder") == [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 2, 3]
    reading = labels.reading(photos(*TWELVE), "imagefolder")
    assert reading.endswith("in the order of their names as text: 0 is class 0, 1 is class 1, 10 is class 2, ...")


@pytest.mark.parametrize("folders", [["ant", "bee"], ["ant", "bee", "cow", "dog"]])
def test_imagefolders_order_takes_every_folder(folders):
    message = r"takes 3 folders of photos, got \d \(ant, bee.*\); give all of them, or name the classes with --labels"
    with pytest.raises(ConfigError, match=message):
        numbered_labels(3).classes_of(photos(*folders), "imagefolder")


# ---- labels that are said


@pytest.mark.parametrize(("label", "index"), [(None, -1), (2, 2), ("2", 2), ("02", 2), ("cat", 0), ("n2", 1)])
def test_labels_of_samples(label, index):
    assert Labels(("cat", "dog", "eel"), ("n1", "n2", "n3")).class_said(label, "x.tar/1.jpg") == index


@pytest.mark.parametrize("label", [3, -1, "3", "wolf", "", "1.0"])
def test_labels_of_samples_that_are_not_classes(label):
    with pytest.raises(ConfigError) as caught:
        Labels(("cat", "dog", "eel")).class_said(label, "x.tar/1.jpg")
    assert str(caught.value) == (
        f"x.tar/1.jpg is labelled {label!r}, which is not a class of this model; its classes are 0 to 2, also as cat, "
        "dog, eel, ...: correct the label, or name the classes with --labels FILE"
    )
