"""Pictures of dense prediction: photo, truth, the dense model's answer, the slimmed one's, and the life map, in a row."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from ..errors import ConfigError
from .layout import beside, captioned
from .maps import Photo, draw, opened

if TYPE_CHECKING:
    from ..slimming.lives import Lives

__all__ = ["class_colours", "segmentation_row"]

Classes = Int[np.ndarray, "height width"]

_BLANK = (255, 255, 255)  # pixels that have no class


def segmentation_row(
    photo: Photo,
    answers: Mapping[str, Classes],
    lives: Lives,
    image: int = 0,
    *,
    classes: int,
    width: int = 320,
) -> Image.Image:
    """Draw a photo, one picture of classes for each of ``answers``, and the life map, side by side with captions.

    Args:
        photo: a file, a PIL image or an array (height, width, 3) of uint8; the model saw all of it.
        answers: class indices of pixels by caption, such as ``{"truth": ..., "dense": ..., "slimmed": ...}``, of any
            resolution. Indices from ``classes`` up have no class and stay white.
        lives: the lives of a batch that contains the photo.
        image: the index of the photo in ``lives``.
        classes: how many classes there are; it decides their colours.
        width: of each picture, in pixels.

    Raises:
        ConfigError: an answer is not a table of class indices, or ``image`` is not in ``lives``.
    """
    full = opened(photo)
    size = (width, round(width * full.height / full.width))
    tiles = [captioned(full.resize(size, Image.Resampling.LANCZOS), "photo")]
    for caption, indices in answers.items():
        tiles.append(captioned(_painted(caption, indices, classes).resize(size, Image.Resampling.NEAREST), caption))
    life_map = draw(full, lives, image, width=width, legend=False).resize(size, Image.Resampling.LANCZOS)
    return beside([*tiles, captioned(life_map, "life map: bright patches pass all blocks")])


def class_colours(classes: int) -> Int[np.ndarray, "classes 3"]:
    """A colour of 0 to 255 for each class: hues a golden angle apart, in three lightnesses."""
    colours = [
        colorsys.hls_to_rgb(0.58 + index * 0.381966, (0.62, 0.45, 0.32)[index % 3], 0.62) for index in range(classes)
    ]
    return np.round(255 * np.array(colours).reshape(-1, 3)).astype(np.uint8)


def _painted(caption: str, indices: Classes, classes: int) -> Image.Image:
    indices = np.asarray(indices)
    if indices.ndim != 2 or indices.dtype.kind not in "iu":
        raise ConfigError(
            f"the answer {caption!r} must be an integer array (height, width) of class indices, got "
            f"{indices.dtype} {indices.shape}; take the argmax over the classes first"
        )
    if indices.min(initial=0) < 0:
        raise ConfigError(f"the answer {caption!r} must have class indices from 0 up, got {indices.min()}")
    table = np.concatenate((class_colours(classes), np.array([_BLANK], np.uint8)))
    return Image.fromarray(table[np.minimum(indices, classes)])
