"""Measures the time of the decision on transformers' own layers: no-decision bound, dense, slimmed.

    python bench/transformers_overhead.py --out results/transformers_overhead_cpu.json   # a few minutes on 2 idle cores

The shape is ViT-S with random weights, because time does not depend on them. All runs are timed in turns. "slimmed" is
a call of the wrapped model, which gives transformers' output object; "output" gives the logits alone.
"""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads slow shared cores down

import torch
from overhead import no_decision_bound
from transformers import ViTConfig, ViTForImageClassification

from patchlife import LifeConfig, __version__, wrap
from patchlife.evaluation.timing import Timing, alternate
from patchlife.io.files import write_atomic

TARGETS = {16: 0.97, 1: 0.95}  # batch: least ratio of the slimmed model's throughput and the bound's


def measure(batch: int, budget: float, rounds: int, patience: float) -> Timing:
    """Time all runs on one batch."""
    config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000)
    vit = ViTForImageClassification(config).eval()
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    slices = wrap(vit, LifeConfig(budget=budget, merge=False))
    merging = wrap(vit, LifeConfig(budget=budget))
    runs = {
        "no-decision bound": partial(no_decision_bound, slices, images),
        "dense": partial(vit, images),
        "slimmed": partial(slices, images),
        "slimmed, output": partial(slices.output, images),
        "slimmed, merging": partial(merging, images),
    }
    metadata = {"model": "transformers ViT-S/16", "batch": batch, "dtype": "float32", "budget": budget}
    metadata["schedule"] = str(slices.schedule())
    return alternate(runs, rounds=rounds, patience=patience, metadata=metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--budget", type=float, default=0.6)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--patience", type=float, default=180, help="seconds for each batch size")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = []
    for batch in args.batches:
        timing = measure(batch, args.budget, args.rounds, args.patience)
        ratio = timing.ratios["slimmed"].median / timing.ratios["no-decision bound"].median
        target = {"what": "slimmed / no-decision bound, throughput", "measured": round(ratio, 3)}
        results.append({**timing.to_dict(), "targets": [{**target, "target": f">= {TARGETS.get(batch, 0.95)}"}]})
        print(f"\nbatch {batch}, {timing.conditions['schedule']}")
        for run, seconds in timing.seconds.items():
            print(f"  {run:26} {1e3 * seconds.median:8.1f} ms   speed over the bound {timing.verdict(run)}")
        print(f"  {target['what']:48} {ratio:<7.3f} target >= {TARGETS.get(batch, 0.95)}")
    if args.out:
        text = json.dumps({"patchlife": __version__, "bench": "transformers_overhead", "runs": results}, indent=1)
        write_atomic(args.out, text)


if __name__ == "__main__":
    main()
