"""From a budget to integers: how many patches enter each block, settled before anything runs.

Plain Python on purpose: shapes must be known before the forward pass so that it can be compiled and exported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from ..errors import ConfigError

__all__ = ["Cost", "Schedule", "floor", "largest", "resolve_drops", "solve"]


@dataclass(frozen=True)
class Cost:
    """FLOPs per image of a backbone's parts, and how a block's FLOPs grow with its tokens.

    Attributes:
        patches: patches of the full grid. prefix: tokens that never die.
        outer: embedding, final norm, pooling and classifier.
        head: the life decision (paid only when some patch may die).
        heir: what each pair of a dying patch and a patch that lives on costs, where heirs are.
        blocks: for each block (a, c): on n tokens it costs ``a * n + c * n**2``.
    """

    patches: int
    prefix: int
    outer: int
    head: int
    blocks: tuple[tuple[int, int], ...]
    heir: int = 0

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def block(self, index: int, patches: float, patches_squared: float | None = None) -> float:
        """FLOPs of one block that ``patches`` patches enter.

        For a mean over images give the mean of the squares too: attention is quadratic in each image's own count.
        """
        squared = patches**2 if patches_squared is None else patches_squared
        a, c = self.blocks[index]
        return a * (self.prefix + patches) + c * (self.prefix**2 + 2 * self.prefix * patches + squared)

    def total(self, survivors: Iterable[float], squares: Iterable[float] | None = None, decided: bool = False) -> float:
        """FLOPs of an image whose blocks are entered by ``survivors`` patches.

        ``decided``: the decision was taken even if none died, as on a crowded image in adaptive mode.
        """
        counts = list(survivors)
        squared = [n**2 for n in counts] if squares is None else list(squares)
        blocks = sum(self.block(i, n, s) for i, (n, s) in enumerate(zip(counts, squared, strict=True)))
        if all(n >= self.patches for n in counts) and not decided:
            return self.outer + blocks
        heirs = sum((before - after) * after for before, after in pairwise([self.patches, *counts]))
        return self.outer + self.head + heirs * self.heir + blocks

    @property
    def dense(self) -> float:
        """FLOPs of the untouched backbone."""
        return self.total([self.patches] * self.depth)


@dataclass(frozen=True)
class Schedule:
    """How many patches enter each block; never growing, all of them before ``start``."""

    survivors: tuple[int, ...]
    start: int

    def __post_init__(self) -> None:
        counts, start = self.survivors, self.start
        if not 0 <= start < len(counts):
            raise ConfigError(f"start must be a block from 0 to {len(counts) - 1}, got {start}")
        if any(b > a for a, b in pairwise(counts)):
            raise ConfigError(f"survivors must never grow from block to block, got {counts}")
        if counts[-1] < 1:
            raise ConfigError(f"at least one patch must survive to the last block, got {counts}")
        if start and counts[start - 1] != counts[0]:
            raise ConfigError(f"no patch may be missing before start (block {start}), got {counts}")

    @property
    def drops(self) -> tuple[int, ...]:
        """Blocks that fewer patches enter than the full grid or the block before."""
        before = (self.survivors[0], *self.survivors[:-1])
        return tuple(i for i, (a, b) in enumerate(zip(before, self.survivors, strict=True)) if b < a)

    def __str__(self) -> str:
        runs: list[list[int]] = []
        for n in self.survivors:
            if runs and runs[-1][0] == n:
                runs[-1][1] += 1
            else:
                runs.append([n, 1])
        return ", ".join(f"{n} x {times}" for n, times in runs)


def resolve_drops(depth: int, start: int | None, drops: tuple[int, ...] | None) -> tuple[int, tuple[int, ...]]:
    """(start block, drop points) with defaults filled in.

    The default, a drop at a quarter of the depth and one at half of it, measured best with heirs
    (docs/method.md has the table).
    """
    if start is None:
        start = drops[0] if drops else max(1, depth // 4)
    if not drops:
        drops = (start, depth // 2) if start < depth // 2 else (start,)
    if not 1 <= start < depth:
        raise ConfigError(f"start must be a block from 1 to {depth - 1} (the model has {depth} blocks), got {start}")
    if list(drops) != sorted(set(drops)) or drops[0] < start or drops[-1] >= depth:
        raise ConfigError(f"drops must rise and lie in blocks {start} (start) to {depth - 1}, got {drops}")
    return start, drops


def solve(cost: Cost, budget: float, start: int, drops: tuple[int, ...]) -> Schedule:
    """The schedule that spends as much of ``budget`` as whole patches allow.

    At each drop the same fraction of the patches is kept. Every drop takes a share, then single patches are
    given back where they still fit. The result costs at most ``budget * cost.dense``.

    Raises ConfigError when the blocks before ``start`` alone cost more than the budget.
    """
    if budget >= 1:
        return Schedule((cost.patches,) * cost.depth, start)
    limit = budget * cost.dense

    def spread(stages: list[int]) -> tuple[int, ...]:
        counts = [cost.patches] * cost.depth
        for block, n in zip(drops, stages, strict=True):
            counts[block:] = [n] * (cost.depth - block)
        return tuple(counts)

    def fits(stages: list[int]) -> bool:
        return cost.total(spread(stages)) <= limit

    def at_rate(rate: float) -> list[int]:
        return [max(1, int(cost.patches * rate**k)) for k in range(1, len(drops) + 1)]

    lowest = floor(cost, drops)
    if lowest > budget:
        raise ConfigError(
            f"budget {budget:g} is out of reach: with all patches but one dropped at block {drops[0]} the model "
            f"still costs {lowest:.3f} of its FLOPs; choose a larger budget or an earlier start"
        )
    stages = at_rate(largest(lambda rate: fits(at_rate(rate))))
    for k in reversed(range(len(stages))):  # late blocks are the ones that want survivors
        ceiling = stages[k - 1] if k else cost.patches - 1
        while stages[k] < ceiling and fits([*stages[:k], stages[k] + 1, *stages[k + 1 :]]):
            stages[k] += 1
    return Schedule(spread(stages), start)


def floor(cost: Cost, drops: tuple[int, ...]) -> float:
    """Fraction of the dense FLOPs that remains when all patches but one go at the first drop."""
    return cost.total([cost.patches] * drops[0] + [1] * (cost.depth - drops[0])) / cost.dense


def largest(fits: Callable[[float], bool], steps: int = 40) -> float:
    """The largest number in [0, 1] that fits, by bisection; 0 is known to fit."""
    if fits(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
