"""Track 3: how many epochs a method needs. PatchLife, EViT, DynamicViT, TNT and ToMe are trained in one loop, from the
same weights, on the same photos and tokens, at the same FLOPs; accuracy is measured at the ends and after some epochs
(``MEASURED_AFTER``). PatchLife is trained for the smallest number of epochs only.

    python recipes/fewer_epochs/compare.py DATA --checkpoint FILE --out FOLDER

DATA has in20/train and caltech101/train (to train on, without labels) and in20/val and in1k-samples (to evaluate on).
An interrupted run resumes at the first curve that is missing. On two CPU cores add --image-size 160 --photos 1000.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from photo_sets import PhotoSets, dense_top1, photo_sets
from plot import plot
from seed_table import comparisons, table
from torch import Tensor
from trained_methods import BASELINES, OURS, RATES, Trainable, baseline, ours, starts_of

import patchlife
from patchlife.backbones import Backbone
from patchlife.config import ModelConfig
from patchlife.evaluation.timing import conditions
from patchlife.io.files import write_atomic
from patchlife.runtime.opening import open_pipeline
from patchlife.training.cached_evaluation import evaluate_cached
from patchlife.training.fit import accelerator_for
from patchlife.training.loop import train
from patchlife.training.stage import Stage, StageConfig, Step
from patchlife.training.target_cache import TargetCache

BATCH, RATE = 50, 1e-4
MEASURED_AFTER = (0, 1, 3, 6)
"""Epochs; measuring on 2000 photos takes as long as training on 670."""
NAME = "vit_tiny_patch16_224"


class Measured(Stage):
    """A stage that is evaluated after the epochs ``MEASURED_AFTER``; ``seconds`` leave the evaluation out."""

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
        if self.steps in {self.every * epochs for epochs in MEASURED_AFTER}:
            self.measure()
        self.steps += 1
        return self.stage(step)


def main() -> None:
    args = _options()
    work: Path = args.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    config = ModelConfig(NAME, checkpoint=args.checkpoint, image_size=args.image_size)
    pipeline = open_pipeline(config, device=args.device)
    backbone = pipeline.model.backbone

    @cache
    def sets_at(starts: tuple[int, ...]) -> PhotoSets:
        return photo_sets(pipeline, args.data, args.photos, args.out, starts)

    curves = []
    for method, epochs, seed in _runs(args):
        path = args.out / f"{method}-{args.flops:g}-{epochs}-{seed}.json"
        if not path.is_file():
            print(f"{method}, {epochs} epochs, seed {seed}", flush=True)
            sets = sets_at(starts_of(method, backbone))
            curve = learn(method, backbone, sets, args.flops, epochs, seed, work)
            write_atomic(path, json.dumps(curve, indent=1) + "\n")
        curves.append(json.loads(path.read_text()))
    sets = sets_at(starts_of(args.methods[0], backbone))  # labels and dense outputs are the same in each
    result = {
        "patchlife": patchlife.__version__,
        "photos": len(sets.train),
        "image_size": args.image_size,
        "batch_size": BATCH,
        "learning_rate": RATE,
        "dense": {name: dense_top1(photos) for name, photos in sets.evaluated.items()},
        "conditions": conditions(backbone.device),
        "curves": curves,
    }
    _write(result, args.out / f"fewer_epochs-{args.flops:g}")


def _options() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True, help="ViT-Tiny/16-224 on ImageNet-1k")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=8904, help="to train on")
    parser.add_argument("--flops", type=float, default=0.5)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--epochs", type=numbers, default=[3, 10])
    parser.add_argument("--seeds", type=numbers, default=[1, 2, 3])
    parser.add_argument("--methods", type=lambda s: s.split(","), default=[*OURS, *BASELINES])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is one")
    args = parser.parse_args()
    if unknown := set(args.methods) - {*OURS, *BASELINES}:
        parser.error(f"--methods must be of {', '.join((*OURS, *BASELINES))}, got {', '.join(sorted(unknown))}")
    return args


def _runs(args: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """(method, epochs, seed) of all runs; the first seed of every method comes first."""
    for seed in args.seeds:
        for method in args.methods:
            for epochs in [min(args.epochs)] if method in OURS else args.epochs:
                yield method, epochs, seed


def learn(
    method: str, dense: Backbone, sets: PhotoSets, flops: float, epochs: int, seed: int, work: Path
) -> dict[str, Any]:
    """One method's accuracy against epochs."""
    name, rate = f"{method}-{flops:g}-{epochs}-{seed}", RATES.get(method, RATE)
    run = StageConfig(name, epochs, BATCH, rate, save_every=float("inf"), seed=seed)
    for unfinished in (run.name, f"{run.name}-scorer"):  # a checkpoint has neither seconds nor the curve
        shutil.rmtree(work / unfinished, ignore_errors=True)
    steps, started = run.steps(len(sets.train)), time.monotonic()
    trainable = _trainable(method, dense, sets.train, flops, steps, work, run)
    before = time.monotonic() - started  # stage 1, which the baselines do not have
    measured = Measured(trainable.stage, steps // epochs, lambda: _scores(trainable, sets, dense.device))
    measured.started -= before
    train(measured, sets.train, run, work, accelerator_for(dense.device.type))
    measured.measure()
    numbers = {"method": method, "epochs": epochs, "seed": seed, "flops": trainable.flops, "before": round(before, 1)}
    return numbers | {"threads": torch.get_num_threads(), "curve": measured.curve}


def _trainable(
    method: str, dense: Backbone, targets: TargetCache, flops: float, steps: int, work: Path, run: StageConfig
) -> Trainable:
    if method in OURS:
        return ours(dense, method, targets, flops, work, run)
    return baseline(dense, method, flops, steps)


def _scores(trainable: Trainable, sets: PhotoSets, device: torch.device) -> dict[str, dict[str, float]]:
    """Top-1 in % and KL from the dense model in nats, in float32, by set of photos."""
    scores = {}
    with torch.autocast(device.type, enabled=False):
        for name, photos in sets.evaluated.items():
            score = evaluate_cached(trainable.logits_of, photos, device)
            scores[name] = {"top1": round(100 * score.top1, 2), "kl": round(score.kl, 4)}
    return scores


def _write(result: dict[str, Any], path: Path) -> None:
    """Result, table and plot; they are printed as well."""
    summary = table(result) + "\n" + "\n".join(comparisons(result)) + "\n"
    write_atomic(path.with_name(f"{path.name}.json"), json.dumps(result, indent=1) + "\n")
    write_atomic(path.with_name(f"{path.name}.md"), summary)
    plot(result).save(path.with_name(f"{path.name}.png"))
    print(summary)


if __name__ == "__main__":
    main()
