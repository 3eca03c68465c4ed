"""Random views: crops stay inside the photo, show what Pillow's crop shows, and depend on the draws only."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from patchlife.training.views import Draws, draw_views, random_views, views_of, whole_photos


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth_photo(width: int = 300, height: int = 200, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def pixels_of(photo: Image.Image, size: tuple[int, int] = (144, 144)) -> Tensor:
    squashed = photo.resize(size[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(squashed).copy()).permute(2, 0, 1)


def rendered(pixels: Tensor, draws: Draws, size: tuple[int, int]) -> Tensor:
    return views_of(lambda places: pixels[places], draws, range(len(pixels)), size)


@pytest.mark.parametrize("size", [(112, 112), (48, 112)])
def test_a_whole_photo_is_the_resized_photo(size: tuple[int, int]) -> None:
    photo = smooth_photo()
    found = rendered(pixels_of(photo)[None], whole_photos(1), size)[0]
    expected = pixels_of(photo, size).float() / 255
    assert (found - expected).abs().max() < 0.03
    assert (found - expected).abs().mean() < 0.004


def test_a_crop_shows_what_a_crop_of_the_photo_shows() -> None:
    photo, size = smooth_photo(), (112, 96)
    draws = draw_views(torch.full((8,), 1.5), size, generator(), mixed=False)
    found = rendered(pixels_of(photo)[None].expand(8, -1, -1, -1), draws, size)
    flipped = draws.extent[:, 0] < 0
    assert 0 < flipped.sum() < 8
    for view, (x, y), (w, h), mirrored in zip(found, draws.centre, draws.extent.abs(), flipped, strict=True):
        box = [(1 + float(edge)) / 2 * side for edge, side in ((x - w, 300), (y - h, 200), (x + w, 300), (y + h, 200))]
        cropped = photo.resize(size[::-1], Image.Resampling.BILINEAR, box=tuple(box))
        expected = torch.from_numpy(np.asarray(cropped).copy()).permute(2, 0, 1).float() / 255
        expected = expected.flip(2) if mirrored else expected
        assert (view - expected).abs().mean() < 0.006
        assert (view.flip(2) - expected).abs().mean() > 0.02


@given(st.floats(0.1, 10), st.sampled_from([(224, 224), (224, 336), (96, 32)]), st.integers(0, 2**31))
def test_crops_stay_inside_and_have_area_and_shape_within_the_limits(
    aspect: float, size: tuple[int, int], seed: int
) -> None:
    draws = draw_views(torch.full((64,), aspect), size, generator(seed))
    extent = draws.extent.abs()
    assert (draws.centre.abs() + extent).max() <= 1 + 1e-5
    area, whole = extent.prod(dim=1), extent.max(dim=1).values < 1  # whole: not cut at the edge of the photo
    assert (area <= 1 + 1e-5).all()
    assert (area[whole] >= 0.25 - 1e-5).all()
    stretch = extent[:, 0] / extent[:, 1] * aspect * size[0] / size[1]
    assert ((stretch[whole] >= 0.75 - 1e-4) & (stretch[whole] <= 4 / 3 + 1e-4)).all()


def test_half_of_the_views_are_flipped_and_half_are_mixed() -> None:
    draws = draw_views(torch.ones(4000), (32, 32), generator())
    assert 0.46 < (draws.extent[:, 0] < 0).double().mean() < 0.54
    mixed = draws.weight[draws.weight < 1]
    assert 0.46 < len(mixed) / 4000 < 0.54
    assert 0.46 < mixed.mean() < 0.54
    assert mixed.min() < 0.02
    assert (draw_views(torch.ones(4000), (32, 32), generator(), mixed=False).weight == 1).all()
    square = draw_views(torch.ones(4000), (32, 32), generator()).extent.abs().prod(dim=1)
    assert 0.5 < square.mean() < 0.65  # crops are of 0.625 of the area on average, a few are cut at the edge


def test_a_mixture_is_the_weighted_mean_of_two_photos_of_the_batch() -> None:
    levels = torch.tensor([0, 40, 90, 130, 200, 250, 255], dtype=torch.uint8)
    pixels = levels[:, None, None, None].expand(-1, 3, 16, 16)
    draws = draw_views(torch.ones(7), (8, 8), generator(1))
    assert 0 < (draws.weight < 1).sum() < 7
    found = random_views(pixels, torch.ones(7), (8, 8), generator(1))
    expected = (draws.weight * levels + (1 - draws.weight) * levels.flip(0)) / 255
    torch.testing.assert_close(found, expected[:, None, None, None].expand_as(found))


def test_a_part_of_a_batch_has_the_same_views() -> None:
    pixels = torch.randint(0, 256, (9, 3, 24, 24), dtype=torch.uint8, generator=generator())
    aspect, asked = torch.linspace(0.5, 2, 9), []

    def some(places: list[int]) -> Tensor:
        asked.append(places)
        return pixels[places]

    whole = random_views(pixels, aspect, (16, 16), generator(3))
    draws = draw_views(aspect, (16, 16), generator(3))
    for places in (range(0, 9, 2), range(1, 9, 2), range(3, 4)):
        assert torch.equal(views_of(some, draws, places, (16, 16)), whole[list(places)])
    assert all(len(places) <= 9 for places in asked)
    assert len(asked[-1]) <= 2
    assert not torch.equal(random_views(pixels, aspect, (16, 16), generator(4)), whole)


def test_autocast_does_not_round_the_places_of_crops() -> None:
    pixels = torch.randint(0, 256, (4, 3, 240, 240), dtype=torch.uint8, generator=generator())
    plain = random_views(pixels, torch.ones(4), (224, 224), generator(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(random_views(pixels, torch.ones(4), (224, 224), generator(3)), plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_views_do_not_depend_on_the_device() -> None:
    pixels = torch.randint(0, 256, (4, 3, 24, 24), dtype=torch.uint8, generator=generator())
    found = [random_views(pixels.to(device), torch.ones(4), (16, 16), generator(3)).cpu() for device in ("cpu", "cuda")]
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)
