"""Each method of track 3 as a stage to train, with a function that evaluates it and its fraction of the dense FLOPs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from baselines import DynamicViTStage, EViTStage, TNTStage, ToMeStage
from torch import Tensor, nn

import patchlife
from patchlife.backbones import Backbone, adapt
from patchlife.benchmarks.baselines import METHODS
from patchlife.benchmarks.baselines.base import dense_flops
from patchlife.config import LifeConfig, TrainingConfig
from patchlife.slimming import SlimModel
from patchlife.slimming.regressor import LifeRegressors
from patchlife.slimming.shapes import learned_starts
from patchlife.training.fit import accelerator_for, student_of
from patchlife.training.initial_model import LOWEST_BUDGET
from patchlife.training.loop import train
from patchlife.training.stage import Stage, StageConfig, Step
from patchlife.training.stages import Regression, Slimming
from patchlife.training.target_cache import TargetCache
from patchlife.training.targets import at_start

FIRST_TRAINED = 3  # block; the blocks before it are those of the dense model
OURS = ("ours-delta", "ours", "ours-one")
RATES = {"ours-delta": TrainingConfig(finetune="adapter").stage2_learning_rate}
"""Peak learning rates of methods that do not train whole weights."""
BASELINES = ("evit", "dynamicvit", "tnt", "tome")
_LEARNED_LAYERS = ("predictors", "relevance")  # of baselines, trained as well as the blocks
_SCORER_EPOCHS = 8


def starts_of(method: str, backbone: Backbone) -> tuple[int, ...]:
    """The blocks at whose inputs training starts: ToMe merges in every block, PatchLife's start follows the budget."""
    if method in OURS:
        return learned_starts(backbone.depth)
    return (0,) if method == "tome" else (FIRST_TRAINED,)


class Trainable(NamedTuple):
    """A method: the stage, logits from cached tokens at its FLOPs, and these as a fraction of the dense model's."""

    stage: Stage
    logits_of: Callable[[Tensor], Tensor]
    flops: float


class OneBudget(Slimming):
    """Stage 2 at its lowest budget only, as the baselines are trained."""

    def forward(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        return super().forward(step._replace(random_draw=0.0))


def ours(dense: Backbone, method: str, targets: TargetCache, flops: float, work: Path, run: StageConfig) -> Trainable:
    """PatchLife after stage 1 (eight epochs on cached tokens), for stage 2: with the weight delta of ``fit --finetune
    adapter`` at all budgets, or with all weights at all budgets or at this one only. Start block and drop points follow
    the budget, by the defaults."""
    backbone = adapt(copy.deepcopy(dense.model))
    starts = starts_of(method, backbone)
    torch.manual_seed(run.seed)
    scorer = LifeRegressors(backbone.dim, backbone.prefix, starts).to(backbone.device)
    name, rate = f"{run.name}-scorer", TrainingConfig().learning_rate
    first = StageConfig(name, _SCORER_EPOCHS, run.batch_size, rate, save_every=float("inf"), seed=run.seed)
    train(Regression(scorer), targets, first, work, accelerator_for(backbone.device.type))
    model = SlimModel(backbone, LifeConfig(budget=flops), scorer)
    student = student_of(model, TrainingConfig(finetune="adapter" if method == "ours-delta" else "full"))
    embedded = backbone.embed(backbone.blank())

    def logits_of(tokens: Tensor) -> Tensor:
        student.set_budget(flops)
        return student.resume(at_start(tokens, student.start, starts), embedded)

    stage = OneBudget(student, flops, 0.0) if method == "ours-one" else Slimming(student, LOWEST_BUDGET, 0.0)
    return Trainable(stage, logits_of, patchlife.flops(model).budget)


def baseline(dense: Backbone, method: str, flops: float, steps: int) -> Trainable:
    """A baseline whose blocks from the first trained one on, final norm and own layers are trained."""
    backbone = adapt(copy.deepcopy(dense.model))
    images = backbone.blank()
    model = METHODS[method].build(backbone, flops, images).requires_grad_(False)
    layers = [getattr(model, name) for name in _LEARNED_LAYERS if hasattr(model, name)]
    trained: list[nn.Module] = [*backbone.blocks[FIRST_TRAINED:], backbone.final_norm, *layers]
    for module in trained:
        module.requires_grad_(True)
    stages = {"evit": lambda m: EViTStage(m, steps), "dynamicvit": DynamicViTStage, "tnt": TNTStage, "tome": ToMeStage}
    stage = stages[method](model)
    return Trainable(stage, stage.logits, model.flops(images) / dense_flops(backbone, images))
