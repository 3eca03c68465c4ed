"""Time of a training step of stage 2, compared with a training step of the dense model.

    python bench/training_step.py --out results/training_step_cpu.json          # two minutes on 2 cores, idle

All variants are timed in alternation. Dense: forward, cross-entropy and backward of the whole model, without the
optimizer. Stage 2: forward from cached tokens, loss and backward, at several budgets; with a frozen scorer, which
shows the cost of the gates; and on fresh views, for which the dense model runs too.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve shared cores

import timm
import torch
from torch import Tensor, nn

from patchlife import LifeConfig, __version__, wrap
from patchlife.backbones import Backbone
from patchlife.config import TrainingConfig
from patchlife.evaluation.timing import alternate
from patchlife.io.files import write_atomic
from patchlife.slimming.regressor import LifeRegressor
from patchlife.training.fit import student_of
from patchlife.training.initial_model import LOWEST_BUDGET
from patchlife.training.photo_cache import stored_size
from patchlife.training.stage import Stage, Step
from patchlife.training.stages import Slimming
from patchlife.training.targets import compute_targets
from patchlife.training.views import random_views

BUDGETS = (1.0, 0.8, 0.6, 0.45, 0.35)


@torch.inference_mode(False)  # `alternate` times in inference mode
@torch.enable_grad()
def dense_step(vit: nn.Module, images: Tensor, labels: Tensor) -> None:
    """One step of ordinary training."""
    nn.functional.cross_entropy(vit(images), labels).backward()
    vit.zero_grad()


@torch.inference_mode(False)
@torch.enable_grad()
def stage2_step(stage: Stage, step: Step) -> None:
    """One step of stage 2."""
    stage(step)[0].backward()
    stage.zero_grad()


@torch.inference_mode(False)
@torch.enable_grad()
def fresh_step(stage: Slimming, step: Step, backbone: Backbone, pixels: Tensor) -> None:
    """One step of stage 2 on fresh views: the views, the dense model on them, and the step."""
    images = random_views(pixels, torch.ones(len(pixels)), backbone.image_size, torch.Generator())
    targets = compute_targets(backbone, images, stage.model.start)
    stage2_step(stage, step._replace(targets=targets))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    vit = timm.create_model(args.model).eval()
    base = wrap(vit, LifeConfig())
    model = wrap(vit, LifeConfig(), LifeRegressor(base.backbone.dim, base.backbone.prefix))
    images = torch.randn(args.batch_size, 3, *model.backbone.image_size)
    labels = torch.zeros(args.batch_size, dtype=torch.long)
    targets = compute_targets(model.backbone, images, model.start)
    runs: dict[str, Callable[[], None]] = {"dense": partial(dense_step, vit.requires_grad_(True), images, labels)}
    for how in ("adapter", "full"):
        for budget in BUDGETS:
            runs[f"{how}, budget {budget:g}"] = partial(stage2_step, *_stage2(model, how, targets, labels, budget))
    pixels = torch.zeros(args.batch_size, 3, *stored_size(model.backbone.image_size), dtype=torch.uint8)
    for budget in BUDGETS:
        run = partial(fresh_step, *_stage2(model, "adapter", targets, labels, budget), model.backbone, pixels)
        runs[f"adapter, fresh views, budget {budget:g}"] = run
    frozen, step = _stage2(model, "full", targets, labels, 0.6)
    frozen.model.scorer.requires_grad_(False)
    runs["full, budget 0.6, scorer frozen"] = partial(stage2_step, frozen, step)
    timing = alternate(runs, args.rounds, warmup=1, metadata={"model": args.model, "batch": args.batch_size})
    write_atomic(args.out, json.dumps({"patchlife": __version__, **timing.to_dict()}, indent=1) + "\n")
    for name in runs:
        print(f"{name:36} {1000 * timing.seconds[name].median:7.0f} ms  {1 / timing.ratios[name].median:.2f} of dense")


def _stage2(model, how, targets, labels, budget) -> tuple[Slimming, Step]:
    """(stage 2, a step at this budget)."""
    stage = Slimming(student_of(model, TrainingConfig(finetune=how)), LOWEST_BUDGET, 0.0)
    return stage, Step(targets, labels, (budget - LOWEST_BUDGET) / (1 - LOWEST_BUDGET))


if __name__ == "__main__":
    main()
