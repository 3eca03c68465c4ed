"""Settings of slimming: budget, mode, schedule, merging, what the place of a dropped patch holds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import ConfigError
from .checks import check_budget, check_speedup, check_switch, check_whole, check_wholes
from .shapes import Shape, check_shapes

__all__ = ["MODES", "RESTORES", "LifeConfig", "Mode", "Restore"]

Mode = Literal["fixed", "adaptive"]
MODES = ("fixed", "adaptive")

Restore = Literal["last", "target", "residual"]
RESTORES = ("last", "target", "residual")


@dataclass(frozen=True)
class LifeConfig:
    """How a backbone is slimmed.

    Attributes:
        budget: FLOPs per image as a fraction of the dense model's FLOPs, in (0, 1]. In adaptive mode it is the mean
            over images.
        mode: fixed: every image keeps the same number of patches. adaptive: each image keeps its own number of patches.
        start: Start block: the first block (counted from 0) that patches can be missing from. Default: the first drop
            point, if drop points are given, else as the budget and the scorer ask (docs/method.md has the table).
        drops: Drop points: the blocks before which patches are dropped. At each of them the same fraction of the
            patches is kept. Default: start and half of the depth, if a start is given, else as for start.
        shapes: Shapes of the schedules by rising budget, the last one for budgets up to 1; a start or drop points that
            are given take precedence. Default: those that were measured best for the kind of scorer.
        kept: Explicit schedule instead of a budget: the number of patches that enter each block, one number for every
            block of the model. The numbers must not increase.
        speedup: Alternative to the budget: a speedup of 1.6 means a budget of 1 / 1.6 = 0.625.
        merge: Merge each dropped patch into the most similar kept patch. If off, later blocks get no information from
            dropped patches.
        restore: What the place of a dropped patch holds in dense features, and in models that pool patches. last: the
            state with which the patch was dropped. target: the state of the patch that it was merged into. residual:
            its last state, plus what later blocks changed in the patch that it was merged into. Without merging it is
            always the last state.
    """

    budget: float = 0.6
    mode: Mode = "fixed"
    start: int | None = None
    drops: tuple[int, ...] | None = None
    kept: tuple[int, ...] | None = None
    speedup: float | None = None
    merge: bool = True
    restore: Restore = "residual"
    shapes: tuple[Shape, ...] | None = field(default=None, metadata={"option": False})

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.speedup is not None:
            self._set("budget", 1 / check_speedup(self.speedup))
            self._set("speedup", None)
        self._set("budget", check_budget(self.budget))
        self._set("merge", check_switch(self.merge, "merge"))
        if self.restore not in RESTORES:
            raise ConfigError(f"restore must be one of {', '.join(RESTORES)}, got {self.restore!r}")
        if self.start is not None:
            self._set("start", check_whole(self.start, "start"))
        for name in ("drops", "kept"):
            if getattr(self, name) is not None:
                self._set(name, check_wholes(getattr(self, name), name))
        if self.shapes is not None:
            self._set("shapes", check_shapes(self.shapes))

    @property
    def restore_by(self) -> Restore:
        """`restore`; without merging ``last``, because no patch has a target."""
        return self.restore if self.merge else "last"

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def replace(self, **changes: Any) -> LifeConfig:
        """A copy with some settings changed; a new budget replaces an explicit schedule."""
        if "budget" in changes or "speedup" in changes:
            changes = {"kept": None, **changes}
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}
        return plain | ({"shapes": [shape.to_dict() for shape in self.shapes]} if self.shapes else {})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LifeConfig:
        """The inverse of `to_dict`. Raises ConfigError for unknown settings."""
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ConfigError(f"unknown settings {sorted(unknown)}; were they written by another version of patchlife?")
        return cls(**values)
