from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from patchlife import draw
from patchlife.data import Preprocess, list_photos
from patchlife.errors import ConfigError, ImageError
from patchlife.slimming.lives import Lives
from patchlife.visual import colours, strip

DEPTH = 12


def lives_of(*life: np.ndarray) -> Lives:
    """Lives with these maps."""
    flat = torch.tensor(np.stack(life)).reshape(len(life), -1).float()
    kept = torch.stack([(flat > block).sum(dim=1) for block in range(DEPTH)], dim=1)
    return Lives(flat, kept, flat, life[0].shape)


@pytest.fixture
def halves() -> Lives:
    """Two images on a 4 x 6 grid: a life of 3 in the left half of the first image and the right half of the second."""
    left = np.full((4, 6), 12)
    left[:, :3] = 3
    return lives_of(left, left[:, ::-1].copy())


def grey(width: int = 120, height: int = 80) -> Image.Image:
    return Image.new("RGB", (width, height), (128, 128, 128))


def lightness(picture: Image.Image, x: float, y: float) -> int:
    return picture.convert("L").getpixel((round(x * picture.width), round(y * picture.height)))


# --- colours


def test_longer_lives_are_lighter():
    palette = colours(np.arange(3, 13), first=3, last=12)
    assert (np.diff(palette @ [0.299, 0.587, 0.114]) > 0.02).all()
    assert palette.min() >= 0
    assert palette.max() <= 1


def test_lives_outside_the_scale_have_its_end_colours_and_nan_the_darkest():
    ends = colours(np.array([3.0, 12.0]), 3, 12)
    assert np.array_equal(colours(np.array([-5.0, 99.0]), 3, 12), ends)
    assert np.array_equal(colours(np.array([np.nan]), 3, 12), ends[:1])


def test_without_dropped_patches_all_colours_are_bright():
    assert np.array_equal(colours(np.full((2, 2), 12), 12, 12)[0, 0], colours(np.array(12), 3, 12))


# --- the map


def test_the_map_is_dark_where_lives_are_short(halves):
    picture = draw(grey(), halves, legend=False)
    assert picture.size == (480, 320)
    assert lightness(picture, 0.25, 0.5) < 70
    assert lightness(picture, 0.75, 0.5) > 180
    other = draw(grey(), halves, image=1, legend=False)
    assert lightness(other, 0.25, 0.5) > 180


def test_a_dark_photo_does_not_look_like_short_lives(halves):
    black = draw(Image.new("RGB", (120, 80)), halves, legend=False)
    white = draw(Image.new("RGB", (120, 80), "white"), halves, legend=False)
    assert lightness(black, 0.75, 0.5) > lightness(white, 0.25, 0.5) + 80


def test_the_photo_is_visible_in_the_map(halves):
    stripes = grey()
    stripes.paste("black", (0, 30, 120, 34))
    picture = draw(stripes, halves, legend=False)
    for x in (0.25, 0.75):
        assert lightness(picture, x, 32 / 80) < lightness(picture, x, 20 / 80) - 8


@pytest.mark.parametrize("width", [64, 112, 224, 1000])
def test_any_width(halves, width):
    picture = draw(grey(), halves, width=width)
    assert picture.width == width
    assert picture.height > width * 80 / 120 + 12  # room for the legend


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1), (112, 112)])
@pytest.mark.parametrize("whole", [False, True])
def test_any_photo(halves, size, whole):
    picture = draw(grey(*size), halves, width=200, whole=whole)
    assert picture.width == 200
    assert picture.height < 800


def test_a_path_an_array_and_an_image_draw_the_same(halves, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    pictures = [draw(p, halves) for p in (tmp_path / "photo.png", str(tmp_path / "photo.png"), pixels)]
    assert all(picture == draw(Image.fromarray(pixels), halves) for picture in pictures)


def test_with_preprocess_the_map_covers_the_crop(halves):
    """The crop is the middle of a photo with white ends."""
    photo = Image.new("RGB", (400, 100), "white")
    photo.paste((128, 128, 128), (100, 0, 300, 100))
    preprocess = Preprocess(size=(64, 96), crop_fraction=1.0)
    crop = photo.crop((125, 0, 275, 100))
    assert draw(photo, halves, preprocess=preprocess) == draw(crop, halves)


def test_whole_dims_the_part_outside_the_crop(halves):
    photo = Image.new("RGB", (400, 100), (200, 30, 30))
    preprocess = Preprocess(size=(64, 96), crop_fraction=1.0)
    picture = draw(photo, halves, preprocess=preprocess, whole=True, legend=False, width=400)
    assert picture.size == (400, 100)
    red, green, blue = picture.getpixel((50, 50))
    assert red == green == blue  # no colour in the margin
    assert lightness(picture, 150 / 400, 0.5) < 70
    assert lightness(picture, 250 / 400, 0.5) > 180


def test_pictures_of_one_batch_have_the_same_colour_scale(halves):
    """The shortest life of the second image is 9: orange, not the dark blue of the first image's shortest life."""
    late = np.full((4, 6), 12)
    late[:, :3] = 9
    together = lives_of(halves.map(0).numpy(), late)
    assert lightness(draw(grey(), together, image=1), 0.25, 0.3) > 110


def test_few_lives_are_listed_and_many_are_a_colour_bar(halves):
    from patchlife.visual.legend import _text, legend_of

    assert [_text(3, 102, 12), _text(12, 1, 12), _text(1, 5, 12)] == [
        "3 blocks · 102 patches",
        "all blocks · 1 patch",
        "1 block · 5 patches",
    ]
    two, many = np.array([[3, 12]]), np.arange(3, 13)[None]
    first, last = (48, 46, 110), (255, 237, 173)
    listed = np.asarray(legend_of(two, 3, 12, 480)).reshape(-1, 3).astype(int)
    bar = np.asarray(legend_of(many, 3, 12, 480)).reshape(-1, 3).astype(int)
    for colour in (first, last):
        assert (np.abs(listed - colour).sum(axis=1) < 15).any()
        assert (np.abs(bar - colour).sum(axis=1) < 15).any()
    assert len(np.unique(bar, axis=0)) > len(np.unique(listed, axis=0))


# --- the strip


def test_strip_has_one_panel_per_block(halves):
    picture = strip(grey(), halves)
    assert picture.width == 5 * 240 + 4 * 10
    assert strip(grey(), halves, blocks=[5], width=100).width == 100


def test_kept_patches_have_the_colours_of_the_photo_and_dropped_ones_are_blue(halves):
    photo = Image.new("RGB", (120, 80), (200, 120, 40))
    panel = strip(photo, halves, blocks=[6])
    assert panel.getpixel((180, 80)) == (200, 120, 40)
    red, _, blue = panel.getpixel((60, 80))
    assert blue > red + 30
    before = strip(photo, halves, blocks=[2])
    assert before.getpixel((60, 80)) == (200, 120, 40)


@pytest.mark.parametrize(("depth", "blocks"), [(12, [0, 3, 6, 9, 11]), (24, [0, 6, 12, 18, 23]), (2, [0, 1])])
def test_default_blocks_are_evenly_spaced(depth, blocks):
    from patchlife.visual.maps import _default_blocks

    assert _default_blocks(depth) == blocks


# --- invalid arguments


def test_invalid_arguments(halves):
    with pytest.raises(ConfigError, match=r"image must be within 0\.\.1, an index into lives, got 2"):
        draw(grey(), halves, image=2)
    with pytest.raises(ConfigError, match=r"width must be within 64\.\.4096 pixels, got 100000"):
        draw(grey(), halves, width=100_000)
    with pytest.raises(ConfigError, match=r"blocks must be within 0\.\.11, got \[12\]"):
        strip(grey(), halves, blocks=[12])
    with pytest.raises(ConfigError, match=r"blocks must be within 0\.\.11, got \[\]"):
        strip(grey(), halves, blocks=[])


def test_invalid_photos(halves, tmp_path):
    with pytest.raises(ImageError, match="found no such file"):
        draw(tmp_path / "gone.jpg", halves)
    expected = r"expected a path, a PIL image or a uint8 array \(height, width, 3\), found "
    with pytest.raises(ImageError, match=expected + r"ndarray \(80, 120, 3\) float64"):
        draw(np.zeros((80, 120, 3)), halves)
    with pytest.raises(ImageError, match=expected + r"Tensor .*not the preprocessed tensor"):
        draw(torch.zeros(3, 80, 120), halves)
    with pytest.raises(ImageError, match="floating-point values"):
        draw(Image.new("F", (8, 8)), halves)


@pytest.mark.shared
def test_real_photos(shared):
    y, x = np.mgrid[0:14, 0:14]
    lives = lives_of(np.clip(15 - 2 * np.hypot(x - 6.5, y - 6.5), 3, 12).round())
    for path in list_photos(shared / "data/caltech101/test")[::300]:
        picture = draw(path, lives, width=300, legend=False)
        assert picture.size == (300, 300)
        assert lightness(picture, 0.5, 0.5) > lightness(picture, 0.02, 0.02) + 60  # the longest lives are in the middle
        with_legend = draw(path, lives, width=300)
        assert with_legend.crop((0, 0, 300, 300)) == picture
        assert with_legend.width == 300
        assert with_legend.height > 312
        panels = strip(path, lives)
        assert panels.width == 5 * 240 + 4 * 10
        assert panels.height > 240
