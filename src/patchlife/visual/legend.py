"""The legend of a life map: which colour is which life."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from .layout import INK, PAPER, font, text_size
from .palette import colours

__all__ = ["legend_of"]

_MAX_LISTED = 4  # up to this many distinct lives are listed one by one; more are shown as a colour bar

RGB = tuple[int, ...]


def legend_of(life: Float[np.ndarray, "rows cols"], first: int, last: int, width: int) -> Image.Image:
    """Draw the legend of one life map.

    Args:
        life: the lives, in blocks.
        first: the life with the darkest colour, in blocks.
        last: the life with the brightest colour, in blocks: the model's depth.
        width: of the legend, in pixels.
    """
    values, counts = np.unique(life, return_counts=True)
    if len(values) <= _MAX_LISTED:
        texts = [_text(value, count, last) for value, count in zip(values, counts, strict=True)]
        return _swatches(texts, [_rgb(value, first, last) for value in values], width)
    return _bar(first, last, width)


def _text(value: float, count: int, last: int) -> str:
    """The entry of one life: "3 blocks · 102 patches"."""
    life = "all blocks" if value >= last else f"{value:.3g} block{'' if value == 1 else 's'}"
    return f"{life} · {count} patch{'' if count == 1 else 'es'}"


def _rgb(value: float, first: int, last: int) -> RGB:
    return tuple(round(255 * channel) for channel in colours(np.array(value), first, last))


def _swatches(texts: list[str], fills: list[RGB], width: int) -> Image.Image:
    """A coloured square and a text for each life, in as many columns as fit."""
    size = text_size(width)
    box, step, top = size, round(1.6 * size), round(0.7 * size)
    entry = 1.5 * box + max(font(size).getlength(text) for text in texts)
    columns = min(max(int((width + 1.2 * size) / (entry + 1.2 * size)), 1), len(texts))
    rows = math.ceil(len(texts) / columns)
    sheet = Image.new("RGB", (width, top + step * rows), PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, (text, fill) in enumerate(zip(texts, fills, strict=True)):
        x, y = (i % columns) * (width / columns), top + (i // columns) * step
        pen.rounded_rectangle((x, y, x + box, y + box), box / 5, fill)
        pen.text((x + 1.5 * box, y + box / 2), text, INK, font(size), anchor="lm")
    return sheet


def _bar(first: int, last: int, width: int) -> Image.Image:
    """A colour bar with one step per block and the shortest and longest life at its ends."""
    size = text_size(width)
    top, thick = round(0.7 * size), round(0.8 * size)
    sheet = Image.new("RGB", (width, top + thick + round(1.8 * size)), PAPER)
    pen = ImageDraw.Draw(sheet)
    steps = last - first + 1
    for step in range(steps):
        x0, x1 = round(step * width / steps), round((step + 1) * width / steps) - 1
        pen.rectangle((x0, top, x1, top + thick), _rgb(first + step, first, last))
    line = top + thick + round(0.4 * size)
    left, middle, right = f"{first} block{'' if first == 1 else 's'}", "life of a patch", "all blocks"
    pen.text((0, line), left, INK, font(size), anchor="la")
    pen.text((width, line), right, INK, font(size), anchor="ra")
    if font(size).getlength(left + right + middle) + 4 * size < width:
        pen.text((width / 2, line), middle, INK, font(size), anchor="ma")
    return sheet
