"""Draw the lives of one photo: as a life map, or as a strip of the patches that enter some blocks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image, ImageFilter

from ..data import AnyPhoto, Preprocess, Sample, as_rgb, read_photo
from ..errors import ConfigError, ImageError
from .layout import beside, captioned, stacked
from .legend import legend_of
from .palette import colours

if TYPE_CHECKING:
    from ..slimming.lives import Lives

__all__ = ["Photo", "draw", "strip"]

Photo = Image.Image | np.ndarray | AnyPhoto
Pixels = Float[np.ndarray, "height width 3"]

_BLUR = 0.06  # of the edges between cells, as a fraction of a cell's side
_WIDTHS = (64, 4096)


def draw(
    photo: Photo,
    lives: Lives,
    image: int = 0,
    preprocess: Preprocess | None = None,
    *,
    width: int = 480,
    whole: bool = False,
    legend: bool = True,
) -> Image.Image:
    """Draw a life map over a photo: the brighter a patch, the longer its life.

    Args:
        photo: a file, a PIL image (its EXIF orientation is ignored) or an array (height, width, 3) of uint8.
        lives: the lives of a batch that contains the photo.
        image: the index of the photo in ``lives``.
        preprocess: the preprocessing of the model, so that the map covers exactly the crop that the model received.
            Without it, the largest central crop with the aspect ratio of the grid is drawn.
        width: of the picture, in pixels.
        whole: show the whole photo, with the part outside the crop dimmed.
        legend: add a legend below the map.

    Raises:
        ImageError: the photo cannot be read.
        ConfigError: ``image`` is not in ``lives``, or ``width`` is out of range.
    """
    full, one, preprocess = _prepared(photo, lives, image, preprocess, width)
    crop = _cropped(full, preprocess, width)
    first, last = _range(lives)
    tint = _enlarge_cells(colours(_life(one), first, last), crop.size)
    picture = _to_image(_tinted(crop, tint))
    if whole:
        picture = _paste_into_photo(full, picture, preprocess, width)
    return stacked([picture, legend_of(_life(one), first, last, width)]) if legend else picture


def strip(
    photo: Photo,
    lives: Lives,
    blocks: Sequence[int] | None = None,
    image: int = 0,
    preprocess: Preprocess | None = None,
    *,
    width: int = 240,
) -> Image.Image:
    """Draw the patches that enter some blocks, side by side: kept patches in colour, dropped ones in dark blue.

    Args:
        photo: as for `draw`.
        lives: as for `draw`.
        blocks: indices of the blocks; by default five, evenly spaced from the first to the last.
        image: as for `draw`.
        preprocess: as for `draw`.
        width: of each panel, in pixels.

    Raises:
        ImageError: the photo cannot be read.
        ConfigError: ``image`` is not in ``lives``, a block does not exist, or ``width`` is out of range.
    """
    full, one, preprocess = _prepared(photo, lives, image, preprocess, width)
    crop = _cropped(full, preprocess, width)
    blocks = _default_blocks(lives.depth) if blocks is None else blocks
    if not blocks or not all(0 <= block < lives.depth for block in blocks):
        raise ConfigError(f"blocks must be within 0..{lives.depth - 1}, got {list(blocks)}")
    return beside([_panel(crop, _life(one), block) for block in blocks])


def _prepared(
    photo: Photo, lives: Lives, image: int, preprocess: Preprocess | None, width: int
) -> tuple[Image.Image, Lives, Preprocess]:
    """Check the arguments of `draw` and `strip`; returns the photo, the lives of one image and the preprocessing."""
    if not 0 <= image < len(lives):
        raise ConfigError(f"image must be within 0..{len(lives) - 1}, an index into lives, got {image}")
    if not _WIDTHS[0] <= width <= _WIDTHS[1]:
        raise ConfigError(f"width must be within {_WIDTHS[0]}..{_WIDTHS[1]} pixels, got {width}")
    if preprocess is None:  # square patches, the largest possible crop
        preprocess = Preprocess(size=lives.grid, crop_fraction=1.0)
    return _opened(photo), lives[image], preprocess


def _opened(photo: Photo) -> Image.Image:
    if isinstance(photo, Image.Image):
        return as_rgb(photo)
    if isinstance(photo, str | os.PathLike | Sample):
        return read_photo(photo)
    shape, dtype = getattr(photo, "shape", None), getattr(photo, "dtype", None)
    if isinstance(photo, np.ndarray) and dtype == np.uint8 and photo.ndim == 3 and photo.shape[2] == 3:
        return Image.fromarray(photo)
    found = f"{type(photo).__name__} {shape or ''} {dtype or ''}".strip()
    raise ImageError(
        f"photo: expected a path, a PIL image or a uint8 array (height, width, 3), found {found}; "
        "give the photo, not the preprocessed tensor"
    )


def _cropped(photo: Image.Image, preprocess: Preprocess, width: int) -> Image.Image:
    """The crop that the model received, ``width`` pixels wide, resized from the full-resolution photo."""
    height = max(round(width * preprocess.size[0] / preprocess.size[1]), 1)
    return replace(preprocess, size=(height, width), interpolation="lanczos").shown(photo)


def _life(one: Lives) -> Float[np.ndarray, "rows cols"]:
    return one.map().detach().cpu().double().numpy()


def _range(lives: Lives) -> tuple[int, int]:
    """The shortest life of the batch and the depth: pictures of one batch share one colour scale."""
    return int(lives.life.min().nan_to_num()), lives.depth


def _default_blocks(depth: int) -> list[int]:
    """Five blocks, evenly spaced from the first to the last: 0, 3, 6, 9, 11 of 12."""
    return sorted({min(round(quarter * depth / 4), depth - 1) for quarter in range(5)})


def _enlarge_cells(cells: Float[np.ndarray, "rows cols 3"], size: tuple[int, int]) -> Pixels:
    """Enlarge a grid of colours to a picture of size (width, height), with slightly blurred edges between cells."""
    small = _to_image(cells)
    cell = min(size[0] / small.width, size[1] / small.height)
    large = small.resize(size, Image.Resampling.NEAREST)
    return _to_pixels(large.filter(ImageFilter.GaussianBlur(_BLUR * cell)))


def _tinted(photo: Image.Image, tint: Pixels) -> Pixels:
    """The structure of the photo in the colours of ``tint``."""
    relief = _relief(photo)[..., None]
    # the second term keeps structure visible in the darkest colours
    return tint * (0.55 + 0.8 * relief) + 0.15 * (relief - 0.3)


def _relief(photo: Image.Image) -> Float[np.ndarray, "height width"]:
    """The structure of the photo in grey, without its large dark and bright areas.

    The lightness of a life map encodes life, so the lightness of the photo must not change it.
    """
    grey = photo.convert("L")
    around = _to_pixels(grey.filter(ImageFilter.GaussianBlur(min(grey.size) / 14)))
    return np.clip(0.5 + 0.9 * (_to_pixels(grey) - around) + 0.35 * (around - 0.5), 0, 1)


def _paste_into_photo(full: Image.Image, picture: Image.Image, preprocess: Preprocess, width: int) -> Image.Image:
    """The whole photo, dimmed, with a picture of the model's crop at the place of the crop."""
    scale = min(width / full.width, 3 * width / full.height)  # bounds the height for very narrow photos
    size = (max(round(full.width * scale), 1), max(round(full.height * scale), 1))
    whole = full.resize(size, Image.Resampling.LANCZOS)
    dimmed = Image.blend(whole.convert("L").convert("RGB"), Image.new("RGB", whole.size, "white"), 0.55)
    left, top, right, bottom = (round(edge * scale) for edge in preprocess.crop_box(full.size))
    extent = (max(right - left, 1), max(bottom - top, 1))
    dimmed.paste(picture.resize(extent, Image.Resampling.LANCZOS), (left, top))
    return dimmed


def _panel(crop: Image.Image, life: Float[np.ndarray, "rows cols"], block: int) -> Image.Image:
    """The patches that enter ``block``; dropped patches are tinted with the darkest colour."""
    kept: Bool[np.ndarray, "rows cols"] = life > block
    visible = _enlarge_cells(np.repeat(kept[..., None].astype(float), 3, axis=2), crop.size)
    dropped = _tinted(crop, colours(np.zeros(1), first=0, last=1))
    picture = _to_image(visible * _to_pixels(crop) + (1 - visible) * dropped)
    return captioned(picture, f"block {block} · {int(kept.sum())} kept")


def _to_pixels(image: Image.Image) -> Float[np.ndarray, "height width ..."]:
    return np.asarray(image, dtype=float) / 255


def _to_image(pixels: Float[np.ndarray, "height width 3"]) -> Image.Image:
    return Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8))
