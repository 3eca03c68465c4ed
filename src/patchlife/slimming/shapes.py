"""Families of shapes: where a schedule drops patches follows from the budget, the depth and the kind of scorer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from ..config import LifeConfig, Shape
from ..errors import ConfigError
from .schedule import resolve_drops

__all__ = ["Layout", "at_depth", "default_shapes", "layout_of", "learned_starts", "shape_of", "twelfths"]

Family = tuple[Shape, ...]
"""Shapes by rising budget; the last one is for budgets up to 1."""

Measured = tuple[tuple[float, tuple[Fraction, ...], float], ...]
"""(largest budget, drop points as fractions of the depth, power), by rising budget."""


def twelfths(*blocks: float) -> tuple[Fraction, ...]:
    """Fractions of the depth: these blocks in a model of 12."""
    return tuple(Fraction(block).limit_denominator(1000) / 12 for block in blocks)


# Measured best on ViT-Tiny, of 12 blocks, by the KL divergence from the dense model (docs/method.md has the table).
_RULE: Measured = (
    (0.375, twelfths(1, 3, 5, 7), 1.0),
    (0.65, twelfths(3, 5, 8), 0.5),
    (0.75, twelfths(3, 6), 1.0),
    (1.0, twelfths(3, 6), 0.5),
)
_ONE_START: Measured = ((0.475, twelfths(3, 5, 8), 0.5), (1.0, twelfths(3, 6), 1.0))
_SEVERAL_STARTS: Measured = (
    (0.385, twelfths(2, 4, 6), 0.5),
    (0.425, twelfths(3, 6), 0.5),
    (1.0, twelfths(3, 6), 1.0),
)


@dataclass(frozen=True)
class Layout:
    """What the settings of a model mean for its schedules.

    Attributes:
        shapes: the family. shape: that of the present budget.
        start: the start block; before the first drop point only if the settings say so.
    """

    shapes: Family
    shape: Shape
    start: int

    @property
    def starts(self) -> tuple[int, ...]:
        """All start blocks, rising."""
        return tuple(sorted({self.start} | ({each.start for each in self.shapes} if len(self.shapes) > 1 else set())))


def layout_of(depth: int, config: LifeConfig, learned: bool = False, fitted: Sequence[int] | None = None) -> Layout:
    """The layout of these settings for a model of ``depth`` blocks.

    Args:
        depth: number of blocks.
        config: the settings. A start block or drop points mean one shape for all budgets.
        learned: the scorer has been, or will be, fitted for a start block.
        fitted: the start blocks that it was fitted for, if it knows them.

    Raises ConfigError for blocks that the model does not have, and for start blocks that the scorer was not fitted for.
    """
    if config.start is not None or config.drops is not None:
        start, drops = resolve_drops(depth, config.start, config.drops)
        layout = Layout((Shape(1.0, drops),), Shape(1.0, drops), start)
    else:
        family = config.shapes or default_shapes(depth, learned, fitted)
        for shape in family:
            resolve_drops(depth, None, shape.drops)
        shape = _of_kept(family, config.kept) if config.kept else shape_of(family, config.budget)
        layout = Layout(family, shape, shape.start)
    if fitted is not None and (missing := sorted(set(layout.starts) - set(fitted))):
        raise ConfigError(
            f"the scorer was fitted for the start blocks {', '.join(map(str, fitted))}, got a schedule that starts at "
            f"{', '.join(map(str, missing))}; choose one of the fitted ones, or fit it again (TrainingConfig.starts)"
        )
    return layout


def shape_of(family: Family, budget: float) -> Shape:
    """The shape of a budget."""
    return next(shape for shape in family if budget <= shape.budget)


def _of_kept(family: Family, kept: tuple[int, ...]) -> Shape:
    """For an explicit schedule: the shape with the latest start block before which no patch is missing."""
    full = next((block for block, count in enumerate(kept) if count < kept[0]), len(kept))
    possible = [shape for shape in family if shape.start <= full]
    earliest = min(family, key=lambda shape: shape.start)
    return max(possible, key=lambda shape: shape.start, default=earliest)


def default_shapes(depth: int, learned: bool = False, fitted: Sequence[int] | None = None) -> Family:
    """The measured shapes, at this depth, for the training-free rule or for a learned scorer.

    A learned scorer that does not know its start blocks has one, at a quarter of the depth. One that knows them has
    each shape at the nearest of them.
    """
    if not learned:
        return at_depth(_RULE, depth)
    if fitted is None:
        return at_depth(_ONE_START, depth)
    family = at_depth(_SEVERAL_STARTS if len(fitted) > 1 else _ONE_START, depth)
    return tuple(_started_at(min(fitted, key=lambda start: (abs(start - s.start), start)), s) for s in family)


def learned_starts(depth: int) -> tuple[int, ...]:
    """The start blocks for which a scorer is fitted by default, rising."""
    return tuple(sorted({shape.start for shape in at_depth(_SEVERAL_STARTS, depth)}))


def _started_at(start: int, shape: Shape) -> Shape:
    return replace(shape, drops=(start, *(block for block in shape.drops[1:] if block > start)))


def at_depth(measured: Measured, depth: int) -> Family:
    """These shapes for a model of ``depth`` blocks: drop points are rounded down, and none is before block 1.

    Drop points that coincide are one.
    """
    return tuple(
        Shape(budget, tuple(sorted({min(depth - 1, max(1, int(depth * part))) for part in parts})), power)
        for budget, parts, power in measured
    )
