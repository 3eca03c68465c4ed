"""One photo and its lives: the map, and the strip of what is alive at some blocks."""

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

_SOFTNESS = 0.06  # blur of the cells' edges, as a part of a cell's side
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
    """Draw a life map over a photo: dark patches die first, bright ones live to the end.

    Args:
        photo: a file, a PIL image (taken as it is, whatever its EXIF says) or an array
            (height, width, 3) of uint8.
        lives: what the model said about it.
        image: which of the images in ``lives`` the photo is.
        preprocess: how the photo was prepared, so that the map lies exactly where the model looked. Without
            it, the largest central part with the grid's proportions is taken.
        width: of the picture, in pixels.
        whole: show the whole photo, with the margin that the model did not see dimmed.
        legend: put the meaning of the colours underneath.

    Raises:
        ImageError: a photo that cannot be read.
        ConfigError: no such image in ``lives``, or a width out of bounds.
    """
    full, one, preprocess = _prepared(photo, lives, image, preprocess, width)
    seen = _as_seen(full, preprocess, width)
    first, last = _range(lives)
    tint = _over_cells(colours(_life(one), first, last), seen.size)
    picture = _to_image(_tinted(seen, tint))
    if whole:
        picture = _within(full, picture, preprocess, width)
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
    """Draw what is alive at some blocks, side by side: kept in colour, the dead in night blue.

    Args:
        photo: as for `draw`.
        lives: what the model said about it.
        blocks: which blocks to show; by default five, from the first to the last, evenly spread.
        image: which of the images in ``lives`` the photo is.
        preprocess: as for `draw`.
        width: of each panel, in pixels.

    Raises:
        ImageError: a photo that cannot be read.
        ConfigError: no such image or block, or a width out of bounds.
    """
    full, one, preprocess = _prepared(photo, lives, image, preprocess, width)
    seen = _as_seen(full, preprocess, width)
    blocks = _spread(lives.depth) if blocks is None else blocks
    if not blocks or not all(0 <= block < lives.depth for block in blocks):
        raise ConfigError(f"blocks must be within 0..{lives.depth - 1}, got {list(blocks)}")
    return beside([_panel(seen, _life(one), block) for block in blocks])


def _prepared(
    photo: Photo, lives: Lives, image: int, preprocess: Preprocess | None, width: int
) -> tuple[Image.Image, Lives, Preprocess]:
    """Check what both pictures are given, and fill in what they may do without."""
    if not 0 <= image < len(lives):
        raise ConfigError(f"image must be within 0..{len(lives) - 1}, one of those in lives, got {image}")
    if not _WIDTHS[0] <= width <= _WIDTHS[1]:
        raise ConfigError(f"width must be within {_WIDTHS[0]}..{_WIDTHS[1]} pixels, got {width}")
    if preprocess is None:  # square patches, nothing trimmed but what sticks out
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
        "draw over the photo itself, not over the tensor made from it"
    )


def _as_seen(photo: Image.Image, preprocess: Preprocess, width: int) -> Image.Image:
    """What the model saw, from the photo's own pixels rather than from the few that the model was given."""
    height = max(round(width * preprocess.size[0] / preprocess.size[1]), 1)
    return replace(preprocess, size=(height, width), interpolation="lanczos").shown(photo)


def _life(one: Lives) -> Float[np.ndarray, "rows cols"]:
    return one.map().detach().cpu().double().numpy()


def _range(lives: Lives) -> tuple[int, int]:
    """The shortest and the longest life of the whole batch, so that its pictures share one scale."""
    return int(lives.life.min().nan_to_num()), lives.depth


def _spread(depth: int) -> list[int]:
    """Five blocks from the first to the last: 0, 3, 6, 9, 11 of 12."""
    return sorted({min(round(quarter * depth / 4), depth - 1) for quarter in range(5)})


def _over_cells(cells: Float[np.ndarray, "rows cols 3"], size: tuple[int, int]) -> Pixels:
    """Enlarge one colour per cell to a picture (width, height), the edges between cells a little softened."""
    small = _to_image(cells)
    cell = min(size[0] / small.width, size[1] / small.height)
    large = small.resize(size, Image.Resampling.NEAREST)
    return _to_pixels(large.filter(ImageFilter.GaussianBlur(_SOFTNESS * cell)))


def _tinted(photo: Image.Image, tint: Pixels) -> Pixels:
    """The photo in one colour per cell."""
    relief = _relief(photo)[..., None]
    return tint * (0.55 + 0.8 * relief) + 0.15 * (relief - 0.3)  # the sum keeps the darkest ones readable


def _relief(photo: Image.Image) -> Float[np.ndarray, "height width"]:
    """The photo's structure in grey, without its large dark and bright areas.

    Lightness is what tells lives apart: a black cat must not look short-lived because it is black.
    """
    grey = photo.convert("L")
    around = _to_pixels(grey.filter(ImageFilter.GaussianBlur(min(grey.size) / 14)))
    return np.clip(0.5 + 0.9 * (_to_pixels(grey) - around) + 0.35 * (around - 0.5), 0, 1)


def _within(full: Image.Image, picture: Image.Image, preprocess: Preprocess, width: int) -> Image.Image:
    """Lay a drawn picture into the whole photo, where the model looked; the rest is dimmed."""
    scale = min(width / full.width, 3 * width / full.height)  # a picture of a thread stays a bounded one
    size = (max(round(full.width * scale), 1), max(round(full.height * scale), 1))
    whole = full.resize(size, Image.Resampling.LANCZOS)
    dimmed = Image.blend(whole.convert("L").convert("RGB"), Image.new("RGB", whole.size, "white"), 0.55)
    left, top, right, bottom = (round(edge * scale) for edge in preprocess.crop_box(full.size))
    extent = (max(right - left, 1), max(bottom - top, 1))
    dimmed.paste(picture.resize(extent, Image.Resampling.LANCZOS), (left, top))
    return dimmed


def _panel(seen: Image.Image, life: Float[np.ndarray, "rows cols"], block: int) -> Image.Image:
    alive: Bool[np.ndarray, "rows cols"] = life > block
    shown = _over_cells(np.repeat(alive[..., None].astype(float), 3, axis=2), seen.size)
    dead = _tinted(seen, colours(np.zeros(1), first=0, last=1))
    picture = _to_image(shown * _to_pixels(seen) + (1 - shown) * dead)
    count = int(alive.sum())
    return captioned(picture, f"block {block} · {count} kept")


def _to_pixels(image: Image.Image) -> Float[np.ndarray, "height width ..."]:
    return np.asarray(image, dtype=float) / 255


def _to_image(pixels: Float[np.ndarray, "height width 3"]) -> Image.Image:
    return Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8))
