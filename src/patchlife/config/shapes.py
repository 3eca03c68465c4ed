"""Shapes of schedules: where patches are dropped, and how the numbers kept at the drop points relate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..errors import ConfigError
from .checks import check_budget, check_wholes, plain

__all__ = ["Shape", "check_shapes"]


@dataclass(frozen=True)
class Shape:
    """The shape of the schedules of some budgets.

    After the k-th drop point (k = 0, 1, ...) the fraction ``rate ** (1 + k * power)`` of the patches is kept; the rate
    follows from the budget.

    Attributes:
        budget: the largest budget that has this shape.
        drops: the blocks before which patches are dropped. The first one is the start block.
        power: 1: the same fraction of the present patches is kept at each drop point. Smaller: the first drop is the
            largest one. Larger: later ones are.
    """

    budget: float
    drops: tuple[int, ...]
    power: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", check_budget(self.budget, "the budget of a shape"))
        object.__setattr__(self, "drops", check_wholes(self.drops, "the drops of a shape"))
        if not self.drops or self.drops[0] < 1 or any(b <= a for a, b in pairwise(self.drops)):
            raise ConfigError(f"the drops of a shape must be rising blocks from 1 on, got {self.drops}")
        power = plain(self.power)
        if isinstance(power, bool) or not isinstance(power, int | float) or not 0 < power < math.inf:
            raise ConfigError(f"the power of a shape must be a number above 0, got {power!r}")
        object.__setattr__(self, "power", float(power))

    @property
    def start(self) -> int:
        """The start block: the decision is taken on the tokens that enter it."""
        return self.drops[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"budget": self.budget, "drops": list(self.drops), "power": self.power}

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.drops))}, power {self.power:g}"


def check_shapes(shapes: Iterable[Shape | Mapping[str, Any]]) -> tuple[Shape, ...]:
    """A family: shapes by rising budget, the last one for budgets up to 1. Raises ConfigError for anything else."""
    names = {field.name for field in dataclasses.fields(Shape)}
    family = []
    for shape in shapes:
        if not isinstance(shape, Shape) and not (isinstance(shape, Mapping) and {"budget", "drops"} <= set(shape)):
            raise ConfigError(f"shapes must be of class Shape, got {shape!r}")
        if isinstance(shape, Mapping) and (unknown := set(shape) - names):
            raise ConfigError(f"unknown values {sorted(unknown)} of a shape; a newer patchlife wrote them")
        family.append(shape if isinstance(shape, Shape) else Shape(**shape))
    budgets = [shape.budget for shape in family]
    if not budgets or budgets[-1] != 1 or any(b <= a for a, b in pairwise(budgets)):
        raise ConfigError(f"the budgets of shapes must rise, and the last one must be 1, got {budgets}")
    return tuple(family)
