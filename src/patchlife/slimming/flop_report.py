"""FLOPs of a slimmed model and of its backbone, as a report."""

from __future__ import annotations

from dataclasses import dataclass

from .model import SlimModel

__all__ = ["Flops", "flops"]


@dataclass(frozen=True)
class Flops:
    """FLOPs per image; two operations make one multiply-add.

    Attributes:
        dense: of the backbone. slimmed: of the slimmed model; in adaptive mode the mean.
        decision: the part of ``slimmed`` for scoring and merging.
        outer: the part of both for embedding, final norm, pooling and classifier.
        dense_blocks / slimmed_blocks: of each block.
    """

    dense: int
    slimmed: int
    decision: int
    outer: int
    dense_blocks: tuple[int, ...]
    slimmed_blocks: tuple[int, ...]

    @property
    def budget(self) -> float:
        """Fraction of the dense FLOPs."""
        return self.slimmed / self.dense


def flops(model: SlimModel, image_size: tuple[int, int] | None = None) -> Flops:
    """FLOPs per image, dense and slimmed, for images of this size (height, width)."""
    cost, counts = model.cost(image_size), model.schedule(image_size).kept
    squares: list[float] = [n**2 for n in counts]
    if model.settings.mode == "adaptive" and (calibration := model.calibration_for(cost.patches)):
        squares = calibration.squares(counts, cost.patches)
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
