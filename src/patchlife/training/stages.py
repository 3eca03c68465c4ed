"""The two things that learn: the head that foretells lives, then the blocks that run on fewer patches."""

from __future__ import annotations

import torch
from torch import Tensor

from ..slimming import SlimModel
from ..slimming.plan import fixed_plan
from ..slimming.regressor import LifeRegressor
from ..slimming.run.gated import run_gated
from .losses import distillation_loss, importance_loss, similarity_loss
from .stage import Stage, Step

_ANCHOR = 1.0  # weight of stage 1's loss in stage 2
_SCORER_LR_MULTIPLIER = 0.1  # of stage 2's learning rate; a head that learns as fast as the blocks forgets what it knew

__all__ = ["Regression", "Slimming"]


class Regression(Stage):
    """Stage 1: the head regresses what the teacher's later blocks do with each patch. Nothing is dropped."""

    def __init__(self, head: LifeRegressor) -> None:
        super().__init__()
        self.scorer = head

    def forward(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        """Loss of the importance and of the similarities, in equal parts."""
        importance, embedding = self.scorer.regress(step.targets.tokens)
        importance = importance_loss(importance, step.targets.importance)
        similarity = similarity_loss(embedding, step.targets.embedding)
        return importance + similarity, {"importance": importance.item(), "similarity": similarity.item()}


class Slimming(Stage):
    """Stage 2: the student runs on the kept only and learns to answer as the dense teacher does; so does the head.

    The blocks before the start block are the teacher's own, so a step begins at the cached tokens: it costs the
    slimmed blocks, forwards and backwards, and nothing else. The budget is drawn anew at every step, so that one set
    of weights serves them all. The head hears of its mistakes through `run_gated`, and is held to what it
    regressed in stage 1, so that it stays good for classes that are not among these photos.

    Attributes:
        model: the student, in fixed mode; its backbone is a copy of the teacher's.
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
        """Distillation loss at the budget that the step draws, and a share of stage 1's loss."""
        budget = self.lowest_budget + (1 - self.lowest_budget) * step.chance
        with self.model.temporarily(budget=round(budget, 3)):
            logits = self._answer(step.targets.tokens)
        loss, divergence = distillation_loss(logits, step.targets.logits, step.labels, self.label_weight)
        regression, _ = self._regression(step)
        return loss + _ANCHOR * regression, {"budget": budget, "divergence": divergence.item()}

    def lr_multiplier(self, name: str) -> float:
        """The head has learned already; it goes on gently."""
        return _SCORER_LR_MULTIPLIER if ".scorer." in f".{name}" else 1.0

    def _answer(self, tokens: Tensor) -> Tensor:
        """Logits of the student from tokens that enter the start block."""
        model, backbone, embedded = self.model, self.model.backbone, self._embedded
        schedule = model.schedule(embedded.image_size)
        if not schedule.drops:
            return model.resume(tokens, embedded)
        with torch.autocast(tokens.device.type, enabled=False):  # who dies is decided as at inference
            scores = model.scorer(tokens.float(), embedded.rope, backbone, model.start)
            similarity = scores.similarities() if model.config.merge else None
            plan = fixed_plan(scores.score, similarity, schedule, embedded.grid)
        out = run_gated(backbone, tokens, embedded.rope, plan, scores.embedding, keep_dropped=not backbone.reads_class)
        return model.classify(out, plan)
