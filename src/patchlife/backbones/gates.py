"""Gates: how a weight delta follows the budget. At budget 1.0 all are closed and the weights are the backbone's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from ..errors import AdapterError

__all__ = ["GatedWeights", "Ramp", "Ramps", "channel_gates", "gate_values", "ramps_down_to", "ramps_of"]


class Ramp(NamedTuple):
    """How one gate of a weight delta opens as the fraction of the dense FLOPs that is removed rises.

    Attributes:
        low: up to this fraction it is 0. high: from this one on it is 1. power: of the linear rise in between.
    """

    low: float
    high: float
    power: float


Ramps = tuple[Ramp, ...]


def ramps_down_to(lowest: float) -> Ramps:
    """The ramps of a new gated delta that is trained at budgets from ``lowest`` on: there all gates are fully open.

    One gate begins to open at budget 1.0, the other one at three sevenths of the removed FLOPs (recipes/NOTES.md, q).
    """
    removed = round(1.0 - lowest, 6)
    return Ramp(0.0, removed, 1.5), Ramp(round(removed * 3 / 7, 6), removed, 1.5)


def gate_values(budget: float, ramps: Ramps) -> tuple[float, ...]:
    """How far each gate of a weight delta is open at ``budget``, in [0, 1]. All are 0 at budget 1.0.

    A gate opens while the removed fraction of the FLOPs, ``1 - budget``, rises along its ramp.
    """
    return tuple(min(1.0, max(0.0, (1.0 - budget - ramp.low) / (ramp.high - ramp.low))) ** ramp.power for ramp in ramps)


def ramps_of(stored: Sequence[Sequence[float]] | None) -> Ramps | None:
    """Ramps from JSON. Raises AdapterError for what is none."""
    try:
        ramps = tuple(Ramp(*map(float, ramp)) for ramp in stored or ())
    except (TypeError, ValueError):
        ramps = (Ramp(0.0, 0.0, 0.0),)
    if any(not (0 <= ramp.low < ramp.high <= 1 and 0 < ramp.power < math.inf) for ramp in ramps):
        raise AdapterError(
            f"gates must be ramps [low, high, power] with 0 <= low < high <= 1 and a power above 0, got {stored}"
        )
    return ramps or None


def channel_gates(values: Sequence[float], rank: int) -> list[float]:
    """The gate of each of ``rank`` channels: channel j belongs to gate ``j * len(values) // rank``."""
    return [values[channel * len(values) // rank] for channel in range(rank)]


class GatedWeights(Protocol):
    """A weight delta that depends on the budget, through the values of its gates (see `gate_values`).

    Attributes:
        ramps: of its gates.
        values: the present values of its gates.
    """

    ramps: Ramps
    values: tuple[float, ...]

    def merge(self, model: nn.Module, values: tuple[float, ...]) -> None:
        """Make the weights of ``model`` those at these gates. Raises ConfigError if they cannot be changed."""

    def unmerged(self, model: nn.Module) -> AbstractContextManager[object]:
        """A context in which the weights are those without the delta, for conversions of the whole model."""

    def check_separable(self, model: nn.Module) -> None:
        """Raise ConfigError where the weights of ``model`` without the delta are not known."""

    def bases(self) -> dict[int, Tensor]:
        """The values without the delta of all parameters that it is merged into, by the parameter's id."""
