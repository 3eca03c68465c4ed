"""The two training stages: regression trains the scorer, slimming trains the blocks that run on fewer patches."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..slimming import SlimModel
from ..slimming.regressor import LifeRegressor
from ..slimming.run.gated import run_gated
from .losses import distillation_loss, importance_loss, similarity_loss
from .stage import Stage, Step

_REGRESSION_WEIGHT = 1.0  # of stage 1's loss in stage 2
_SCORER_LR_MULTIPLIER = 0.1  # in stage 2; at the full learning rate the scorer loses what it learned in stage 1

__all__ = ["Regression", "Slimming"]


class Regression(Stage):
    """Stage 1: the scorer regresses importance and similarities of the patches in the dense model; none is dropped."""

    def __init__(self, scorer: LifeRegressor) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        """Sum of the losses of importance and similarity."""
        logits, embedding = self.scorer.regress(step.targets.tokens)
        importance = importance_loss(logits, step.targets.importance)
        similarity = similarity_loss(embedding, step.targets.embedding)
        return importance + similarity, {"importance": importance.item(), "similarity": similarity.item()}


class Slimming(Stage):
    """Stage 2: a student that drops patches is distilled from the dense model; its scorer is trained too.

    The student shares the blocks before the start block with the dense model, so a step begins at cached tokens and
    costs the slimmed blocks only, forward and backward. Each step has a random budget, so that one set of weights
    serves all budgets. The scorer gets gradients through `run_gated`. The loss of stage 1 is added, so that the scorer
    stays good for classes that are not among the photos.

    Attributes:
        model: the student, in fixed mode; its backbone is a copy of the dense model's.
    """

    def __init__(self, model: SlimModel, lowest_budget: float, label_weight: float) -> None:
        super().__init__()
        self.model = model
        self.lowest_budget, self.label_weight = lowest_budget, label_weight
        assert isinstance(model.scorer, LifeRegressor)
        self._regression = Regression(model.scorer)
        with torch.no_grad():
            self._embedded = model.backbone.embed(model.backbone.blank())

    def forward(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        """Distillation loss at the step's random budget, plus the loss of stage 1."""
        budget = self.lowest_budget + (1 - self.lowest_budget) * step.random_draw
        with self.model.temporarily(budget=round(budget, 3)):
            logits = self._logits(step.targets.tokens)
        loss, divergence = distillation_loss(logits, step.targets.logits, step.labels, self.label_weight)
        regression, _ = self._regression(step)
        return loss + _REGRESSION_WEIGHT * regression, {"budget": budget, "divergence": divergence.item()}

    def lr_multiplier(self, name: str) -> float:
        """Smaller for the scorer, which stage 1 has trained already."""
        return _SCORER_LR_MULTIPLIER if ".scorer." in f".{name}" else 1.0

    def _logits(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch classes"]:
        """Logits from ``tokens``, the input of the start block; gates are used although the student is in eval mode.

        `SlimModel.resume` uses them in training mode only, which would also turn dropout and drop path on.
        """
        model, embedded = self.model, self._embedded
        if not model.schedule(embedded.image_size).drops:
            return model.resume(tokens, embedded)
        scores = model.score(tokens, embedded)
        plan = model.make_plan(scores, embedded)
        keep_dropped = not model.backbone.reads_class
        return model.classify(
            run_gated(model.backbone, tokens, embedded.rope, plan, scores.embedding, keep_dropped), plan
        )
