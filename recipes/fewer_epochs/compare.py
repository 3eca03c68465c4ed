"""Track 3: how many epochs a method needs. Ours, EViT and DynamicViT, in one loop, from the same weights, on the same
photos and tokens, at the same FLOPs; accuracy after every epoch. Ours gets the shortest stage_config only.

    python recipes/fewer_epochs/compare.py DATA --checkpoint FILE --out FOLDER

DATA holds in20/ and caltech101/ (to learn from, without labels) and in20/val, in1k-samples (to report). A run that was
interrupted goes on at the first curve that is missing. About half an hour on two idle CPU cores.
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
from plot import plot
from rivals import DynamicViTStage, EViTStage
from torch import Tensor

import patchlife
from patchlife.backbones import adapt, signature
from patchlife.benchmarks.baselines import METHODS
from patchlife.config import LifeConfig, ModelConfig, TrainingConfig
from patchlife.data import list_photos
from patchlife.evaluation.timing import conditions
from patchlife.io.files import write_atomic
from patchlife.runtime.pipeline import Pipeline
from patchlife.runtime.opening import open_pipeline
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
    """Stage 2 at its lowest budget only, as the rivals train."""

    def forward(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        return super().forward(step._replace(chance=0.0))


class Watched(Stage):
    """A stage that is examined before every epoch; ``seconds`` leave the examination out."""

    def __init__(self, stage: Stage, every: int, examine: Callable[[], dict[str, dict[str, float]]]) -> None:
        super().__init__()
        self.stage, self.every, self.examine = stage, every, examine
        self.steps, self.began, self.curve = 0, time.monotonic(), []

    def lr_multiplier(self, name: str) -> float:
        return self.stage.lr_multiplier(name.removeprefix("stage."))

    def look(self) -> None:
        """Note the accuracy at this moment."""
        seconds = time.monotonic() - self.began
        self.curve.append({"epoch": self.steps / self.every, "seconds": round(seconds, 1), **self.examine()})
        print(json.dumps(self.curve[-1]), flush=True)
        self.began = time.monotonic() - seconds

    def forward(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        if self.steps % self.every == 0:
            self.look()
        self.steps += 1
        return self.stage(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True, help="ViT-Tiny/16-224 on ImageNet-1k")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=1000, help="to learn from")
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
        *((rival, n) for n in args.epochs for rival in BASELINES),
    ]:
        path = args.out / f"{method}-{args.flops:g}-{epochs}.json"
        if not path.is_file():
            print(f"{method}, {epochs} epochs", flush=True)
            curve = learn(method, pipeline, targets, sets, args.flops, epochs, args.out / "work")
            write_atomic(path, json.dumps(curve, indent=1) + "\n")
        curves.append(json.loads(path.read_text()))
    depends_on = {"patchlife": patchlife.__version__, "photos": len(targets), "image_size": args.image_size}
    depends_on |= {"batch_size": BATCH, "learning_rate": RATE, "dense": {n: _dense(s) for n, s in sets.items()}}
    result = depends_on | {"conditions": conditions(torch.device("cpu")), "curves": curves}
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
    for unfinished in (stage_config.name, f"{stage_config.name}-head"):  # a checkpoint keeps neither seconds nor looks
        shutil.rmtree(work / unfinished, ignore_errors=True)
    steps, began = stage_config.steps(len(targets)), time.monotonic()
    if method in OURS:
        stage, answer, cost = _ours(method, pipeline, targets, flops, work, f"{stage_config.name}-head")
    else:
        stage, answer, cost = _baseline(method, pipeline, flops, steps)
    before = time.monotonic() - began  # stage 1, which the others do not have
    validated = Watched(stage, steps // epochs, lambda: {n: _score(answer, s) for n, s in sets.items()})
    validated.began -= before
    train(validated, targets, stage_config, work, accelerator_for("cpu"))
    validated.look()
    ran = {"method": method, "epochs": epochs, "flops": cost, "before": round(before, 1)}
    return ran | {"threads": torch.get_num_threads(), "curve": validated.curve}


Built = tuple[Stage, Callable[[Tensor], Tensor], float]


def _ours(method: str, pipeline: Pipeline, targets: TargetCache, flops: float, work: Path, name: str) -> Built:
    """Stage 1 (eight cheap epochs on the cached tokens), then stage 2: every budget at once, or only this one."""
    backbone = adapt(copy.deepcopy(pipeline.model.backbone.vit))
    torch.manual_seed(0)
    head = LifeRegressor(backbone.dim, backbone.prefix)
    first = StageConfig(name, 8, BATCH, TrainingConfig().learning_rate, save_every=float("inf"))
    train(Regression(head), targets, first, work, accelerator_for("cpu"))
    model = SlimModel(backbone, LifeConfig(budget=flops), head)
    student = student_of(model, TrainingConfig(finetune="full"))
    embedded = backbone.embed(torch.zeros(1, 3, *backbone.image_size))

    def answer(tokens: Tensor) -> Tensor:
        return student.set_budget(flops).resume(tokens, embedded)

    stage = OneBudget(student, flops, 0.0) if method == "ours-one" else Slimming(student, _LOWEST, 0.0)
    return stage, answer, patchlife.flops(model).budget


def _baseline(method: str, pipeline: Pipeline, flops: float, steps: int) -> Built:
    backbone = adapt(copy.deepcopy(pipeline.model.backbone.vit))
    images = torch.zeros(1, 3, *backbone.image_size)
    baseline = METHODS[method].build(backbone, flops, images).requires_grad_(False)
    stage = EViTStage(baseline, steps) if method == "evit" else DynamicViTStage(baseline)
    free = [*backbone.vit.blocks[3:], backbone.vit.norm, *([baseline.predictors] if method == "dynamicvit" else [])]
    for module in free:
        module.requires_grad_(True)
    return stage, stage.answer, baseline.flops(images) / METHODS["dense"].build(backbone, 1.0, images).flops(images)


def _score(answer: Callable[[Tensor], Tensor], photos: TargetCache) -> dict[str, float]:
    """Top-1 in %, and KL from the dense model in nats."""
    score = evaluate_cached(answer, photos, torch.device("cpu"))
    return {"top1": round(100 * score.top1, 2), "kl": round(score.kl, 4)}


def _dense(photos: TargetCache) -> float:
    """Top-1 of the dense model, in %."""
    targets, labels = photos.targets(range(len(photos))), photos.labels(range(len(photos)))
    return round(100 * (targets.logits.argmax(dim=1) == labels).double().mean().item(), 2)


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
