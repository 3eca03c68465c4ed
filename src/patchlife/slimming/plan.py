"""The plan: everything that is decided about a batch, once. Runs, exports and pictures only read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .lives import Lives
from .merging import MergeTargets, adaptive_merge_targets, fixed_merge_targets
from .schedule import Schedule
from .similarity import falling, take, token_index

__all__ = ["Plan", "adaptive_plan", "fixed_plan", "longest_first"]


@dataclass(frozen=True)
class Plan:
    """The decision for a batch: which patches enter which block, and where dropped ones are merged.

    Attributes:
        score: the scorer's, with NaN replaced by the lowest value.
        order: patch indices of each image, longest life first; every block runs on a prefix of this order.
        schedule: patches kept per block; in adaptive mode the mean over images that the budget allows.
        grid: (rows, cols) of the patches.
        counts: in adaptive mode, how many patches of each image enter each block; None in fixed mode.
        merge_targets: where each rank is merged, and with which weight; None without merging.
    """

    score: Float[Tensor, "batch patches"]
    order: Int[Tensor, "batch patches"]
    schedule: Schedule
    grid: tuple[int, int]
    counts: Int[Tensor, "batch depth"] | None = None
    merge_targets: MergeTargets | None = None

    def kept(self) -> Int[Tensor, "batch depth"]:
        """How many patches of each image enter each block, in either mode."""
        if self.counts is not None:
            return self.counts
        return torch.tensor(self.schedule.kept, device=self.order.device).expand(self.order.shape[0], -1)

    def rank(self) -> Int[Tensor, "batch patches"]:
        """The place of each patch in `order` (the inverse permutation)."""
        return self.order.argsort(dim=1)

    def lives(self) -> Lives:
        """The plan as lives: a patch of rank r takes part in the blocks that more than r patches enter."""
        kept = self.kept()
        life = (self.rank()[:, :, None] < kept[:, None, :]).sum(dim=2).float()
        return Lives(life, kept, self.score, self.grid)

    def grid_index(self, prefix: int) -> Int[Tensor, "batch tokens"]:
        """Where each token is in a run by this plan (of all tokens): ``prefix`` tokens, then patches in grid order."""
        return token_index(self.rank(), prefix)

    def in_grid_order(
        self, tokens: Float[Tensor, "batch tokens dim"], prefix: int
    ) -> Float[Tensor, "batch tokens dim"]:
        """Tokens of a run by this plan (all of them), with the patches back in grid order."""
        return take(tokens, self.grid_index(prefix))


def longest_first(score: Float[Tensor, "batch patches"]) -> tuple[Tensor, Int[Tensor, "batch patches"]]:
    """(cleaned score, patch indices by falling score): NaN counts as the lowest, ties go to the lower patch index."""
    lowest = torch.finfo(torch.float32).min
    score = torch.nan_to_num(score.float(), nan=lowest, posinf=-lowest, neginf=lowest)
    return score, falling(score)


def fixed_plan(
    score: Float[Tensor, "batch patches"],
    embedding: Float[Tensor, "batch patches k"] | None,
    schedule: Schedule,
    grid: tuple[int, int],
) -> Plan:
    """Every image keeps its own highest-scored patches, as many as the schedule says; no ``embedding``: no merging."""
    score, order = longest_first(score)
    targets = None if embedding is None else fixed_merge_targets(embedding, order, schedule)
    return Plan(score, order, schedule, grid, merge_targets=targets)


def adaptive_plan(
    score: Float[Tensor, "batch patches"],
    embedding: Float[Tensor, "batch patches k"] | None,
    schedule: Schedule,
    grid: tuple[int, int],
    thresholds: Float[Tensor, "depth"],
) -> Plan:
    """A patch enters a block while its score is above the threshold of that block, whatever its image's other scores.

    The highest-scored patch of an image is never dropped. No ``embedding``: no merging.
    """
    score, order = longest_first(score)
    counts = (score[:, :, None] > thresholds.to(score)).sum(dim=1).clamp(min=1)
    counts = counts.cummin(dim=1).values
    targets = None if embedding is None else adaptive_merge_targets(embedding, order, counts)
    return Plan(score, order, schedule, grid, counts, targets)
