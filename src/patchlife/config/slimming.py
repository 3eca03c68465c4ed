"""How a backbone is slimmed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ConfigError
from .checks import check_budget, check_speedup, check_switch, check_whole, check_wholes

__all__ = ["MODES", "LifeConfig", "Mode"]

Mode = Literal["fixed", "adaptive"]
MODES = ("fixed", "adaptive")


@dataclass(frozen=True)
class LifeConfig:
    """How a backbone is slimmed.

    Attributes:
        budget: Fraction of the dense model's FLOPs that an image may cost, in (0, 1].
        mode: fixed keeps the same number of patches of every image; adaptive lets each image's lives decide.
        start: First block at which a patch may be missing; a quarter of the depth if not given.
        drops: Blocks at which patches go, each at or after start; start and half of the depth if not given.
        survivors: An explicit schedule instead of a budget: how many patches enter each block.
        speedup: A target instead of a budget: 1.6 means a budget of 1 / 1.6.
        heirs: A dying patch leaves its token to the most similar patch that lives on; off means pure slices.
    """

    budget: float = 0.6
    mode: Mode = "fixed"
    start: int | None = None
    drops: tuple[int, ...] | None = None
    survivors: tuple[int, ...] | None = None
    speedup: float | None = None
    heirs: bool = True

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.speedup is not None:
            self._settle("budget", 1 / check_speedup(self.speedup))
            self._settle("speedup", None)
        self._settle("budget", check_budget(self.budget))
        self._settle("heirs", check_switch(self.heirs, "heirs"))
        if self.start is not None:
            self._settle("start", check_whole(self.start, "start"))
        for name in ("drops", "survivors"):
            if getattr(self, name) is not None:
                self._settle(name, check_wholes(getattr(self, name), name))

    def _settle(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def replace(self, **changes: Any) -> LifeConfig:
        """A copy with some settings changed; an explicit schedule does not outlive a new budget."""
        if "budget" in changes or "speedup" in changes:
            changes = {"survivors": None, **changes}
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items() if v is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LifeConfig:
        """The inverse of `to_dict`. Raises ConfigError for settings this version does not know."""
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ConfigError(f"unknown settings {sorted(unknown)}; were they written by a newer patchlife?")
        return cls(**values)
