"""Schedules: from a budget to integers, how many patches enter each block, before anything runs (`shapes.py`).

Plain Python, no tensors: shapes are known before the forward pass, so that it can be compiled and exported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from ..errors import ConfigError
from .cost import Cost

__all__ = ["Schedule", "floor", "largest", "resolve_drops", "solve"]


@dataclass(frozen=True)
class Schedule:
    """How many patches enter each block: never more than entered the block before, and all of them before ``start``.

    Attributes:
        kept: patches that enter each block.
        start: the first block at which a patch may be missing.
    """

    kept: tuple[int, ...]
    start: int

    def __post_init__(self) -> None:
        counts, start = self.kept, self.start
        if not 0 <= start < len(counts):
            raise ConfigError(f"start must be a block from 0 to {len(counts) - 1}, got {start}")
        if any(b > a for a, b in pairwise(counts)):
            raise ConfigError(f"kept must not increase from block to block, got {counts}")
        if counts[-1] < 1:
            raise ConfigError(f"at least one patch must be kept in every block, got {counts}")
        if start and counts[start - 1] != counts[0]:
            raise ConfigError(f"no patch may be missing before start (block {start}), got {counts}")

    @property
    def drops(self) -> tuple[int, ...]:
        """The drop points: blocks that fewer patches enter than the block before."""
        before = (self.kept[0], *self.kept[:-1])
        return tuple(i for i, (a, b) in enumerate(zip(before, self.kept, strict=True)) if b < a)

    def __str__(self) -> str:
        runs: list[list[int]] = []
        for n in self.kept:
            if runs and runs[-1][0] == n:
                runs[-1][1] += 1
            else:
                runs.append([n, 1])
        return ", ".join(f"{n} x {times}" for n, times in runs)


def resolve_drops(depth: int, start: int | None, drops: tuple[int, ...] | None) -> tuple[int, tuple[int, ...]]:
    """(start block, drop points) where one of them is given: drop points at the start and at half of the depth.

    Without either, the start is at a quarter of the depth.

    Raises ConfigError for blocks that the model does not have.
    """
    if start is None:
        start = drops[0] if drops else max(1, depth // 4)
    if not drops:
        drops = (start, depth // 2) if start < depth // 2 else (start,)
    if not 1 <= start < depth:
        raise ConfigError(f"start must be a block from 1 to {depth - 1} (the model has {depth} blocks), got {start}")
    if list(drops) != sorted(set(drops)) or drops[0] < start or drops[-1] >= depth:
        raise ConfigError(f"drops must increase and be within blocks {start} (start) to {depth - 1}, got {drops}")
    return start, drops


def solve(cost: Cost, budget: float, start: int, drops: tuple[int, ...], power: float = 1.0) -> Schedule:
    """The schedule that costs at most ``budget * cost.dense``, and as little less as whole patches allow.

    After the k-th drop point (k = 0, 1, ...) the fraction ``rate ** (1 + k * power)`` of the patches is kept, rounded
    down, at the largest rate that fits; then single patches are added, at the last drop point first, while they fit.

    Raises ConfigError when the blocks before the first drop point alone cost more than the budget.
    """
    if budget >= 1:
        return Schedule((cost.patches,) * cost.depth, start)
    allowed = budget * cost.dense

    def per_block(stages: list[int]) -> tuple[int, ...]:
        counts = [cost.patches] * cost.depth
        for block, n in zip(drops, stages, strict=True):
            counts[block:] = [n] * (cost.depth - block)
        return tuple(counts)

    def fits(stages: list[int]) -> bool:
        return cost.total(per_block(stages)) <= allowed

    def at_rate(rate: float) -> list[int]:
        return [max(1, int(cost.patches * rate ** (1 + k * power))) for k in range(len(drops))]

    lowest = floor(cost, drops)
    if lowest > budget:
        raise ConfigError(
            f"budget {budget:g} is out of reach: with all patches but one dropped at block {drops[0]} the model "
            f"still costs {lowest:.3f} of its FLOPs; choose a larger budget or an earlier start"
        )
    stages = at_rate(largest(lambda rate: fits(at_rate(rate))))
    for k in reversed(range(len(stages))):  # an added patch costs least in the last blocks
        ceiling = stages[k - 1] if k else cost.patches - 1
        while stages[k] < ceiling and fits([*stages[:k], stages[k] + 1, *stages[k + 1 :]]):
            stages[k] += 1
    return Schedule(per_block(stages), start)


def floor(cost: Cost, drops: tuple[int, ...]) -> float:
    """Fraction of the dense FLOPs that remains when all patches but one are dropped at the first drop point."""
    return cost.total([cost.patches] * drops[0] + [1] * (cost.depth - drops[0])) / cost.dense


def largest(fits: Callable[[float], bool], steps: int = 40) -> float:
    """The largest number in [0, 1] that fits, by bisection; 0 must fit."""
    if fits(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
