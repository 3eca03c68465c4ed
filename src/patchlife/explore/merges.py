"""Where each patch of an image is merged when it is dropped."""

from __future__ import annotations

from dataclasses import dataclass

from ..slimming.plan import Plan

__all__ = ["Merges"]


@dataclass(frozen=True)
class Merges:
    """The merges of one image; patches are numbered row by row.

    Attributes:
        target: of each patch that is dropped, the patch that it is merged into at that moment.
        weight: how much of it the target takes, in [0, 1].
    """

    target: dict[int, int]
    weight: dict[int, float]

    @classmethod
    def of(cls, plan: Plan) -> Merges:
        """The merges of the first image of ``plan``; none without merging."""
        if plan.merge_targets is None:
            return cls({}, {})
        order, life = plan.order[0].tolist(), plan.lives()
        ranks, weights = plan.merge_targets.rank[0].tolist(), plan.merge_targets.weight[0].tolist()
        dropped = [rank for rank, patch in enumerate(order) if life.life[0, patch] < life.depth]
        return cls(
            {order[rank]: order[ranks[rank]] for rank in dropped},
            {order[rank]: float(weights[rank]) for rank in dropped},
        )

    def path(self, patch: int) -> list[int]:
        """The patch, the one that it is merged into, the one that this is merged into later, and so on."""
        found = [patch]
        while found[-1] in self.target:
            found.append(self.target[found[-1]])
        return found
