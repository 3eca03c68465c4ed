"""Measures the time of the decision: dense, no-decision bound, ours in fixed mode, ours in adaptive mode.

    python bench/overhead.py --out results/overhead_cpu.json        # about 8 minutes on 2 idle cores
    python bench/overhead.py --rounds 5 --models deit_tiny_patch16_224 --batches 1

The no-decision bound is the slices of the schedule without scoring or sorting. All runs are timed in turns; weights are
random, because time does not depend on them. Adaptive runs get scores that give images very different numbers of
patches (a fifth to five thirds of the mean); the mean is the schedule's.
"""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads slow shared cores down

import timm
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from patchlife import LifeConfig, Scorer, SlimModel, __version__, wrap
from patchlife.backbones import Backbone, Embedded
from patchlife.evaluation.timing import Timing, alternate
from patchlife.io.files import write_atomic
from patchlife.slimming.regressor import LifeRegressor
from patchlife.slimming.run.fixed import reorder
from patchlife.slimming.scorers import AttentionScorer, Scores

TARGETS = {  # (run, reference, batch): least ratio of throughputs
    ("slices", "no-decision bound", 16): 0.98,
    ("slices", "no-decision bound", 1): 0.95,
    ("adaptive slices", "uneven slices", 16): 0.93,
}
DECISION_AT_MOST = 0.015  # fraction of the dense time, at batch 16


class Uneven(Scorer):
    """Scores that keep many patches of some images and few of others; computing them takes no time."""

    kind = "uneven"

    def __init__(self, batch: int, patches: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        shift = torch.linspace(-1, 1, batch)[torch.randperm(batch, generator=draw), None]
        self.register_buffer("score", torch.randn(batch, patches, generator=draw) + shift)

    def forward(self, tokens: Tensor, rope: Tensor | None, backbone: Backbone, start: int) -> Scores:
        """The same scores for every batch."""
        patches = tokens[:, backbone.prefix :]
        return Scores(self.score[: len(patches)], normalize(patches, dim=-1))


def no_decision_bound(model: SlimModel, images: Tensor) -> Tensor:
    """Logits from the slices of the model's schedule alone: nothing is scored, sorted or gathered."""
    bb, kept = model.backbone, model.schedule().kept
    x = bb.embed(images).tokens
    for index, n in enumerate(kept):
        if bb.prefix + n < x.shape[1]:
            x = x[:, : bb.prefix + n].contiguous()
        x = bb.block(index, x)
    return bb.classify(bb.norm(x))


def decision(model: SlimModel, tokens: Tensor, embedded: Embedded) -> Tensor:
    """Scoring, sorting and gathering alone, on the input of the start block."""
    plan = model.decide(tokens, embedded)
    first = plan.schedule.kept[model.start]
    return reorder(tokens, None, plan.order[:, :first], model.backbone.prefix)[0]


def measure(name: str, batch: int, budget: float, rounds: int, patience: float) -> Timing:
    """Time all runs on one backbone and one batch."""
    vit = timm.create_model(name).eval()
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    plain, merging = LifeConfig(budget=budget, merge=False), LifeConfig(budget=budget)
    bb = wrap(vit).backbone
    uneven = Uneven(batch, bb.grid[0] * bb.grid[1])
    regressor = LifeRegressor(bb.dim, bb.prefix).eval()
    slices = wrap(vit, plain, AttentionScorer())
    runs = {
        "no-decision bound": partial(no_decision_bound, slices, images),
        "dense": partial(vit, images),
        "slices": partial(slices, images),
        "slices, learned scorer": partial(wrap(vit, plain, regressor), images),
        "merging": partial(wrap(vit, merging), images),
        "merging, learned scorer": partial(wrap(vit, merging, regressor), images),
        "uneven slices": partial(wrap(vit, plain, uneven), images),
        "adaptive slices": partial(adaptive(wrap(vit, plain, uneven), images), images),
        "uneven merging": partial(wrap(vit, merging, uneven), images),
        "adaptive merging": partial(adaptive(wrap(vit, merging, uneven), images), images),
    }
    with torch.inference_mode():
        embedded = bb.embed(images)
        tokens = slices.before_start(embedded)
    runs["decision"] = partial(decision, slices, tokens, embedded)
    runs["decision, learned scorer"] = partial(decision, wrap(vit, plain, regressor), tokens, embedded)
    metadata = {"model": name, "batch": batch, "dtype": "float32", "budget": budget}
    metadata["schedule"] = str(slices.schedule())
    return alternate(runs, rounds=rounds, patience=patience, metadata=metadata)


def adaptive(model: SlimModel, images: Tensor) -> SlimModel:
    """The model in adaptive mode; calibrated on ``images``, so that their mean budget is met exactly."""
    return model.calibrate([images]).set_mode("adaptive")


def verdicts(timing: Timing) -> list[dict]:
    """Each target for this batch size, and the measured value."""
    batch, rows = timing.conditions["batch"], []
    for (run, reference, at), least in TARGETS.items():
        if at == batch:
            ratio = timing.ratios[run].median / timing.ratios[reference].median
            what = f"{run} / {reference}, throughput"
            rows.append({"what": what, "target": f">= {least}", "measured": round(ratio, 3)})
    if batch == 16:
        for run in ("decision", "decision, learned scorer"):
            fraction = timing.ratios["dense"].median / timing.ratios[run].median
            what = f"{run} / dense, time"
            rows.append({"what": what, "target": f"<= {DECISION_AT_MOST}", "measured": round(fraction, 4)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["deit_tiny_patch16_224", "deit_small_patch16_224"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--budget", type=float, default=0.6)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--patience", type=float, default=180, help="seconds for each model and batch")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = []
    for name, batch in tqdm([(m, b) for m in args.models for b in args.batches]):
        timing = measure(name, batch, args.budget, args.rounds, args.patience)
        results.append({**timing.to_dict(), "targets": verdicts(timing)})
        print(f"\n{name}, batch {batch}, {timing.conditions['schedule']}")
        for run, seconds in timing.seconds.items():
            print(f"  {run:26} {1e3 * seconds.median:8.1f} ms   speed over the bound {timing.verdict(run)}")
        for row in results[-1]["targets"]:
            print(f"  {row['what']:48} {row['measured']:<7} target {row['target']}")
    if args.out:
        write_atomic(args.out, json.dumps({"patchlife": __version__, "bench": "overhead", "runs": results}, indent=1))


if __name__ == "__main__":
    main()
