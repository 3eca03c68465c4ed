"""What a slimmed model spends, in FLOPs, beside what its backbone would."""

from __future__ import annotations

from dataclasses import dataclass

from .model import SlimModel

__all__ = ["Flops", "flops"]


@dataclass(frozen=True)
class Flops:
    """FLOPs per image; two operations make one multiply-add.

    Attributes:
        dense: the untouched backbone. slimmed: the mean in adaptive mode.
        decision: the part of ``slimmed`` that the dense model does not have: head, and finding and merging heirs.
        outer: embedding, final norm, pooling and classifier (part of both).
        dense_blocks / slimmed_blocks: block by block.
    """

    dense: int
    slimmed: int
    decision: int
    outer: int
    dense_blocks: tuple[int, ...]
    slimmed_blocks: tuple[int, ...]

    @property
    def budget(self) -> float:
        """Fraction of the dense FLOPs that are spent."""
        return self.slimmed / self.dense


def flops(model: SlimModel, image_size: tuple[int, int] | None = None) -> Flops:
    """FLOPs per image, dense and slimmed, for images of this size (height, width)."""
    cost, counts = model.cost(image_size), model.schedule(image_size).survivors
    squares: list[float] = [n**2 for n in counts]
    if model.config.mode == "adaptive" and model.calibration is not None:
        squares = model.calibration.squares(counts, cost.patches)
    blocks = tuple(round(cost.block(i, n, s)) for i, (n, s) in enumerate(zip(counts, squares, strict=True)))
    slimmed = round(cost.total(counts, squares))
    return Flops(
        dense=round(cost.dense),
        slimmed=slimmed,
        decision=slimmed - cost.outer - sum(blocks),
        outer=cost.outer,
        dense_blocks=tuple(round(cost.block(i, cost.patches)) for i in range(cost.depth)),
        slimmed_blocks=blocks,
    )
