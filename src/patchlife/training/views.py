"""Random views of photos: crops, flips, and mixtures of two photos; pure functions of pixels and draws.

All random numbers are drawn on the CPU for a whole batch, so views depend neither on the device nor on how many
processes share a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

__all__ = ["Draws", "draw_views", "random_views", "views_of", "whole_photos"]

_SMALLEST_AREA = 0.25  # of a crop, as a fraction of the photo
_LARGEST_STRETCH = 4 / 3  # of the aspect ratio
_MIXED = 0.5  # fraction of the views that are mixtures


class Draws(NamedTuple):
    """The random choices of a batch of views. Coordinates are x, y in [-1, 1] over the whole photo.

    Attributes:
        centre: of the crops.
        extent: half width and half height of the crops; the half width is negative if the view is flipped.
        weight: of the view's own photo. The rest is that of the view at the same place from the end of the batch.
    """

    centre: Float[Tensor, "batch 2"]
    extent: Float[Tensor, "batch 2"]
    weight: Float[Tensor, "batch"]


def draw_views(
    aspect: Float[Tensor, "batch"], size: tuple[int, int], generator: torch.Generator, mixed: bool = True
) -> Draws:
    """Draw the crop, flip and mixture of each view of a batch.

    A crop has a quarter to all of the photo's area and a random place, and stretches the photo by 4/3 at most: photos
    are stored squashed, which the crop undoes. A crop that would be wider or higher than its photo ends at its edge.

    Args:
        aspect: width divided by height of the photos.
        size: (height, width) of the views.
        generator: of the CPU.
        mixed: half of the views are mixtures of two photos, with a uniform weight.
    """
    area, stretch, x, y, flip, mixture, weight = torch.rand(7, len(aspect), generator=generator)
    area = _SMALLEST_AREA + (1 - _SMALLEST_AREA) * area
    ratio = ((2 * stretch - 1) * math.log(_LARGEST_STRETCH)).exp() * size[1] / size[0] / aspect
    extent = torch.stack(((area * ratio).sqrt(), (area / ratio).sqrt()), dim=1).clamp(max=1)
    centre = (2 * torch.stack((x, y), dim=1) - 1) * (1 - extent)
    extent = extent * torch.stack((torch.where(flip < 0.5, -1.0, 1.0), torch.ones_like(flip)), dim=1)
    own = torch.where(mixture < _MIXED, weight, 1.0) if mixed else torch.ones_like(weight)
    return Draws(centre, extent, own)


def whole_photos(count: int) -> Draws:
    """The draws of views that show whole photos, unchanged."""
    return Draws(torch.zeros(count, 2), torch.ones(count, 2), torch.ones(count))


def random_views(
    pixels: UInt8[Tensor, "batch channels rows cols"],
    aspect: Float[Tensor, "batch"],
    size: tuple[int, int],
    generator: torch.Generator,
    mixed: bool = True,
) -> Float[Tensor, "batch channels height width"]:
    """A random view of each photo, with values in [0, 1], on the device of ``pixels``; see `draw_views`."""
    draws = draw_views(aspect, size, generator, mixed)
    return views_of(lambda places: pixels[places], draws, range(len(pixels)), size)


def views_of(
    pixels_of: Callable[[list[int]], UInt8[Tensor, "some channels rows cols"]],
    draws: Draws,
    places: Sequence[int],
    size: tuple[int, int],
) -> Float[Tensor, "places channels height width"]:
    """The views at these places of a batch, with values in [0, 1].

    Args:
        pixels_of: gives the photos at some places of the batch: those of ``places`` and those mixed with them.
        draws: of the whole batch.
        places: in the batch.
        size: (height, width) of the views.
    """
    count, weight = len(draws.weight), draws.weight[list(places)]
    others = [count - 1 - place if w < 1 else place for place, w in zip(places, weight.tolist(), strict=True)]
    needed = sorted({*places, *others})
    pixels = pixels_of(needed)
    crops = _crops(pixels, draws.centre[needed].to(pixels.device), draws.extent[needed].to(pixels.device), size)
    own, other = (crops[[needed.index(place) for place in each]] for each in (places, others))
    return torch.lerp(other, own, weight.to(pixels.device)[:, None, None, None])


def _crops(
    pixels: UInt8[Tensor, "batch channels rows cols"],
    centre: Float[Tensor, "batch 2"],
    extent: Float[Tensor, "batch 2"],
    size: tuple[int, int],
) -> Float[Tensor, "batch channels height width"]:
    """The crops resized to ``size``, with values in [0, 1].

    The grid is computed without matrix products, which autocast would round to half precision.
    """
    y, x = (
        centre[:, axis, None] + extent[:, axis, None] * ((torch.arange(side, device=pixels.device) * 2 + 1) / side - 1)
        for axis, side in ((1, size[0]), (0, size[1]))
    )
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    return F.grid_sample(pixels.float() / 255, grid, padding_mode="border", align_corners=False)
