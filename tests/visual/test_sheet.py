from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from patchlife.errors import ConfigError
from patchlife.visual import contact_sheet
from patchlife.visual.layout import font, wrapped


def tiles(count: int, size: tuple[int, int] = (50, 40)) -> list[tuple[Image.Image, str]]:
    return [(Image.new("RGB", size, (10 * i, 0, 0)), f"photo {i}") for i in range(count)]


def test_pictures_are_arranged_in_columns():
    two, one = contact_sheet(tiles(5), columns=2, width=100), contact_sheet(tiles(5), columns=1, width=100)
    assert two.width == 2 * 100 + 3 * 12
    assert one.width == 100 + 2 * 12
    assert one.height > two.height > contact_sheet(tiles(5), columns=5, width=100).height


@pytest.mark.parametrize("count", [7, 24, 100])
def test_default_columns_make_a_sheet_that_is_wider_than_high(count):
    sheet = contact_sheet(tiles(count), width=100)
    assert 1 <= sheet.width / sheet.height < 3


def test_every_picture_is_on_the_sheet():
    pixels = np.asarray(contact_sheet(tiles(9), width=64)).reshape(-1, 3)
    for i in range(9):
        assert (pixels == (10 * i, 0, 0)).all(axis=1).sum() >= 64 * 51


def test_shapes_and_modes_may_differ():
    mixed = [(Image.new("L", (1, 500)), "a"), (Image.new("RGBA", (500, 1)), "b"), *tiles(1)]
    assert contact_sheet(mixed, width=80).width == 3 * 80 + 4 * 12


def test_invalid_arguments():
    with pytest.raises(ConfigError, match="at least one picture, got none"):
        contact_sheet([])
    with pytest.raises(ConfigError, match="columns must be at least 1, got 0"):
        contact_sheet(tiles(2), columns=0)


def test_captions_are_broken_into_lines_that_fit():
    text = "a caption of several words, and one_that_is_far_too_long_for_any_line_at_all"
    lines = wrapped(text, 100, 12)
    assert all(font(12).getlength(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert wrapped("", 100, 12) == []
