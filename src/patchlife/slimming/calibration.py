"""Calibration of adaptive mode: thresholds on scores with which the *mean* cost over images meets the budget.

The scores of unlabelled images are pooled into a table. For each fraction of patches kept it holds the threshold that
keeps this fraction, and the mean square of the fractions of the single images (attention is quadratic in the number of
tokens, so unequal numbers cost more than equal ones of the same mean). Any budget is then a look-up in this table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError, NumericalError
from .cost import Cost
from .schedule import Schedule, floor, largest, solve

__all__ = ["Calibration", "bands", "images_in", "nearest"]

_KEYS = ("pixel_values", "image", "images")  # of batches that are dicts: transformers' name, and data sets'
LEVELS = 513  # fractions 0, 1/512, ..., 1
NEAR = 1.25
"""Thresholds serve images whose number of patches is at most this many times larger or smaller."""


@dataclass(frozen=True)
class Calibration:
    """Thresholds for every fraction of patches kept, over a set of images.

    Attributes:
        threshold: score above which a patch is kept, for the fractions ``i / (levels - 1)``; falling.
        square: mean over the images of the squared fraction that each keeps at that threshold.
        images: number of images.
        patches: number of patches of each, or their mean. Scores of other image sizes are distributed differently.
    """

    threshold: Float[Tensor, "levels"]
    square: Float[Tensor, "levels"]
    images: int
    patches: int
    _found: dict[tuple, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, score: Float[Tensor, "images patches"] | Sequence[Float[Tensor, "patches"]]) -> Calibration:
        """Calibrate on the scores of unlabelled images, whose numbers of patches may differ a little (see `bands`).

        Raises NumericalError if a score is not finite, ConfigError if there are none.
        """
        if not len(score):
            raise ConfigError("calibration needs at least one image, got none")
        each = [image.detach().float().cpu() for image in score]
        pooled = torch.cat(each)
        if not torch.isfinite(pooled).all():
            raise NumericalError("calibration images gave scores that are not finite; check pixels and weights")
        pooled = pooled.sort(descending=True).values
        kept = torch.linspace(0, pooled.numel(), LEVELS).round().long()
        # halfway between the last score kept and the first one dropped, so that rounding noise has no effect
        beyond = 1 + 1e-5 * pooled.abs().max()  # large enough for float32 at any scale
        padded = torch.cat((pooled[:1] + beyond, pooled, pooled[-1:] - beyond))
        threshold = (padded[kept] + padded[kept + 1]) / 2
        counts = [(image > threshold[:, None]).sum(dim=1).clamp(min=1) for image in each]
        squares = torch.stack([(count / len(image)).square() for count, image in zip(counts, each, strict=True)])
        return cls(threshold, squares.mean(dim=0), len(each), round(pooled.numel() / len(each)))

    def of_patches(self, patches: int) -> Calibration:
        """For images of another number of patches, if scores are shares of an image: of more patches each gets less."""
        if patches == self.patches:
            return self
        return replace(self, threshold=self.threshold * (self.patches / patches), patches=patches)

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
        """The tables, for saving."""
        return {"threshold": self.threshold, "square": self.square}

    def thresholds(
        self, kept: tuple[int, ...], patches: int, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "depth"]:
        """The score that a patch must exceed to enter each block; -inf where all of them do. On ``device``, cached."""
        key = (kept, patches, torch.device(device))
        if key not in self._found:
            fractions = self._fractions(kept, patches)
            values = self._look_up(self.threshold, fractions)
            self._found[key] = values.masked_fill(fractions >= 1, -torch.inf).to(device)
        return self._found[key]

    def mean_flops(self, cost: Cost, kept: tuple[int, ...]) -> float:
        """Mean FLOPs over the calibration images when ``kept`` is the mean count of each block."""
        return cost.total(kept, self.squares(kept, cost.patches))

    def squares(self, kept: tuple[int, ...], patches: int) -> list[float]:
        """Mean over the calibration images of their squared counts, when ``kept`` are their mean counts."""
        return (self._look_up(self.square, self._fractions(kept, patches)) * patches**2).tolist()

    def solve(self, cost: Cost, budget: float, start: int, drops: tuple[int, ...], power: float = 1.0) -> Schedule:
        """The mean numbers of patches kept per block that cost ``budget`` on average over the calibration images.

        Equal numbers in all images would cost less than the images' own ones, so the schedule is solved for a smaller
        budget: the largest whose mean cost, with the images' own numbers, is within ``budget``.

        Raises ConfigError when the budget is out of reach.
        """
        schedule = solve(cost, budget, start, drops, power)
        if budget >= 1:
            return schedule
        lowest = floor(cost, drops) * (1 + 1e-9)

        def at(fraction: float) -> Schedule:
            return solve(cost, lowest + fraction * max(budget - lowest, 0), start, drops, power)

        def fits(fraction: float) -> bool:
            return self.mean_flops(cost, at(fraction).kept) <= budget * cost.dense

        if not fits(0.0):
            raise ConfigError(
                f"budget {budget:g} is out of reach: the calibration images differ so much in their numbers of kept "
                "patches that the mean cost is higher; choose a larger budget or an earlier start"
            )
        return at(largest(fits, steps=12))

    def _fractions(self, kept: tuple[int, ...], patches: int) -> Float[Tensor, "depth"]:
        return torch.tensor(kept, device=self.threshold.device) / patches

    def _look_up(self, table: Tensor, fractions: Tensor) -> Tensor:
        place = (fractions * (LEVELS - 1)).clamp(0, LEVELS - 1)
        low = place.floor().long()
        high = (low + 1).clamp(max=LEVELS - 1)
        return torch.lerp(table[low], table[high], place - low)


def nearest(calibrations: Mapping[int, Calibration], patches: int) -> Calibration | None:
    """The calibration for images of so many patches, else from the nearest number within `NEAR`; None without one."""

    def apart(number: int) -> float:
        return max(number, patches) / min(number, patches)

    number = min(calibrations, key=apart, default=None)
    return calibrations[number].of_patches(patches) if number is not None and apart(number) <= NEAR else None


def bands(scores: Sequence[Float[Tensor, "patches"]], shares: bool = True) -> Iterator[list[Float[Tensor, "patches"]]]:
    """The scores of images of different sizes, grouped so that numbers of patches in a group are within `NEAR`.

    Unless scores are ``shares`` of an image, those of a group are of images of one number of patches.

    The scores of a group are those of images of its mean number of patches, see `Calibration.of_patches`.
    """
    groups: list[list[Tensor]] = []
    near = NEAR if shares else 1.0
    for score in sorted(scores, key=len, reverse=True):
        if not groups or len(groups[-1][0]) > near * len(score):
            groups.append([])
        groups[-1].append(score)
    for group in groups:
        mean = round(sum(map(len, group)) / len(group))
        yield [score * (len(score) / mean) for score in group]


def images_in(
    batch: Any,
) -> Float[Tensor, "batch channels height width"] | list[Float[Tensor, "channels height width"]]:
    """The images of a batch from a data loader: a tensor, a tuple that begins with one, or a dict with one.

    A list of single images, which may have different sizes, takes the place of the tensor.

    Raises ConfigError for anything else.
    """
    found = batch
    if isinstance(batch, dict) or hasattr(batch, "keys"):
        found = next((batch[key] for key in _KEYS if key in batch), None)
    elif isinstance(batch, list | tuple) and batch and not _are_images(batch):
        found = batch[0]
    if _are_images(found):
        return list(found)
    if not isinstance(found, Tensor) or found.ndim != 4:
        got = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(batch).__name__
        raise ConfigError(
            "expected batches of images (batch, channels, height, width), tuples that begin with one, or dicts with "
            f"one as {', '.join(_KEYS)}; got {got}"
        )
    return found


def _are_images(value: Any) -> bool:
    """Whether ``value`` is a list of single images (channels, height, width)."""
    return (
        isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(i, Tensor) and i.ndim == 3 for i in value)
    )
