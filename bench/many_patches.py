"""Measures time and peak memory against the number of patches: dense, no-decision bound, ours, ToMe at equal FLOPs.

    python bench/many_patches.py --out results/many_patches_cpu.json     # prints an estimate of its time first
    python bench/many_patches.py --out results/many_patches_cpu.json --sizes 224 518 --measure time
    python bench/many_patches_plot.py results/many_patches_cpu.json docs/images/many_patches.png

ViT-S/16 from 224 px (196 patches) to 1536 px (9216), at 518 px DINOv2-S/14 (1369), batch 1, random weights. Each
record of a size and a run is written as soon as it is measured; the same command continues after an interruption.

Time: each run in turns with the no-decision bound of its own schedule. The share of the decision in the time of a
slimmed model is measured twice: as one minus the ratio to the bound, and as the sum of its parts, timed one by one.
Memory: peak resident memory of the first call above the built model, in a process of its own (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads slow shared cores down

import torch
from compared_runs import BOUND, OURS, RUNS, backbone_model, build, decision_parts, random_images, time_over_bound
from peak_memory import first_call
from tqdm import tqdm

from patchlife import __version__
from patchlife.backbones import adapt
from patchlife.benchmarks.baselines.base import dense_flops
from patchlife.evaluation.timing import alternate, conditions
from patchlife.io.files import write_atomic

SIZES = (224, 320, 518, 768, 1024, 1280, 1536)  # px
TINY_SIZES = (64, 96)
MOST_MEMORY = {1024: 1.2, 1536: 1.2}  # px: first call of ours over the dense model's
MOST_SHARE = {224: 0.03, 518: 0.03, 1024: 0.03}  # px: parts of the decision over the time of the slimmed model
MOST_SHARE_LEARNED = 0.02
SLOW = 10  # seconds of a dense pass from which nothing is run for warming up
START = 15  # seconds, about, until a new process has built its model

Records = list[dict[str, Any]]


class Job(NamedTuple):
    """One record to measure: ``time`` or ``memory`` of a run at a size."""

    pixels: int
    measure: str
    run: str


def jobs(sizes: list[int], measures: list[str]) -> Iterator[Job]:
    """All records, size by size. The time of the bound is in the record of each other run."""
    for pixels in sizes:
        for measure in measures:
            yield from (Job(pixels, measure, run) for run in RUNS if (measure, run) != ("time", BOUND))


def model_name(pixels: int) -> str:
    """timm's name of the model for images of this size."""
    return "vit_small_patch14_dinov2" if pixels % 16 else "vit_small_patch16_224"


def timed(job: Job, options: argparse.Namespace, slow: bool) -> dict[str, Any]:
    """The record of a run's time, and for ours that of its decision."""
    vit, images = backbone_model(model_name(job.pixels), job.pixels, options.tiny), random_images(1, job.pixels)
    protocol = {"rounds": options.rounds, "patience": options.patience, "warmup": 0 if slow else 1}
    record = time_over_bound(job.run, vit, images, options.budget, **protocol).to_dict()
    if job.run in OURS:
        parts = alternate(decision_parts(build(job.run, vit, images, options.budget), images), **protocol).to_dict()
        whole, ratio = record["seconds"][job.run]["median"], record["ratios"][job.run]
        record["parts"] = parts["seconds"]
        record["share"] = sum(part["median"] for part in parts["seconds"].values()) / whole
        record["beyond_bound"] = {name: 1 - ratio[name] for name in ("median", "p10", "p90")}
    return record


def measured(job: Job, options: argparse.Namespace, slow: bool) -> dict[str, Any]:
    """The record of a job."""
    rows, cols = adapt(backbone_model(model_name(job.pixels), job.pixels, options.tiny)).grid
    record = {**job._asdict(), "model": model_name(job.pixels), "patches": rows * cols, "tiny": options.tiny}
    if job.measure == "time":
        return record | timed(job, options, slow)
    arguments = (model_name(job.pixels), job.pixels, options.budget, options.threads, options.tiny)
    peak = first_call(job.run, *arguments)
    return record | {"bytes": peak, "conditions": {**conditions(), "batch": 1, "budget": options.budget}}


def dense_seconds(sizes: list[int], tiny: bool) -> dict[int, float]:
    """An estimate of one dense pass at each size, from its FLOPs and one pass at the smallest size."""
    models = {pixels: backbone_model(model_name(pixels), pixels, tiny) for pixels in sizes}
    flops = {pixels: dense_flops(adapt(vit), random_images(1, pixels)) for pixels, vit in models.items()}
    least = min(sizes)
    once = alternate({"dense": partial(models[least], random_images(1, least))}, rounds=5).seconds["dense"].median
    return {pixels: once * flops[pixels] / flops[least] for pixels in sizes}


def estimate(todo: list[Job], dense: dict[int, float], options: argparse.Namespace) -> float:
    """About how many seconds the jobs take; the parts of a decision are counted as half of a pass."""
    total = 0.0
    for pixels, measure, run in todo:
        one = dense[pixels] * (1 if run == "dense" else options.budget)
        if measure == "memory":
            total += START + one
            continue
        turn = one + dense[pixels] * options.budget * (1.5 if run in OURS else 1)
        rounds = min(options.rounds, max(5, int(options.patience / turn)))
        total += turn * (rounds + (dense[pixels] < SLOW))
    return total


def key(record: dict[str, Any]) -> Job:
    """The job of a record."""
    return Job(record["pixels"], record["measure"], record["run"])


def continued(path: Path) -> Records:
    """The records that ``path`` holds already; none if there is no such file."""
    return json.loads(path.read_text())["records"] if path.exists() else []


def save(path: Path, records: Records) -> None:
    write_atomic(path, json.dumps({"patchlife": __version__, "bench": "many_patches", "records": records}, indent=1))


# ---- the table


def table(records: Records) -> str:
    """A Markdown table with a row for each size and run, and the targets that are met and missed."""
    found = {key(record): record for record in records}
    lines = [
        "| px | patches | run | ms | over the bound (p10 to p90) | decision: parts, beyond the bound | MB, of dense |"
    ]
    lines += ["| ---: | ---: | --- | ---: | ---: | ---: | ---: |"]
    for pixels, patches in sorted({(r["pixels"], r["patches"]) for r in records}):
        for run in RUNS:
            time = found.get(Job(pixels, "time", "dense" if run == BOUND else run))
            memory, dense = (found.get(Job(pixels, "memory", name)) for name in (run, "dense"))
            if time or memory:
                cells = [str(pixels), str(patches), run, *_time_cells(run, time), _memory_cell(memory, dense)]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *verdicts(records)])


def _time_cells(run: str, record: dict[str, Any] | None) -> list[str]:
    if record is None:
        return ["", "", ""]
    ratio = record["ratios"][run]
    speed = "" if run == BOUND else f"{ratio['median']:.3f} ({ratio['p10']:.3f} to {ratio['p90']:.3f})"
    share = f"{record['share']:.1%}, {record['beyond_bound']['median']:.1%}" if run in OURS else ""
    return [f"{1e3 * record['seconds'][run]['median']:.1f}", speed, share]


def _memory_cell(memory: dict[str, Any] | None, dense: dict[str, Any] | None) -> str:
    if memory is None:
        return ""
    return f"{memory['bytes'] / 1e6:.0f}" + (f", {memory['bytes'] / dense['bytes']:.2f}" if dense else "")


def verdicts(records: Records) -> list[str]:
    """A line for each target that these records can answer."""
    found = {key(record): record for record in records}
    lines = []
    for pixels, measure, run in found:
        record, dense = found[pixels, measure, run], found.get(Job(pixels, "memory", "dense"))
        if run not in OURS:
            continue
        if measure == "memory" and dense and pixels in MOST_MEMORY:
            what, value, most = "peak memory over dense", record["bytes"] / dense["bytes"], MOST_MEMORY[pixels]
        elif measure == "time" and pixels in MOST_SHARE:
            most = MOST_SHARE_LEARNED if "learned" in run else MOST_SHARE[pixels]
            what, value = "parts of the decision over the slimmed model's time", record["share"]
        else:
            continue
        lines.append(
            f"{'met' if value <= most else 'MISSED'}: {pixels} px, {run}, {what} {value:.3f}, target <= {most}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, help=f"in pixels; default {SIZES}")
    parser.add_argument("--measure", nargs="+", default=["time", "memory"], choices=["time", "memory"])
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--patience", type=float, default=60, help="seconds for each size and run; 5 rounds at least")
    parser.add_argument("--tiny", action="store_true", help="few channels and blocks, to try the script")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records = continued(options.out)
    done = {key(record) for record in records}
    sizes = options.sizes or list(TINY_SIZES if options.tiny else SIZES)
    todo = [job for job in jobs(sizes, options.measure) if job not in done]
    if todo:
        dense = dense_seconds(sizes, options.tiny)
        print(f"{len(todo)} records, about {estimate(todo, dense, options) / 60:.0f} minutes")
    for job in tqdm(todo):
        records.append(measured(job, options, dense[job.pixels] >= SLOW))
        save(options.out, records)
    print(table(records))


if __name__ == "__main__":
    main()
