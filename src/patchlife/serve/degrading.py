"""Which budget answers: the asked one, or under load a lower one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Ladder"]


@dataclass(frozen=True)
class Ladder:
    """Budgets by load.

    The first budget answers while at most one batch per replica is in work. From there to half of a full queue, the
    budgets follow in equal steps. The last one answers in the second half, and only a full queue refuses.

    Attributes:
        budgets: the largest first; one budget means that the budget does not depend on the load.
        in_work: photos that the replicas compute at once: batch size x replicas.
        queue: photos that may wait.
    """

    budgets: Sequence[float]
    in_work: int
    queue: int

    def step(self, pending: int) -> int:
        """The index of the budget for ``pending`` photos that are accepted and not yet answered."""
        waiting = max(0, pending - self.in_work)
        last = len(self.budgets) - 1
        return min(last, 2 * last * waiting // self.queue)

    def budget(self, pending: int, asked: float | None = None) -> float:
        """The budget that answers: that of the load, or ``asked`` if it is lower, or without load."""
        step = self.step(pending)
        if asked is None:
            return self.budgets[step]
        return min(asked, self.budgets[step]) if step else asked
