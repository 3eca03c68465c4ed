"""The palette of life maps: dark blue for the shortest lives, through magenta and orange, to pale yellow."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

__all__ = ["colours"]

# Equal steps in OKLab lightness from 0.35 to 0.95, with a hue from blue through red to yellow. The lightness alone
# gives the order, so the palette works for colour-blind readers and in grey print.
_TABLE = np.array(
    [
        (51, 46, 116),
        (101, 61, 149),
        (164, 70, 158),
        (229, 88, 108),
        (255, 137, 80),
        (255, 189, 100),
        (255, 237, 173),
    ]
)


def colours(life: Float[np.ndarray, "..."], first: float, last: float) -> Float[np.ndarray, "... 3"]:
    """The colour of each life.

    Args:
        life: in blocks; NaN counts as ``first``.
        first: the life with the darkest colour, in blocks; shorter lives have the same colour.
        last: the life with the brightest colour, in blocks: the model's depth.

    Returns:
        Red, green and blue in [0, 1].
    """
    span = last - first
    place = (np.nan_to_num(life, nan=first) - first) / span if span > 0 else np.ones_like(life)
    steps = np.linspace(0, 1, len(_TABLE))
    return np.stack([np.interp(place, steps, channel / 255) for channel in _TABLE.T], axis=-1)
