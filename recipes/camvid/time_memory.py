"""Time and memory of the dense and the slimmed model with the head, for batches of 1 and 4, on an idle machine.

    python recipes/camvid/time_memory.py --dense runs/camvid/dense.safetensors --out runs/camvid/time.json

Time is of photos in memory to answers on the head's grid, runs in turns. `time saved over FLOPs saved` is
(1 - slimmed seconds / dense seconds) / (1 - slimmed FLOPs / dense FLOPs), head included. Memory is the peak of what a
run allocates.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads slow shared cores down

import camvid
import dense_model
import methods
import torch
from evaluate import BUDGETS, METHODS

from patchlife.evaluation.memory import peak_bytes
from patchlife.evaluation.timing import Timing, alternate
from patchlife.io.files import write_atomic
from patchlife.malloc import keep_freed_memory


def measure(models: dict[str, methods.Method], head: dense_model.Head, batch: int, rounds: int) -> dict[str, Any]:
    """Timing and memory of all models for one batch size; the first one is the dense model."""
    photos = torch.randint(0, 256, (batch, 3, *camvid.INPUT), dtype=torch.uint8)
    runs = {name: (lambda model=model: head(model.maps(photos))) for name, model in models.items()}
    timing = alternate(runs, rounds=rounds, metadata={"batch": batch, "dtype": "float32"})
    with torch.inference_mode():
        peak = {name: peak_bytes(run) for name, run in runs.items()}
    dense = next(iter(models.values()))
    saved = {name: _time_over_flops(timing, name, model, dense) for name, model in models.items() if model is not dense}
    return {"batch": batch, "timing": timing.to_dict(), "peak_bytes": peak, "time_saved_over_flops_saved": saved}


def _time_over_flops(timing: Timing, name: str, model: methods.Method, dense: methods.Method) -> float:
    return (1 - 1 / timing.ratios[name].median) / (1 - model.flops / dense.flops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, default=Path("runs/camvid/dense.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("runs/camvid/time.json"))
    parser.add_argument("--methods", default="untrained,tome,smaller-input")
    parser.add_argument("--adapters", type=Path, nargs="*", default=[], help="folders; each is timed by its name")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    backbone, head = dense_model.load(options.dense)
    models = {"dense": methods.dense(backbone, head)}
    builders = METHODS | {folder.name: methods.fitted(folder) for folder in options.adapters}
    for name in [*filter(None, options.methods.split(",")), *(folder.name for folder in options.adapters)]:
        for budget in map(float, options.budgets.split(",")):
            models[f"{name} {budget:g}"] = builders[name](backbone, head, budget)
    results = [measure(models, head, int(batch), options.rounds) for batch in options.batches.split(",")]
    flops = {name: model.flops / models["dense"].flops for name, model in models.items()}
    write_atomic(options.out, json.dumps({"flops": flops, "batches": results}, indent=1) + "\n")
    for result in results:
        for name, share in result["time_saved_over_flops_saved"].items():
            ratio = result["timing"]["ratios"][name]
            spread = f"{ratio['median']:.2f}x ({ratio['p10']:.2f} to {ratio['p90']:.2f})"
            memory = result["peak_bytes"][name] / result["peak_bytes"]["dense"]
            print(f"batch {result['batch']} {name:20} {spread}, time over FLOPs saved {share:.3f}, memory {memory:.2f}")


if __name__ == "__main__":
    main()
