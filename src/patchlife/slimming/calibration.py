"""Adaptive mode's rule across images: which score lets a patch into a block, so that the *mean* budget holds.

Scores of unlabelled images are pooled into a table: for each share of patches kept, the threshold that keeps it,
and the mean square of the images' own shares (attention is quadratic in each image's own count, so an uneven
split costs more than an even one of the same mean). Any budget is then a look-up; no image is needed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError, NumericalError
from .schedule import Cost, Schedule, floor, largest, solve

__all__ = ["Calibration", "images_in"]

_KEYS = ("pixel_values", "image", "images")  # of batches that are dicts: transformers' name, and data sets'
LEVELS = 513  # shares 0, 1/512, ..., 1


@dataclass(frozen=True)
class Calibration:
    """Thresholds for every share of patches kept, over a set of images.

    Attributes:
        threshold: score above which a patch is kept, for shares ``i / (levels - 1)``, falling.
        square: mean over the images of their squared share kept at that threshold.
        images: how many images were looked at.
        patches: how many each of them had. Scores of other image sizes are distributed differently.
    """

    threshold: Float[Tensor, "levels"]
    square: Float[Tensor, "levels"]
    images: int
    patches: int

    @classmethod
    def of(cls, score: Float[Tensor, "images patches"]) -> Calibration:
        """Calibrate on the scores of unlabelled images.

        Raises NumericalError if a score is not finite, ConfigError if there are none.
        """
        if not len(score):
            raise ConfigError("calibration needs at least one image, got none")
        if not torch.isfinite(score).all():
            raise NumericalError("calibration images gave scores that are not finite; check pixels and weights")
        score = score.detach().float().cpu()
        images, patches = score.shape
        pooled = score.flatten().sort(descending=True).values
        kept = torch.linspace(0, pooled.numel(), LEVELS).round().long()
        # halfway between the last score kept and the first one dropped: rounding noise decides nothing
        beyond = 1 + 1e-5 * pooled.abs().max()  # a step that float32 sees at any scale
        padded = torch.cat((pooled[:1] + beyond, pooled, pooled[-1:] - beyond))
        threshold = (padded[kept] + padded[kept + 1]) / 2
        counts = torch.stack([(score > t).sum(dim=1).clamp(min=1) for t in threshold])
        return cls(threshold, (counts / patches).square().mean(dim=1), images, patches)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, exact."""
        return {
            "threshold": self.threshold.tolist(),
            "square": self.square.tolist(),
            "images": self.images,
            "patches": self.patches,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Calibration:
        """The inverse of `to_dict`."""
        threshold, square = (torch.tensor(values[name]) for name in ("threshold", "square"))
        return cls(threshold, square, values["images"], values["patches"])

    def tensors(self) -> dict[str, Tensor]:
        """What an adapter saves of it."""
        return {"threshold": self.threshold, "square": self.square}

    def thresholds(self, survivors: tuple[int, ...], patches: int) -> Float[Tensor, "depth"]:
        """The score that a patch must exceed to enter each block; -inf where all of them do."""
        shares = torch.tensor(survivors) / patches
        values = self._look_up(self.threshold, shares)
        return torch.where(shares >= 1, torch.full_like(values, -torch.inf), values)

    def mean_flops(self, cost: Cost, survivors: tuple[int, ...]) -> float:
        """Mean FLOPs over the calibration images when ``survivors`` is the mean count of each block."""
        return cost.total(survivors, self.squares(survivors, cost.patches))

    def squares(self, survivors: tuple[int, ...], patches: int) -> list[float]:
        """Mean over the calibration images of their squared counts, when ``survivors`` are their mean counts."""
        return (self._look_up(self.square, torch.tensor(survivors) / patches) * patches**2).tolist()

    def solve(self, cost: Cost, budget: float, start: int, drops: tuple[int, ...]) -> Schedule:
        """The mean survivors per block that spend ``budget`` on average over the calibration images.

        An even split of them would cost less, so a smaller budget is spread evenly: the largest that works out.
        Raises ConfigError when the budget is out of reach.
        """
        schedule = solve(cost, budget, start, drops)
        if budget >= 1:
            return schedule
        lowest = floor(cost, drops) * (1 + 1e-9)

        def even(share: float) -> Schedule:
            return solve(cost, lowest + share * max(budget - lowest, 0), start, drops)

        def fits(share: float) -> bool:
            return self.mean_flops(cost, even(share).survivors) <= budget * cost.dense

        if not fits(0.0):
            raise ConfigError(
                f"budget {budget:g} is out of reach: the calibration images keep so unequal numbers of patches that "
                "their mean costs more; choose a larger budget or an earlier start"
            )
        return even(largest(fits, steps=12))

    def _look_up(self, table: Tensor, shares: Tensor) -> Tensor:
        place = (shares * (LEVELS - 1)).clamp(0, LEVELS - 1)
        low = place.floor().long()
        high = (low + 1).clamp(max=LEVELS - 1)
        return torch.lerp(table[low], table[high], place - low)


def images_in(batch: Any) -> Float[Tensor, "batch channels height width"]:
    """The images of a batch as data loaders give it: a tensor, a tuple that begins with one, or a dict with one.

    Raises ConfigError for anything else.
    """
    found = batch
    if isinstance(batch, dict) or hasattr(batch, "keys"):
        found = next((batch[key] for key in _KEYS if key in batch), None)
    elif isinstance(batch, list | tuple) and batch:
        found = batch[0]
    if not isinstance(found, Tensor) or found.ndim != 4:
        got = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(batch).__name__
        raise ConfigError(
            "expected batches of images (batch, channels, height, width), tuples that begin with one, or dicts with "
            f"one as {', '.join(_KEYS)}; got {got}"
        )
    return found
