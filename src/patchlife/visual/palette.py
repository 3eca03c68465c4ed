"""The colours of life: night blue for the first to die, through magenta and orange, to pale yellow."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

__all__ = ["colours"]

# Made for this project: equal steps in OKLab lightness, 0.35 to 0.95, while the hue runs the warm way round.
# Lightness alone carries the order, so it reads the same in every kind of colour vision and in grey print.
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
    """Look up the colour of each life.

    Args:
        life: in blocks.
        first: the life that is darkest, in blocks; shorter ones look the same.
        last: the life that is brightest: the model's depth.

    Returns:
        Red, green, blue in [0, 1].
    """
    span = last - first
    place = (np.nan_to_num(life, nan=first) - first) / span if span > 0 else np.ones_like(life)
    steps = np.linspace(0, 1, len(_TABLE))
    return np.stack([np.interp(place, steps, channel / 255) for channel in _TABLE.T], axis=-1)
