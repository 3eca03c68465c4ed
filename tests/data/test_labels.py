"""Class names and folders of photos: accents, numbers, orders, and invalid files."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from patchlife.data.labels import Labels, imagenet_labels, named_labels, numbered_labels, read_labels
from patchlife.errors import ConfigError

COMPOSED = "café"
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)
TWELVE = [str(n) for n in range(12)]


def photos(*folders: str) -> list[Path]:
    return [Path("data", folder, "1.jpg") for folder in folders]


@pytest.fixture
def names(tmp_path):
    """A function that writes a file of class names and returns its path."""

    def write(content: str | bytes) -> Path:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "names.txt").write_bytes(data)
        return tmp_path / "names.txt"

    return write


# ---- files of names


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbfcat\ndog\n", b"cat\r\ndog\r\n", b"\xef\xbb\xbfcat\r\n\r\n  dog  ", b"\ncat\n\ndog"]
)
def test_byte_order_mark_line_ends_and_empty_lines_are_ignored(names, content):
    assert read_labels(names(content), 2) == Labels(("cat", "dog"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cat\ndog\ncat\n", "lists 'cat' in lines 1 and 3; give each class a unique name"),
        ("\ncat\n\ncat\ndog\n cat ", "lists 'cat' in lines 2 and 4 and 6"),
        (f"{COMPOSED}\ndog\n{DECOMPOSED}", "in lines 1 and 3"),
        ("\ufeffcat\ncat\nx", "lists 'cat' in lines 1 and 2"),
        ("cat", "has 1 class names, but the model has 3 classes; write one name per line"),
        ("a\nb\nc\nd", "has 4 class names, but the model has 3"),
        ("a\nb\nc".encode("utf-16"), "names.txt: expected a UTF-8 text file"),
        (b"\xff\xd8\xff", "names.txt: expected a UTF-8 text file"),
    ],
)
def test_an_invalid_file(names, content, message):
    with pytest.raises(ConfigError, match=message):
        read_labels(names(content), 3)


def test_names_that_differ_in_case_or_inner_spaces_are_different(names):
    assert read_labels(names("cat\nCat\nca t"), 3).names == ("cat", "Cat", "ca t")


# ---- folders by name


@pytest.mark.parametrize("listed", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("folder", [COMPOSED, DECOMPOSED])
def test_both_unicode_forms_of_an_accent_are_equal(listed, folder):
    labels = Labels(("tea", listed))
    assert labels.classes_of(photos(folder, "tea")) == [1, 0]
    assert labels.class_of_label(folder, "x") == 1


def test_a_folder_that_is_not_a_class():
    labels = Labels(("cat", "dog", "eel", "fox"))
    with pytest.raises(ConfigError) as caught:
        labels.classes_of(photos("cat", "zebra"))
    assert str(caught.value) == (
        "folder zebra is not a class of this model; its classes are 0 to 3, with the names cat, dog, eel, ...: rename "
        "the folders, or give the class names with --labels FILE"
    )
    with pytest.raises(ConfigError, match=r"folder Cat is not a class of this model \(also not: a, b, c, d, 2 more\);"):
        labels.classes_of(photos("Cat", *"fedcba", "dog"))


def test_the_error_for_imagenet_shows_wordnet_ids():
    with pytest.raises(ConfigError, match="its classes are 0 to 999, with the names n01440764, n01443537"):
        imagenet_labels().classes_of(photos("zebra crossing"))
    assert imagenet_labels().describe_folders(photos("tench")) == "folders are read as class names or WordNet ids"


def test_a_name_of_two_classes_is_refused():
    labels = Labels(("crane", "dog", "crane"))
    assert labels.classes_of(photos("dog")) == [1]
    with pytest.raises(ConfigError, match=r"crane is the name of classes 0, 2 of this model; .* --class-order number"):
        labels.classes_of(photos("crane"))
    assert labels.classes_of(photos("2", "0"), "number") == [2, 0]


# ---- folders by number


def test_numbers_are_class_numbers_and_a_different_order_of_imagefolder_is_mentioned():
    labels = numbered_labels(12)
    assert labels.classes_of(photos(*TWELVE)) == list(range(12))
    assert labels.describe_folders(photos(*TWELVE)) == (
        "folders are read as class numbers: 10 is class 10. torchvision's ImageFolder sorts folders by name as text, "
        "where 10 is class 2; if the model was trained with that order, give --class-order imagefolder"
    )
    assert "10 is class 2" in labels.describe_folders(photos("0", "10"))  # even if some classes have no folder


@pytest.mark.parametrize(
    "folders", [TWELVE[:1], TWELVE[:2], [f"{n:02}" for n in range(12)], [f"{n:03}" for n in range(12)]]
)
def test_imagefolder_is_not_mentioned_if_both_orders_agree(folders):
    labels = numbered_labels(12)
    assert labels.describe_folders(photos(*folders)) == "folders are read as class numbers"
    assert labels.classes_of(photos(*folders)) == list(range(len(folders)))


def test_up_to_ten_numbers_have_the_same_order_as_text():
    assert numbered_labels(10).describe_folders(photos(*TWELVE[:10])) == "folders are read as class numbers"


@pytest.mark.parametrize("folder", ["12", "-1", "1.0", "cat", "٣", "1" * 20])
def test_a_folder_that_is_not_a_class_number(folder):
    message = (
        f"folder {folder} is not a class of this model, whose classes are the numbers 0 to 11; give the class names "
        "with --labels FILE, or give --class-order imagefolder"
    )
    for order in (None, "number"):
        with pytest.raises(ConfigError, match=message):
            numbered_labels(12).classes_of(photos("0", folder), order)


def test_class_order_number_reads_numbers_even_if_classes_have_names():
    labels = Labels(("cat", "dog"))
    assert labels.classes_of(photos("1", "0"), "number") == [1, 0]
    assert labels.describe_folders(photos("1", "0"), "number") == "folders are read as class numbers"
    with pytest.raises(ConfigError, match=r"folder 0 is not a class .* --class-order number if the folders are"):
        labels.classes_of(photos("1", "0"))


# ---- the order of ImageFolder


def test_class_order_imagefolder_is_the_order_of_torchvision(tmp_path):
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


def test_class_order_imagefolder_of_twelve_numbers():
    labels = numbered_labels(12)
    assert labels.classes_of(photos(*TWELVE), "imagefolder") == [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 2, 3]
    text = labels.describe_folders(photos(*TWELVE), "imagefolder")
    assert text.endswith("sorted by name as text: 0 is class 0, 1 is class 1, 10 is class 2, ...")


@pytest.mark.parametrize("folders", [["ant", "bee"], ["ant", "bee", "cow", "dog"]])
def test_class_order_imagefolder_needs_a_folder_for_each_class(folders):
    message = r"each of the 3 classes, got \d folders \(ant, bee.*\); give all folders, or .* --labels"
    with pytest.raises(ConfigError, match=message):
        numbered_labels(3).classes_of(photos(*folders), "imagefolder")


# ---- labels of samples


@pytest.mark.parametrize(("label", "index"), [(None, -1), (2, 2), ("2", 2), ("02", 2), ("cat", 0), ("n2", 1)])
def test_labels_of_samples(label, index):
    assert Labels(("cat", "dog", "eel"), ("n1", "n2", "n3")).class_of_label(label, "x.tar/1.jpg") == index


@pytest.mark.parametrize("label", [3, -1, "3", "wolf", "", "1.0"])
def test_labels_of_samples_that_are_not_classes(label):
    with pytest.raises(ConfigError) as caught:
        Labels(("cat", "dog", "eel")).class_of_label(label, "x.tar/1.jpg")
    assert str(caught.value) == (
        f"x.tar/1.jpg has the label {label!r}, which is not a class of this model; its classes are 0 to 2, with the "
        "names cat, dog, eel, ...: correct the label, or give the class names with --labels FILE"
    )


def test_names_of_imagenets_classes_have_wordnet_ids() -> None:
    names = imagenet_labels().names
    with_synonyms = tuple(f"{name}, {name} of another list" for name in names)
    assert named_labels(with_synonyms).ids == imagenet_labels().ids
    assert named_labels(with_synonyms).names == with_synonyms
    assert named_labels(names[1:] + names[:1]).ids == ()
    assert named_labels(names[:10]).ids == ()
    assert named_labels(()).ids == ()
