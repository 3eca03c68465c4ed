"""Which budget answers: the asked one, or under load a lower one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Ladder"]


@dataclass(frozen=True)
class Ladder:
    """Budgets by load.

    The first budget answers while at most one batch per replica is in work. From there the others follow in equal
    steps to half of the photos that may wait. The last one answers in the second half, before a photo is refused.

    Attributes:
        budgets: the largest first; one budget means that the budget does not depend on the load.
        in_work: photos that the replicas compute at once: batch size x replicas.
    """

    budgets: Sequence[float]
    in_work: int

    def step(self, pending: int, limit: int) -> int:
        """The index of the budget, for ``pending`` photos that are accepted and not yet answered.

        ``limit``: the most of them, 2 or more.
        """
        in_work, last = min(self.in_work, (limit - 1) // 2), len(self.budgets) - 1
        return min(last, 2 * last * max(0, pending - in_work) // (limit - in_work))

    def budget(self, pending: int, limit: int, asked: float | None = None) -> float:
        """The budget that answers: that of the load, or ``asked`` if it is lower, or without load."""
        step = self.step(pending, limit)
        if asked is None:
            return self.budgets[step]
        return min(asked, self.budgets[step]) if step else asked
