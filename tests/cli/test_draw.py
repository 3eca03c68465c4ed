"""``patchlife draw``: the pictures it writes, their names, and photos that cannot be read."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from small import photo, write_photos


def size(path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def names(folder) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))


def test_a_life_map_for_each_photo(patchlife, model, photos, tmp_path):
    out = tmp_path / "new" / "pictures"
    result = patchlife("draw", *model, photos[0].parent, "--out", out, "--width", 200)
    assert result.code == 0
    assert f"7 of 7 photos drawn; pictures in {out}" in result.err
    assert names(out) == [f"{i:02}.life.png" for i in range(7)]
    width, height = size(out / "00.life.png")
    assert width == 200
    assert height > 200  # the legend


def test_strips_and_sheets(patchlife, model, photos, tmp_path):
    patchlife("draw", *model, *photos[:2], "--out", tmp_path / "out", "--strip", "--sheet")
    assert names(tmp_path / "out") == ["00.life.png", "00.strip.png", "01.life.png", "01.strip.png", "sheet-1.png"]
    assert size(tmp_path / "out" / "00.strip.png")[0] > 5 * 200  # five panels


def test_many_photos_fill_several_sheets(tmp_path):
    from patchlife.cli.draw import Sheets

    sheets = Sheets(tmp_path, tiles=3)
    for index in range(7):
        sheets.add(photo(index), f"photo {index}")
    sheets.close()
    assert names(tmp_path) == ["sheet-1.png", "sheet-2.png", "sheet-3.png"]


def test_pictures_keep_the_folders_of_the_photos_and_have_unique_names(patchlife, model, tmp_path):
    for name in ("a/x.png", "a/x.jpg", "b/x.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        photo(1).save(tmp_path / "in" / name)
    patchlife("draw", *model, tmp_path / "in", "--out", tmp_path / "out")
    assert names(tmp_path / "out") == ["a/x.jpg.life.png", "a/x.png.life.png", "b/x.life.png"]


def test_pictures_of_an_earlier_run_are_not_drawn(patchlife, model, tmp_path):
    write_photos(tmp_path, 2)
    for _ in range(2):
        result = patchlife("draw", *model, tmp_path, "--out", tmp_path / "out")
        assert "2 of 2 photos drawn" in result.err
    result = patchlife("draw", *model, tmp_path / "out", "--out", tmp_path / "out")
    assert result.code == 2
    assert "output folder" in result.err


def test_a_photo_that_cannot_be_read_fails_alone(patchlife, model, photos, tmp_path):
    photos[2].write_bytes(b"")
    result = patchlife("draw", *model, *photos, "--out", tmp_path / "out", "--batch-size", 2)
    assert result.code == 1
    assert f"{photos[2]}: expected a JPEG, PNG or WEBP photo, found an empty file" in result.err
    assert "6 of 7 photos drawn" in result.err
    assert len(names(tmp_path / "out")) == 6


def test_a_photo_with_exif_orientation_is_drawn_upright(patchlife, model, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(1).save(tmp_path / "upright.png")
    photo(1).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "rotated.png", exif=exif)
    patchlife("draw", *model, tmp_path / "upright.png", tmp_path / "rotated.png", "--out", tmp_path / "out")
    upright, rotated = (np.asarray(Image.open(tmp_path / "out" / f"{n}.life.png")) for n in ("upright", "rotated"))
    assert np.array_equal(upright, rotated)


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_a_lower_budget_gives_darker_maps(mode, patchlife, model, photos, tmp_path):
    for budget in (1, 0.5):
        settings = ["--budget", budget, "--mode", mode, "--width", 100]
        patchlife("draw", *model, *photos[:2], *settings, "--out", tmp_path / str(budget))
    dense, half = (np.asarray(Image.open(tmp_path / b / "00.life.png"))[:100] for b in ("1", "0.5"))
    assert dense[..., 0].mean() > half[..., 0].mean() + 20  # red: all pale yellow, against much dark blue


def test_a_width_out_of_range(patchlife, model, photos, tmp_path):
    result = patchlife("draw", *model, photos[0], "--out", tmp_path / "out", "--width", 1)
    assert result.code == 2
    assert "width must be within 64..4096 pixels, got 1" in result.err


def test_the_whole_photo_can_be_shown(patchlife, model, tmp_path):
    photo(1, width=200, height=100).save(tmp_path / "wide.png")
    for name, more in (("crop", []), ("whole", ["--whole"])):
        patchlife("draw", *model, tmp_path / "wide.png", "--width", 100, "--out", tmp_path / name, *more)
    crop, whole = (size(tmp_path / name / "wide.life.png") for name in ("crop", "whole"))
    assert crop[0] == whole[0] == 100
    assert crop[1] - whole[1] == 50  # a square, and half a square, above the same legend
