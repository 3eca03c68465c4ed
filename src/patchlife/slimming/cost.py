"""The cost model: FLOPs of a slimmed model for any schedule, from a count of the backbone's parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Cost"]


@dataclass(frozen=True)
class Cost:
    """FLOPs per image of a model's parts, and how the FLOPs of a block grow with its tokens.

    Attributes:
        patches: patches of the full grid. prefix: prefix tokens.
        outer: embedding, final norm, pooling and classifier.
        scorer: the decision; it is spent only where patches may be dropped.
        blocks: for each block (a, c): on n tokens it costs ``a * n + c * n**2``.
        merge: for each pair of a dropped and a kept patch at a drop point, their cosine; 0 without merging, and for
            images in windows (`similarity.windows`), where ``scorer`` includes these cosines.
    """

    patches: int
    prefix: int
    outer: int
    scorer: int
    blocks: tuple[tuple[int, int], ...]
    merge: int = 0

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

    def total(self, kept: Iterable[float], squares: Iterable[float] | None = None, decided: bool = False) -> float:
        """FLOPs of an image when ``kept`` patches enter each block.

        ``decided``: the scorer ran even if no patch was dropped, which happens in adaptive mode.
        """
        counts = list(kept)
        squared = [n**2 for n in counts] if squares is None else list(squares)
        blocks = sum(self.block(i, n, s) for i, (n, s) in enumerate(zip(counts, squared, strict=True)))
        if all(n >= self.patches for n in counts) and not decided:
            return self.outer + blocks
        pairs = sum((before - after) * after for before, after in pairwise([self.patches, *counts]))
        return self.outer + self.scorer + pairs * self.merge + blocks

    @property
    def dense(self) -> float:
        """FLOPs of the dense model."""
        return self.total([self.patches] * self.depth)
