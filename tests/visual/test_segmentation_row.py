from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from patchlife.errors import ConfigError
from patchlife.slimming.lives import Lives
from patchlife.visual import segmentation_row
from patchlife.visual.segmentation import class_colours

LIVES = Lives.full(2, (4, 6), 12)
PHOTO = Image.new("RGB", (120, 80), (128, 128, 128))


def row(answers: dict[str, np.ndarray], classes: int = 3, width: int = 120) -> Image.Image:
    return segmentation_row(PHOTO, answers, LIVES, 1, classes=classes, width=width)


def test_each_answer_is_painted_in_the_colours_of_its_classes() -> None:
    halves = np.zeros((8, 12), int)
    halves[:, 6:] = 2
    picture = row({"dense": halves})
    colours = [tuple(colour) for colour in class_colours(3).tolist()]
    first = 120 + 10  # the photo and a gap are left of it
    assert picture.getpixel((first + 30, 40)) == colours[0]
    assert picture.getpixel((first + 90, 40)) == colours[2]


def test_pixels_without_a_class_are_white() -> None:
    picture = row({"truth": np.full((80, 120), 3)})
    assert picture.getpixel((130 + 60, 40)) == (255, 255, 255)


def test_the_row_has_photo_answers_and_life_map_at_one_height() -> None:
    answer = np.zeros((40, 60), np.uint8)
    picture = row({"truth": answer, "dense": answer, "slimmed": answer})
    assert picture.width == 5 * 120 + 4 * 10


def test_colours_of_many_classes_differ() -> None:
    assert len({tuple(colour) for colour in class_colours(30).tolist()}) == 30


@pytest.mark.parametrize("wrong", [np.zeros((3, 8, 8), int), np.zeros((8, 8)), np.full((8, 8), -1)])
def test_what_is_no_table_of_classes_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="'dense'"):
        row({"dense": wrong})


def test_an_image_that_is_not_in_lives_is_refused() -> None:
    with pytest.raises(ConfigError, match="image must be within 0..1"):
        segmentation_row(PHOTO, {}, LIVES, 2, classes=3)


def test_tensors_of_torch_are_accepted() -> None:
    answer = torch.zeros(8, 12, dtype=torch.long)
    assert row({"dense": answer}).size == row({"dense": answer.numpy()}).size
