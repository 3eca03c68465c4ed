"""Contact sheets: many pictures in one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

from ..errors import ConfigError
from .layout import beside, captioned, padded, stacked

__all__ = ["contact_sheet"]

_GAP = 12


def contact_sheet(
    tiles: Sequence[tuple[Image.Image, str]], columns: int | None = None, *, width: int = 220
) -> Image.Image:
    """Arrange captioned pictures in rows.

    Args:
        tiles: (picture, caption) pairs. Each picture is scaled to fit a square; its aspect ratio is kept.
        columns: pictures per row; the default makes the sheet somewhat wider than high.
        width: of each tile, in pixels.

    Raises:
        ConfigError: no tiles, or ``columns`` is below 1.
    """
    if not tiles:
        raise ConfigError("a contact sheet needs at least one picture, got none")
    columns = math.ceil(math.sqrt(1.5 * len(tiles))) if columns is None else columns
    if columns < 1:
        raise ConfigError(f"columns must be at least 1, got {columns}")
    rows = [_row(tiles[i : i + columns], width) for i in range(0, len(tiles), columns)]
    return padded(stacked(rows, _GAP), _GAP, _GAP, _GAP, _GAP)


def _row(tiles: Sequence[tuple[Image.Image, str]], width: int) -> Image.Image:
    """One row: pictures aligned at the bottom, with their captions below."""
    pictures = [_fitted(picture, width) for picture, _ in tiles]
    height = max(picture.height for picture in pictures)
    aligned = [padded(picture, top=height - picture.height) for picture in pictures]
    captions = [caption for _, caption in tiles]
    return beside([captioned(*tile) for tile in zip(aligned, captions, strict=True)], _GAP)


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """The picture, scaled so that its longer side has ``side`` pixels, and centred horizontally."""
    scale = side / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    small = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    left = (side - size[0]) // 2
    return padded(small, left=left, right=side - size[0] - left)
