"""Every setting, its default and its meaning, once. No torch here: help texts are made from this file."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ConfigError

__all__ = ["LifeConfig", "Mode"]

Mode = Literal["fixed", "adaptive"]
MODES = ("fixed", "adaptive")


@dataclass(frozen=True)
class LifeConfig:
    """How a backbone is slimmed.

    Attributes:
        budget: Fraction of the dense model's FLOPs that an image may cost, in (0, 1].
        mode: fixed keeps the same number of patches of every image; adaptive lets each image's lives decide.
        start: First block at which a patch may be missing; a quarter of the depth if not given.
        drops: Blocks at which patches go, each at or after start; one drop at start if not given.
        survivors: An explicit schedule instead of a budget: how many patches enter each block.
        speedup: A target instead of a budget: 1.6 means a budget of 1 / 1.6.
    """

    budget: float = 0.6
    mode: Mode = "fixed"
    start: int | None = None
    drops: tuple[int, ...] | None = None
    survivors: tuple[int, ...] | None = None
    speedup: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.speedup is not None:
            if not self.speedup >= 1:
                raise ConfigError(
                    f"speedup must be at least 1, got {self.speedup}; 1.6 means 1.6 times fewer FLOPs"
                )
            object.__setattr__(self, "budget", 1 / self.speedup)
            object.__setattr__(self, "speedup", None)
        check_budget(self.budget)
        for name in ("drops", "survivors"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(int(v) for v in value))

    def replace(self, **changes: Any) -> LifeConfig:
        """A copy with some settings changed; an explicit schedule does not outlive a new budget."""
        if "budget" in changes or "speedup" in changes:
            changes = {"survivors": None, **changes}
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            k: list(v) if isinstance(v, tuple) else v
            for k, v in dataclasses.asdict(self).items()
            if v is not None
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LifeConfig:
        """The inverse of `to_dict`. Raises ConfigError for settings this version does not know."""
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ConfigError(f"unknown settings {sorted(unknown)}; were they written by a newer patchlife?")
        return cls(**values)


def check_budget(budget: float) -> None:
    """Raise ConfigError unless ``budget`` is a fraction in (0, 1]."""
    if not isinstance(budget, int | float) or isinstance(budget, bool) or not math.isfinite(budget):
        raise ConfigError(f"budget must be a number in (0, 1], got {budget!r}")
    if not 0 < budget <= 1:
        guess = f"; did you mean {budget / 100:g}?" if 1 < budget <= 100 else ""
        raise ConfigError(f"budget must be in (0, 1], got {budget:g}{guess}")
