"""A slimmed model as a module that can be exported: images in, a tuple of tensors out."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..slimming import SlimModel
from ..slimming.plan import fixed_plan
from ..slimming.schedule import Schedule

__all__ = ["DecisionModule", "TensorModule", "tensor_module"]


class TensorModule(nn.Module):
    """A slimmed model that returns a tuple of tensors: logits (or the embedding) and, if ``lives`` is set, lives."""

    def __init__(self, model: SlimModel, lives: bool) -> None:
        super().__init__()
        self.model, self.lives = model, lives

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> tuple[Tensor, ...]:
        """(output, life in blocks (batch, patches)), or (output,)."""
        if not self.lives:
            return (self.model.output(images),)
        output, lives = self.model.predict(images)
        return output, lives.life

    @property
    def embeds(self) -> bool:
        """Whether the output is an embedding, because the model has no classifier."""
        return self.model.backbone.output_name == "embedding"


class DecisionModule(nn.Module):
    """The decision, computed from scores and similarity embeddings.

    It is exported separately to check how an engine orders tied scores and NaN.
    """

    def __init__(self, schedule: Schedule, grid: tuple[int, int]) -> None:
        super().__init__()
        self.schedule, self.grid = schedule, grid

    def forward(self, scores: Float[Tensor, "batch patches 1_and_dim"]) -> tuple[Tensor, Tensor, Tensor]:
        """(life in blocks, patches by rank, rank of the merge target of each rank), each (batch, patches).

        ``scores`` holds for each patch its score, followed by its similarity embedding.
        """
        plan = fixed_plan(scores[..., 0], scores[..., 1:], self.schedule, self.grid)
        assert plan.merge_targets is not None
        return plan.lives().life, plan.order, plan.merge_targets.rank


def tensor_module(model: SlimModel, lives: bool = True) -> TensorModule:
    """A float32 copy of ``model`` on the CPU in eval mode, ready to export; ``model`` is not changed.

    Raises ConfigError for adaptive mode, because an exported graph has static shapes.
    """
    if model.settings.mode != "fixed":
        raise ConfigError(
            "an exported graph keeps the same number of patches for every image, so it needs fixed mode, got "
            "adaptive; call model.set_mode('fixed') first"
        )
    frozen = copy.deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(False)
    return TensorModule(frozen, lives).eval()
