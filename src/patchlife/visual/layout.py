"""Arrange pictures and text on a white background."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

__all__ = ["INK", "PAPER", "beside", "captioned", "font", "padded", "stacked", "text_size"]

PAPER = "white"
INK = (45, 45, 55)


@lru_cache(maxsize=16)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's built-in font, which is the same on every machine; ``size`` is its height in pixels."""
    return ImageFont.load_default(size)


def text_size(width: int) -> int:
    """The font size for a picture of this width, both in pixels."""
    return max(12, min(round(width / 26), 24))


def padded(picture: Image.Image, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0) -> Image.Image:
    """The picture with a white margin; sizes are in pixels."""
    size = (picture.width + left + right, picture.height + top + bottom)
    sheet = Image.new("RGB", size, PAPER)
    sheet.paste(picture, (left, top))
    return sheet


def wrapped(text: str, width: int, size: int) -> list[str]:
    """Break a text into lines of at most ``width`` pixels; a word that is too long for a line is broken too."""
    lines = [""]
    for word in text.split():
        while word:
            joined = f"{lines[-1]} {word}".strip()
            if font(size).getlength(joined) <= width:
                lines[-1], word = joined, ""
            elif lines[-1]:
                lines.append("")
            else:  # the word is alone in its line and too long
                fits = max(1, sum(font(size).getlength(word[: n + 1]) <= width for n in range(len(word))))
                lines[-1], word = word[:fits], word[fits:]
                lines.append("")
    return [line for line in lines if line]


def captioned(picture: Image.Image, caption: str) -> Image.Image:
    """The picture with a centred caption below it."""
    size = text_size(picture.width)
    lines = wrapped(caption, picture.width, size)
    step, gap = round(1.3 * size), round(0.5 * size)
    below = Image.new("RGB", (picture.width, gap + step * len(lines)), PAPER)
    pen = ImageDraw.Draw(below)
    for row, line in enumerate(lines):
        pen.text((picture.width / 2, gap + row * step), line, INK, font(size), anchor="ma")
    return stacked([picture, below])


def stacked(pictures: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    """Pictures below each other, aligned to the left; ``gap`` is in pixels."""
    width = max(picture.width for picture in pictures)
    sheet = Image.new("RGB", (width, sum(p.height for p in pictures) + gap * (len(pictures) - 1)), PAPER)
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height + gap
    return sheet


def beside(pictures: Sequence[Image.Image], gap: int = 10) -> Image.Image:
    """Pictures next to each other, aligned to the top; ``gap`` is in pixels."""
    height = max(picture.height for picture in pictures)
    sheet = Image.new("RGB", (sum(p.width for p in pictures) + gap * (len(pictures) - 1), height), PAPER)
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + gap
    return sheet
