"""What is exported: images in, logits and, if wanted, lives out."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..slimming import SlimModel
from ..slimming.plan import fixed_plan
from ..slimming.schedule import Schedule
from ..slimming.similarity import Similarity

__all__ = ["Decision", "TensorModule", "tensor_module"]


class TensorModule(nn.Module):
    """A slimmed model as a graph: a tuple out, tensors only."""

    def __init__(self, model: SlimModel, lives: bool) -> None:
        super().__init__()
        self.model, self.lives = model, lives

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> tuple[Tensor, ...]:
        """(logits, life in blocks (batch, patches)), or (logits,)."""
        if not self.lives:
            return (self.model(images),)
        logits, lives = self.model.predict(images)
        return logits, lives.life


class Decision(nn.Module):
    """What follows from scores and embedding alone; exported by itself to see how an engine breaks ties and sorts NaN."""

    def __init__(self, schedule: Schedule, grid: tuple[int, int]) -> None:
        super().__init__()
        self.schedule, self.grid = schedule, grid

    def forward(self, scores: Float[Tensor, "batch patches 1_and_dim"]) -> tuple[Tensor, Tensor, Tensor]:
        """(life in blocks, patches by rank, who inherits from each rank), each (batch, patches).

        ``scores`` holds a patch's score and then its embedding vector.
        """
        plan = fixed_plan(scores[..., 0], Similarity.of(scores[..., 1:]), self.schedule, self.grid)
        assert plan.merge_targets is not None
        return plan.lives().life, plan.order, plan.merge_targets.rank


def tensor_module(model: SlimModel, lives: bool = True) -> TensorModule:
    """A float32 copy of ``model`` on the CPU, in eval mode, pipeline to export; ``model`` stays as it is.

    Raises ConfigError for adaptive mode: an exported graph has static shapes.
    """
    if model.config.mode != "fixed":
        raise ConfigError(
            "an exported graph keeps the same number of patches of every image, so it needs fixed mode, got "
            "adaptive; call model.set_mode('fixed') first"
        )
    twin = copy.deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(False)
    return TensorModule(twin, lives).eval()
