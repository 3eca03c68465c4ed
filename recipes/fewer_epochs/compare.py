"""Track 3: how many epochs a method needs. PatchLife, EViT and DynamicViT are trained in one loop, from the same
weights, on the same photos and tokens, at the same FLOPs; accuracy is measured after every epoch. PatchLife is trained
for the smallest number of epochs only.

    python recipes/fewer_epochs/compare.py DATA --checkpoint FILE --out FOLDER

DATA has in20/train and caltech101/train (to train on, without labels) and in20/val and in1k-samples (to evaluate on).
An interrupted run resumes at the first curve that is missing. About half an hour on two idle CPU cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from baselines import DynamicViTStage, EViTStage
from plot import plot
from torch import Tensor

import patchlife
from patchlife.backbones import adapt, signature
from patchlife.benchmarks.baselines import METHODS
from patchlife.config import LifeConfig, ModelConfig, TrainingConfig
from patchlife.data import list_photos
from patchlife.evaluation.timing import conditions
from patchlife.io.files import write_atomic
from patchlife.runtime.opening import open_pipeline
from patchlife.runtime.pipeline import Pipeline
from patchlife.slimming import SlimModel
from patchlife.slimming.regressor import LifeRegressor
from patchlife.training.cached_evaluation import evaluate_cached
from patchlife.training.fit import accelerator_for, student_of
from patchlife.training.loop import train
from patchlife.training.stage import Stage, StageConfig, Step
from patchlife.training.stages import Regression, Slimming
from patchlife.training.target_cache import Photo, TargetCache, collect
from patchlife.training.targets import compute_targets

BATCH, RATE = 50, 1e-4
_LOWEST = TrainingConfig().lowest_budget
OURS = ("ours", "ours-one")
BASELINES = ("evit", "dynamicvit")


class OneBudget(Slimming):
    """Stage 2 at its lowest budget only, as the baselines are trained."""

    def forward(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        return super().forward(step._replace(random_draw=0.0))


class Measured(Stage):
    """A stage that is evaluated before every epoch; ``seconds`` leave the evaluation out."""

    def __init__(self, stage: Stage, every: int, evaluate: Callable[[], dict[str, dict[str, float]]]) -> None:
        super().__init__()
        self.stage, self.every, self.evaluate = stage, every, evaluate
        self.steps, self.started, self.curve = 0, time.monotonic(), []

    def lr_multiplier(self, name: str) -> float:
        return self.stage.lr_multiplier(name.removeprefix("stage."))

    def measure(self) -> None:
        """Add the present accuracy to the curve."""
        seconds = time.monotonic() - self.started
        self.curve.append({"epoch": self.steps / self.every, "seconds": round(seconds, 1), **self.evaluate()})
        print(json.dumps(self.curve[-1]), flush=True)
        self.started = time.monotonic() - seconds

    def forward(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        if self.steps % self.every == 0:
            self.measure()
        self.steps += 1
        return self.stage(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True, help="ViT-Tiny/16-224 on ImageNet-1k")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=1000, help="to train on")
    parser.add_argument("--flops", type=float, default=0.5)
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--epochs", type=lambda s: [int(n) for n in s.split(",")], default=[3, 10])
    args = parser.parse_args()
    (args.out / "work").mkdir(parents=True, exist_ok=True)

    pipeline = open_pipeline(
        ModelConfig("vit_tiny_patch16_224", checkpoint=args.checkpoint, image_size=args.image_size)
    )
    photos = list_photos([args.data / "in20/train", args.data / "caltech101/train"])
    order = torch.randperm(len(photos), generator=torch.Generator().manual_seed(0)).tolist()
    targets = _targets(pipeline, [Photo(photos[i]) for i in order[: args.photos]], args.out / "cache")
    sets = {}
    for name in ("in20/val", "in1k-samples"):
        paths = list_photos([args.data / name])
        labelled = [Photo(p, label) for p, label in zip(paths, pipeline.labels.classes_of(paths), strict=True)]
        sets[name] = _targets(pipeline, labelled, args.out / f"cache-{name.replace('/', '-')}")

    curves = []
    for method, epochs in [
        *((ours, min(args.epochs)) for ours in OURS),
        *((baseline, n) for n in args.epochs for baseline in BASELINES),
    ]:
        path = args.out / f"{method}-{args.flops:g}-{epochs}.json"
        if not path.is_file():
            print(f"{method}, {epochs} epochs", flush=True)
            curve = learn(method, pipeline, targets, sets, args.flops, epochs, args.out / "work")
            write_atomic(path, json.dumps(curve, indent=1) + "\n")
        curves.append(json.loads(path.read_text()))
    settings = {"patchlife": patchlife.__version__, "photos": len(targets), "image_size": args.image_size}
    settings |= {"batch_size": BATCH, "learning_rate": RATE, "dense": {n: _dense(s) for n, s in sets.items()}}
    result = settings | {"conditions": conditions(torch.device("cpu")), "curves": curves}
    write_atomic(args.out / f"fewer_epochs-{args.flops:g}.json", json.dumps(result, indent=1) + "\n")
    plot(result).save(args.out / f"fewer_epochs-{args.flops:g}.png")


def learn(
    method: str,
    pipeline: Pipeline,
    targets: TargetCache,
    sets: dict[str, TargetCache],
    flops: float,
    epochs: int,
    work: Path,
) -> dict[str, Any]:
    """One method's accuracy against epochs."""
    stage_config = StageConfig(f"{method}-{flops:g}-{epochs}", epochs, BATCH, RATE, save_every=float("inf"), seed=1)
    for unfinished in (
        stage_config.name,
        f"{stage_config.name}-scorer",
    ):  # a checkpoint has neither seconds nor the curve
        shutil.rmtree(work / unfinished, ignore_errors=True)
    steps, started = stage_config.steps(len(targets)), time.monotonic()
    if method in OURS:
        stage, logits_of, cost = _ours(method, pipeline, targets, flops, work, f"{stage_config.name}-scorer")
    else:
        stage, logits_of, cost = _baseline(method, pipeline, flops, steps)
    before = time.monotonic() - started  # stage 1, which the baselines do not have
    measured = Measured(stage, steps // epochs, lambda: {n: _score(logits_of, s) for n, s in sets.items()})
    measured.started -= before
    train(measured, targets, stage_config, work, accelerator_for("cpu"))
    measured.measure()
    run = {"method": method, "epochs": epochs, "flops": cost, "before": round(before, 1)}
    return run | {"threads": torch.get_num_threads(), "curve": measured.curve}


Built = tuple[Stage, Callable[[Tensor], Tensor], float]


def _ours(method: str, pipeline: Pipeline, targets: TargetCache, flops: float, work: Path, name: str) -> Built:
    """Stage 1 (eight epochs on cached tokens), then stage 2, at all budgets or at this one only."""
    backbone = adapt(copy.deepcopy(pipeline.model.backbone.model))
    torch.manual_seed(0)
    scorer = LifeRegressor(backbone.dim, backbone.prefix)
    first = StageConfig(name, 8, BATCH, TrainingConfig().learning_rate, save_every=float("inf"))
    train(Regression(scorer), targets, first, work, accelerator_for("cpu"))
    model = SlimModel(backbone, LifeConfig(budget=flops), scorer)
    student = student_of(model, TrainingConfig(finetune="full"))
    embedded = backbone.embed(torch.zeros(1, 3, *backbone.image_size))

    def logits_of(tokens: Tensor) -> Tensor:
        return student.set_budget(flops).resume(tokens, embedded)

    stage = OneBudget(student, flops, 0.0) if method == "ours-one" else Slimming(student, _LOWEST, 0.0)
    return stage, logits_of, patchlife.flops(model).budget


def _baseline(method: str, pipeline: Pipeline, flops: float, steps: int) -> Built:
    backbone = adapt(copy.deepcopy(pipeline.model.backbone.model))
    images = torch.zeros(1, 3, *backbone.image_size)
    baseline = METHODS[method].build(backbone, flops, images).requires_grad_(False)
    stage = EViTStage(baseline, steps) if method == "evit" else DynamicViTStage(baseline)
    trained = [
        *backbone.model.blocks[3:],
        backbone.model.norm,
        *([baseline.predictors] if method == "dynamicvit" else []),
    ]
    for module in trained:
        module.requires_grad_(True)
    return stage, stage.logits, baseline.flops(images) / METHODS["dense"].build(backbone, 1.0, images).flops(images)


def _score(logits_of: Callable[[Tensor], Tensor], photos: TargetCache) -> dict[str, float]:
    """Top-1 in %, and KL from the dense model in nats."""
    score = evaluate_cached(logits_of, photos, torch.device("cpu"))
    return {"top1": round(100 * score.top1, 2), "kl": round(score.kl, 4)}


def _dense(photos: TargetCache) -> float:
    """Top-1 of the dense model, in %."""
    targets, labels = photos.targets(range(len(photos))), photos.labels(range(len(photos)))
    return round(100 * (targets.output.argmax(dim=1) == labels).double().mean().item(), 2)


def _targets(pipeline: Pipeline, photos: list[Photo], folder: Path) -> TargetCache:
    backbone = pipeline.model.backbone
    depends_on = {"backbone": signature(backbone), "preprocess": pipeline.preprocess.to_dict()}
    return collect(
        photos,
        lambda images: compute_targets(backbone, images, pipeline.model.start),
        pipeline.preprocess,
        folder,
        depends_on=depends_on,
    )


if __name__ == "__main__":
    main()
