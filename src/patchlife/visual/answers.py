"""Draw dense predictions: a class for each pixel, in one colour per class."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from ..data import AnyPhoto, Preprocess, read_photo
from .layout import beside, captioned
from .maps import draw

if TYPE_CHECKING:
    from ..slimming.lives import Lives

__all__ = ["class_colours", "class_map", "draw_answers"]

_TURN = 0.618034  # of the hue from one class to the next: the golden ratio keeps the hues of any number apart
_LIGHTNESS = (0.5, 0.72, 0.3)


def class_colours(classes: int) -> Float[np.ndarray, "classes 3"]:
    """A colour for each class: red, green and blue in [0, 1]. The colour of a class does not depend on their number."""
    hues = [(index * _TURN) % 1 for index in range(classes)]
    return np.array(
        [colorsys.hls_to_rgb(hue, _LIGHTNESS[index % len(_LIGHTNESS)], 0.65) for index, hue in enumerate(hues)]
    ).reshape(classes, 3)


def class_map(
    answer: Int[np.ndarray, "rows cols"], colours: Float[np.ndarray, "classes 3"], size: tuple[int, int]
) -> Image.Image:
    """A picture of ``size`` (width, height) in pixels with the colour of each pixel's class; no colour is mixed.

    A pixel whose class has no colour, such as -1 or 255 for an unknown one, is black.
    """
    known = (answer >= 0) & (answer < len(colours))
    cells = np.where(known[..., None], colours[np.where(known, answer, 0)], 0)
    return Image.fromarray((cells * 255).round().astype(np.uint8)).resize(size, Image.Resampling.NEAREST)


def draw_answers(
    photo: AnyPhoto,
    answers: Sequence[tuple[str, Int[np.ndarray, "rows cols"]]],
    lives: Lives,
    colours: Float[np.ndarray, "classes 3"],
    preprocess: Preprocess,
    *,
    width: int = 240,
) -> Image.Image:
    """Side by side: the photo as the model received it, an answer for each pair of caption and classes, the life map.

    Args:
        photo: a file, or a sample of a data set.
        answers: such as the ground truth, and the answers of the dense and of the slimmed model.
        lives: those of the photo alone.
        colours: of the classes, see `class_colours`.
        preprocess: the preprocessing of the model.
        width: of each picture, in pixels.

    Raises ImageError if the photo cannot be read.
    """
    picture = read_photo(photo)
    life_map = draw(picture, lives, preprocess=preprocess, width=width, legend=False)
    shown = preprocess.shown(picture).resize(life_map.size, Image.Resampling.LANCZOS)
    maps = [captioned(class_map(answer, colours, life_map.size), caption) for caption, answer in answers]
    return beside([captioned(shown, "photo"), *maps, captioned(life_map, "life map")])
