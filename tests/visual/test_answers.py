"""Pictures of dense predictions: one colour per class, no colour mixed, one picture beside the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from small import write_photos

from patchlife.data import Preprocess
from patchlife.slimming.lives import Lives
from patchlife.visual import class_colours, class_map, draw_answers


def test_classes_have_different_colours_that_do_not_depend_on_their_number() -> None:
    colours = class_colours(30)
    assert colours.shape == (30, 3)
    assert ((colours >= 0) & (colours <= 1)).all()
    distance = np.linalg.norm(colours[:, None] - colours[None], axis=2) + 9 * np.eye(30)
    assert distance[:12, :12].min() > 0.2
    assert distance.min() > 0.04
    assert np.array_equal(class_colours(5), colours[:5])


def test_every_pixel_has_the_colour_of_its_class_and_unknown_ones_are_black() -> None:
    colours = class_colours(3)
    answer = np.array([[0, 1, 2], [2, 255, -1]])
    pixels = np.asarray(class_map(answer, colours, (30, 20)))
    expected = np.zeros((2, 3, 3), dtype=np.uint8)
    for row, col in ((0, 0), (0, 1), (0, 2), (1, 0)):
        expected[row, col] = (colours[answer[row, col]] * 255).round()
    assert np.array_equal(pixels, expected.repeat(10, axis=0).repeat(10, axis=1))


def test_photo_answers_and_life_map_stand_side_by_side(tmp_path: Path) -> None:
    path = write_photos(tmp_path, 1)[0]
    lives = Lives.full(1, (4, 6), 5, torch.device("cpu"))
    answer = np.zeros((4, 6), dtype=int)
    preprocess = Preprocess(size=(32, 48), crop_fraction=1.0)
    one, two = (
        draw_answers(path, [("dense", answer)] * count, lives, class_colours(2), preprocess, width=90)
        for count in (1, 2)
    )
    assert one.width == 3 * 90 + 2 * 10
    assert two.width == 4 * 90 + 3 * 10
    middle = np.asarray(one)[10:50, 100 + 10 : 100 + 80]
    assert (middle == (class_colours(2)[0] * 255).round()).all()
