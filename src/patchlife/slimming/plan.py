"""The decision: everything that is settled, once, about which patch takes part in which block.

Fixed runs, ragged runs, exports and pictures read a `Plan`; nothing is decided after it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .lives import Lives
from .merging import Heirs, adaptive_heirs, fixed_heirs
from .schedule import Schedule
from .similarity import Likeness

__all__ = ["Plan", "adaptive_plan", "fixed_plan", "longest_first"]


@dataclass(frozen=True)
class Plan:
    """Who lives how long, for a batch.

    Attributes:
        score: what the head said, NaN replaced by the lowest value.
        order: patch indices of each image, longest life first. Everything runs in this order.
        schedule: survivors per block. In adaptive mode they are the budget's average, not any image's.
        grid: (rows, cols) of the patches.
        counts: in adaptive mode, how many patches of each image enter each block; None in fixed mode.
        heirs: who inherits from each rank, and how much; None where the dead leave nothing.
    """

    score: Float[Tensor, "batch patches"]
    order: Int[Tensor, "batch patches"]
    schedule: Schedule
    grid: tuple[int, int]
    counts: Int[Tensor, "batch depth"] | None = None
    heirs: Heirs | None = None

    def survivors(self) -> Int[Tensor, "batch depth"]:
        """How many patches of each image enter each block, in either mode."""
        if self.counts is not None:
            return self.counts
        return torch.tensor(self.schedule.survivors, device=self.order.device).expand(self.order.shape[0], -1)

    def rank(self) -> Int[Tensor, "batch patches"]:
        """Each patch's place in `order` (its inverse permutation)."""
        return self.order.argsort(dim=1)

    def lives(self) -> Lives:
        """The plan as lives: a patch of rank r takes part in the blocks that more than r patches enter."""
        survivors = self.survivors()
        life = (self.rank()[:, :, None] < survivors[:, None, :]).sum(dim=2).float()
        return Lives(life, survivors, self.score, self.grid)


def longest_first(score: Float[Tensor, "batch patches"]) -> tuple[Tensor, Int[Tensor, "batch patches"]]:
    """(cleaned score, patch indices by falling score): NaN counts as lowest, ties go to the lower patch index."""
    lowest = torch.finfo(torch.float32).min
    score = torch.nan_to_num(score.float(), nan=lowest, posinf=-lowest, neginf=lowest)
    if torch.onnx.is_in_onnx_export():  # a stable sort does not export; ONNX's TopK takes the lower index of a tie
        return score, score.topk(score.shape[1], dim=1).indices
    return score, score.sort(dim=1, descending=True, stable=True).indices


def fixed_plan(
    score: Float[Tensor, "batch patches"],
    likeness: Likeness | None,
    schedule: Schedule,
    grid: tuple[int, int],
) -> Plan:
    """Every image keeps its own best patches, as many as the schedule says."""
    score, order = longest_first(score)
    heirs = None if likeness is None else fixed_heirs(likeness, order, schedule)
    return Plan(score, order, schedule, grid, heirs=heirs)


def adaptive_plan(
    score: Float[Tensor, "batch patches"],
    likeness: Likeness | None,
    schedule: Schedule,
    grid: tuple[int, int],
    thresholds: Float[Tensor, "depth"],
) -> Plan:
    """A patch enters a block while its score is above that block's threshold, whatever its image's other scores.

    The best patch of an image always lives, so that no image is left without any.
    """
    score, order = longest_first(score)
    counts = (score[:, :, None] > thresholds.to(score)).sum(dim=1).clamp(min=1)
    counts = counts.cummin(dim=1).values
    heirs = None if likeness is None else adaptive_heirs(likeness, order, counts)
    return Plan(score, order, schedule, grid, counts, heirs)
