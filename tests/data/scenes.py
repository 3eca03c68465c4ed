"""Small test pictures in which all pixels differ, so that a flip, a shift or a rounding error is visible."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def scene(width: int = 40, height: int = 30) -> Image.Image:
    """Red increases to the right, green downwards; blue is a sine wave."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    wave = 0.5 + 0.5 * np.sin(9 * x + 5 * y)
    return Image.fromarray((255 * np.stack([x, y, wave], axis=-1)).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()
