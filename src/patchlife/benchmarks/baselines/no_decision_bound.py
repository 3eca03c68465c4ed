"""The no-decision bound: the slices of our schedule without scoring or sorting.

Any method on the same schedule does this work and more, so no method on it can be faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backbones import Backbone
from ...config import LifeConfig
from ...slimming.cost import Cost
from ...slimming.schedule import Schedule, solve
from ...slimming.shapes import layout_of
from .base import Baseline, Images, Method

__all__ = ["NO_DECISION_BOUND", "NoDecisionBound"]


class NoDecisionBound(Baseline):
    """Keeps the first patches of the grid, whatever they show. Its accuracy is not meaningful."""

    def __init__(self, backbone: Backbone, schedule: Schedule) -> None:
        super().__init__(backbone, f"patches {schedule}")
        self.schedule = schedule

    def forward(self, images: Images) -> Tensor:
        """Logits."""
        bb = self.backbone
        embedded = bb.embed(images)
        x, rope, tails = embedded.tokens, embedded.rope, []
        for index, n in enumerate(self.schedule.kept):
            if bb.prefix + n < x.shape[1]:
                if not bb.reads_class:
                    tails.append(x[:, bb.prefix + n :])
                x = x[:, : bb.prefix + n].contiguous()
                rope = None if rope is None else rope[..., :n, :]
            x = bb.block(index, x, bb.rope_of(rope, index))
        if tails:  # pooling reads the dropped patches too, in their last state
            x = torch.cat((x, *reversed(tails)), dim=1)
        return bb.classify(bb.norm(x))

    def flops(self, images: Images) -> float:
        """FLOPs per image."""
        return _cost(self.backbone, images).total(self.schedule.kept)


def _cost(bb: Backbone, images: Images) -> Cost:
    """The cost model of our schedule, with a decision that costs nothing."""
    rows, cols = bb.grid_of(images)
    outer = sum(bb.outer_flops((images.shape[-2], images.shape[-1])))
    return Cost(rows * cols, bb.prefix, outer, 0, tuple(bb.block_flops(i) for i in range(bb.depth)))


def _build(backbone: Backbone, target: float, images: Images) -> Baseline:
    shape = layout_of(backbone.depth, LifeConfig(budget=target)).shape
    cost = _cost(backbone, images)
    return NoDecisionBound(backbone, solve(cost, target, shape.start, shape.drops, shape.power))


NO_DECISION_BOUND = Method(
    "no-decision-bound",
    "no-decision bound",
    "control",
    "nothing to train",
    _build,
    trained=False,
    exports=True,
)
