"""What the settings of a slimmed model mean for its schedules: start block, drop points and shapes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from ..config import LifeConfig, Shape
from .shapes import Layout

__all__ = ["HasLayout"]


class HasLayout:
    """Start block, drop points and shapes: they follow from settings, budget and scorer (`SlimSettings`)."""

    settings: LifeConfig
    _layout: Layout

    def _apply_config(self, config: LifeConfig) -> None:
        raise NotImplementedError

    @property
    def start(self) -> int:
        """The start block at the present budget."""
        return self._layout.start

    @property
    def drops(self) -> tuple[int, ...]:
        """The drop points at the present budget."""
        return self._layout.shape.drops

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of the schedules by rising budget."""
        return self._layout.shapes

    @property
    def starts(self) -> tuple[int, ...]:
        """The start blocks of all budgets, rising."""
        return self._layout.starts

    @property
    def shape(self) -> Shape:
        """The shape of the schedule at the present budget."""
        return self._layout.shape

    def use_shapes(self, shapes: Iterable[Shape] | None) -> Self:
        """Use these shapes, instead of a start block and drop points too; None: the default ones. See `LifeConfig`."""
        family = None if shapes is None else tuple(shapes)
        self._apply_config(self.settings.replace(shapes=family, start=None, drops=None))
        return self

    def full_settings(self) -> LifeConfig:
        """The settings with start block and drop points, or shapes: they keep their meaning if defaults change."""
        if self.settings.start is not None or self.settings.drops is not None:
            return self.settings.replace(start=self.start, drops=self.drops, shapes=None)
        return self.settings.replace(shapes=self.shapes)
