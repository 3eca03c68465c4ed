"""Is ours ahead of the other methods? ViT-Tiny at four budgets, with nothing trained on either side.

    python recipes/vit_tiny/other_methods.py SHARED [--every 4]

SHARED has weights/vit_tiny_patch16_224.safetensors and data/. The rates of DiffRate and the threshold of PPT are
searched on unlabelled photos of `in20/train` and Caltech-101, as many as `patchlife tune` takes for our schedules. All
methods are then evaluated on every N-th photo of `in20/val` and `in1k-samples`. It writes a JSON file to results/, and
prints the table and every cell in which ours is not ahead. Finished parts in --work are not repeated.

Ours is ahead in a cell if it loses at least 1.0 point less than the best of the others, or has at most 75 % of their
lowest KL divergence.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from patchlife.backbones import Backbone
from patchlife.benchmarks.baselines import METHODS, Baseline, Method, learned
from patchlife.benchmarks.baselines.diffrate import searched_method
from patchlife.benchmarks.baselines.diffrate_search import refined_rates, searched_diffrate
from patchlife.benchmarks.baselines.ppt import tuned as tuned_ppt
from patchlife.benchmarks.comparison import evaluate_methods
from patchlife.cli.main import main as patchlife
from patchlife.config import ModelConfig
from patchlife.data import list_photos, load_batches
from patchlife.evaluation.timing import conditions
from patchlife.io.files import write_atomic
from patchlife.runtime.opening import open_pipeline
from patchlife.runtime.pipeline import Pipeline

ROOT = Path(__file__).parents[2]
NAME, SETS, BUDGETS = "vit_tiny_patch16_224", ("in1k-samples", "in20/val"), (0.61, 0.5, 0.45, 0.35)
OFF_THE_SHELF = ("evit", "tome", "ppt", "mame")
SEARCHED_ON, REFINED_ON = 256, 64  # photos
RATES = Path(__file__).with_name("diffrate_rates.json")
"""The rates that were found; without this file they are searched again (10 to 20 minutes each on a busy core)."""
Row = dict[str, Any]


# ---- what is searched


def search_photos(pipeline: Pipeline, shared: Path) -> Tensor:
    """The photos for the searches of the other methods, (256, 3, 224, 224)."""
    paths = list_photos([shared / "data" / part / "train" for part in ("in20", "caltech101")])
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).tolist()
    loaded = load_batches([paths[i] for i in order[:SEARCHED_ON]], pipeline.preprocess, 32)
    return torch.cat([batch.images for batch in loaded])


def searched_rates(backbone: Backbone, images: Callable[[], Tensor], path: Path) -> Method:
    """DiffRate with rates of its own search for each budget. Those in the file ``path`` are not searched again."""
    found = json.loads(path.read_text()) if path.exists() else {}
    for budget in BUDGETS:
        if f"{budget:g}" not in found:
            print(f"searching the rates of DiffRate at {budget:g}", flush=True)
            by_gradient = searched_diffrate(backbone, images(), budget, epochs=8, batch_size=8)
            rates = refined_rates(backbone, images()[:REFINED_ON], budget, [by_gradient])
            found[f"{budget:g}"] = rates.to_dict()
            write_atomic(path, json.dumps(found, indent=1) + "\n")
    return searched_method(path)


def ppt_with_threshold(images: Callable[[], Tensor]) -> Method:
    """PPT with the threshold that has the lowest KL of a few."""

    def build(backbone: Backbone, target: float, _: Tensor) -> Baseline:
        return tuned_ppt(backbone, target, images()[:64])

    return Method("ppt-tuned", "PPT, threshold searched", METHODS["ppt"].source, "its threshold, on 64 photos", build)


def tuned_ours(shared: Path, work: Path, weights: Path) -> Method:
    """Ours with scorers that are solved and schedules that are searched by `patchlife tune`."""
    if not (folder := work / "tuned").is_dir():
        photos = [shared / "data" / part / "train" for part in ("in20", "caltech101")]
        if code := patchlife(["tune", NAME, *map(str, photos), "--checkpoint", str(weights), "--out", str(folder)]):
            raise SystemExit(code)
    return learned(folder, "fixed")


# ---- measure


def measured(shared: Path, work: Path, every: int) -> dict[str, Any]:
    """Accuracy of all methods on all sets, as in the JSON file."""
    weights = shared / "weights" / f"{NAME}.safetensors"
    pipeline = open_pipeline(ModelConfig(NAME, checkpoint=weights), device="cpu")
    photos = cache(partial(search_photos, pipeline, shared))  # decoded when the first search needs them
    backbone = pipeline.model.backbone
    methods = [
        *(METHODS[name] for name in OFF_THE_SHELF),
        replace(METHODS["diffrate"], name="diffrate-uniform"),
        searched_rates(backbone, photos, RATES),
        ppt_with_threshold(photos),
        METHODS["ours-fixed"],
        tuned_ours(shared, work, weights),
    ]
    result: dict[str, Any] = {
        "every": every,
        "titles": {method.name: method.title for method in methods} | {"ours-learned-fixed": "ours, tuned"},
        "ours": [method.name for method in methods if method.ours],
        "rates": json.loads(RATES.read_text()),
        "sets": {},
        "conditions": conditions(backbone.device),
    }
    for name in SETS:
        path = work / f"{name.replace('/', '-')}-{every}.json"
        if not path.exists():
            rows = evaluated(pipeline, methods, shared / "data" / name, every)
            write_atomic(path, json.dumps(rows, indent=1) + "\n")
        result["sets"][name] = json.loads(path.read_text())
    return result


def evaluated(pipeline: Pipeline, methods: list[Method], folder: Path, every: int) -> list[Row]:
    """One row for each method and budget; the first one is the dense model's."""
    paths = list_photos([folder])
    truth = pipeline.labels.classes_of(paths)

    def progress(batches: Iterator, total: int) -> Iterator:
        return iter(tqdm(batches, total=total, unit="batch", desc=folder.name))

    chosen, classes = paths[::every], truth[::every]
    preprocess = pipeline.preprocess
    rows, _ = evaluate_methods(
        pipeline.model.backbone, methods, BUDGETS, chosen, classes, preprocess, progress=progress
    )
    return [asdict(row) for row in rows]


# ---- compare


def cells(rows: list[Row]) -> dict[tuple[str, float], tuple[float, float]]:
    """(points of top-1 lost, KL divergence) by method and budget."""
    (dense,) = [row for row in rows if row["method"] == "dense"]
    return {
        (row["method"], row["target"]): (100 * (dense["right"] - row["right"]) / row["photos"], row["divergence"])
        for row in rows
        if row["method"] != "dense" and not row["left_out"]
    }


def table(result: dict[str, Any]) -> str:
    """Points of top-1 lost / KL in Markdown: a row for each method, a column for each budget and set."""
    found = {name: cells(rows) for name, rows in result["sets"].items()}
    columns = [(name, budget) for name in found for budget in BUDGETS]
    lines = [
        "| | " + " | ".join(f"`{name}` {budget:g}" for name, budget in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for method, title in result["titles"].items():
        row = [found[name].get((method, budget)) for name, budget in columns]
        texts = [f"{cell[0] + 0.0:.1f} / {cell[1]:.3f}" if cell else "out of reach" for cell in row]
        lines.append(f"| {title} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def not_ahead(result: dict[str, Any]) -> list[str]:
    """Each cell in which one of ours is neither 1.0 point nor a quarter of KL ahead of the best of the others."""
    lines, titles = [], result["titles"]
    for name, rows in result["sets"].items():
        found = cells(rows)
        for budget in BUDGETS:
            others = {m: cell for (m, b), cell in found.items() if b == budget and m not in result["ours"]}
            least_lost, by = min((cell[0], method) for method, cell in others.items())
            closest, closest_by = min((cell[1], method) for method, cell in others.items())
            for method in result["ours"]:
                lost, divergence = found[method, budget]
                if least_lost - lost < 1.0 and divergence > 0.75 * closest:
                    lines.append(
                        f"{titles[method]}, {name}, {budget:g}: {lost:.1f} / {divergence:.3f} against {least_lost:.1f} "
                        f"points of {titles[by]} and KL {closest:.3f} of {titles[closest_by]}"
                    )
    return lines


def main() -> None:
    """Measure what is missing, write the JSON file, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--every", type=int, default=1, help="use every N-th photo")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "other_methods")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "results" / f"other_methods_vit_tiny_cpu_{date.today()}.json"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    result = measured(args.shared, args.work, args.every)
    write_atomic(args.out, json.dumps(result, indent=1) + "\n")
    print(table(result), *not_ahead(result), sep="\n")


if __name__ == "__main__":
    main()
