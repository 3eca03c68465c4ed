"""Photos that keep their own shape: as many pixels as the model's input at most, in whole patches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scenes import encoded, scene

from patchlife.data import Preprocess, load_mixed_batches, read_photo
from patchlife.errors import ConfigError

OWN_SHAPE = Preprocess(keep_aspect=(16, 16))


@pytest.mark.parametrize(
    ("photo", "size"),
    [
        ((300, 300), (224, 224)),
        ((302, 300), (224, 224)),
        ((640, 480), (192, 256)),
        ((600, 400), (176, 272)),
        ((400, 600), (272, 176)),
        ((800, 400), (160, 304)),
        ((3, 9), (384, 128)),
        ((1, 20000), (3136, 16)),
        ((1, 1), (224, 224)),
    ],
)
def test_the_size_of_a_photo(photo: tuple[int, int], size: tuple[int, int]) -> None:
    assert OWN_SHAPE.for_photo(photo).size == size
    assert OWN_SHAPE(scene(*photo)).shape == (3, *size)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 40), st.integers(1, 40), st.sampled_from([14, 16]))
def test_pixels_are_bounded_and_the_shape_is_kept(width: int, height: int, rows: int, cols: int, patch: int) -> None:
    preprocess = Preprocess(size=(rows * patch, cols * patch), keep_aspect=(patch, patch))
    found = preprocess.for_photo((width, height))
    r, c = found.size[0] // patch, found.size[1] // patch
    assert found.size == (r * patch, c * patch)
    assert 1 <= r * c <= rows * cols
    exact = (rows * cols * height / width) ** 0.5, (rows * cols * width / height) ** 0.5
    if min(exact) >= 1:  # less than a patch is missing at each side
        assert abs(r - exact[0]) < 1
        assert abs(c - exact[1]) < 1
        left, top, right, bottom = preprocess.crop_box((width, height))
        shown = (right - left) / width * (bottom - top) / height
        assert shown >= (1 - 1 / (r + 1)) * (1 - 1 / (c + 1)) - 0.1


def test_the_pixels_are_those_of_a_resized_photo() -> None:
    photo = scene(640, 480)
    expected = photo.resize((256, 192), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(OWN_SHAPE.shown(photo)), np.asarray(expected))


def test_other_settings_hold_and_the_crop_does_not() -> None:
    own = replace(OWN_SHAPE, crop_fraction=0.5, crop_mode="squash", interpolation="bilinear", mean=(0.5,), std=(0.5,))
    found = own.for_photo((640, 480))
    assert (found.crop_fraction, found.crop_mode, found.interpolation) == (1.0, "center", "bilinear")
    assert own(scene(640, 480)).shape == (1, 192, 256)
    assert Preprocess().for_photo((640, 480)) == Preprocess()


def test_patches_may_be_oblong() -> None:
    assert Preprocess(size=(96, 96), keep_aspect=(8, 16)).for_photo((100, 100)).size == (96, 96)
    assert Preprocess(size=(96, 96), keep_aspect=(8, 16)).for_photo((50, 100)).size == (128, 64)


def test_settings_are_saved_only_if_they_are_used() -> None:
    assert "keep_aspect" not in Preprocess().to_dict()
    assert Preprocess.from_dict(OWN_SHAPE.to_dict()) == OWN_SHAPE
    with pytest.raises(ConfigError, match=r"keep_aspect must be None or a patch size .*got \(0, 16\)"):
        Preprocess(keep_aspect=(0, 16))


def test_a_batch_of_photos_of_different_shapes_is_a_list(tmp_path) -> None:
    turned = scene(640, 480)
    exif = turned.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    (tmp_path / "0.jpg").write_bytes(encoded(turned, "JPEG", exif=exif))
    scene(640, 480).save(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes(b"no photo")
    scene(20, 80).save(tmp_path / "3.png")
    paths = sorted(tmp_path.iterdir())
    first, second = load_mixed_batches(paths, OWN_SHAPE, 3)
    assert [tuple(image.shape) for image in first.images] == [(3, 256, 192), (3, 192, 256)]
    assert (first.indices, [index for index, _ in first.failures]) == ([0, 1], [2])
    assert [tuple(image.shape) for image in second.images] == [(3, 448, 112)]
    assert first.images[0].equal(OWN_SHAPE(read_photo(paths[0])))
