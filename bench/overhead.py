"""Measures the time of the decision: dense, no-decision bound, ours in fixed mode, ours in adaptive mode.

    python bench/overhead.py --out results/overhead_cpu.json        # about 8 minutes on 2 idle cores
    python bench/overhead.py --rounds 5 --models deit_tiny_patch16_224 --batches 1
    python bench/overhead.py --cases --out results/overhead_cases_cpu.json   # about 20 minutes: many patches, batch 1

The no-decision bound is the slices of the schedule without scoring or sorting. All runs are timed in turns; weights are
random, because time does not depend on them. Adaptive runs get scores that give images very different numbers of
patches (a fifth to five thirds of the mean); the mean is the schedule's.

With ``--cases`` each run of a case is timed in turns with the bound of its own schedule, in the number of threads that
the case names.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads slow shared cores down

import torch
from compared_runs import BOUND, OURS, backbone_model, build, random_images, slimmed, time_over_bound
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from patchlife import LifeConfig, Scorer, SlimModel, __version__, wrap
from patchlife.backbones import Backbone, Embedded
from patchlife.evaluation.timing import Timing, alternate
from patchlife.io.files import write_atomic
from patchlife.slimming.run.fixed import reorder
from patchlife.slimming.scorers import Scores

TARGETS = {  # by case, or batch size: (run, reference): least ratio of throughputs
    "batch 16": {("slices", BOUND): 0.98, ("adaptive slices", "uneven slices"): 0.93},
    "batch 1": {("slices", BOUND): 0.95},
    "dinov2-s-518": {(run, BOUND): 0.98 if "learned" in run else 0.97 for run in OURS},
    "vit-s-1024": {(run, BOUND): 0.98 if "learned" in run else 0.97 for run in OURS},
    "deit-s-224": {(run, BOUND): 0.98 for run in OURS},
    "vit-tiny-224": {(run, BOUND): 0.96 for run in OURS},
    "vit-tiny-224-two-threads": {(run, BOUND): 0.96 for run in OURS},
}
DECISION_AT_MOST = 0.015  # fraction of the dense time, at batch 16


@dataclass(frozen=True)
class Case:
    """One image at ``budget`` in ``threads`` threads."""

    model: str
    pixels: int
    threads: int
    budget: float = 0.5


CASES = {
    "dinov2-s-518": Case("vit_small_patch14_dinov2", 518, 1),
    "vit-s-1024": Case("vit_small_patch16_224", 1024, 1),
    "deit-s-224": Case("deit_small_patch16_224", 224, 2),
    "vit-tiny-224": Case("vit_tiny_patch16_224", 224, 1),
    "vit-tiny-224-two-threads": Case("vit_tiny_patch16_224", 224, 2),
}


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


def decision(model: SlimModel, tokens: Tensor, embedded: Embedded) -> Tensor:
    """Scoring, sorting and gathering alone, on the input of the start block."""
    plan = model.decide(tokens, embedded)
    first = plan.schedule.kept[model.start]
    return reorder(tokens, None, plan.order[:, :first], model.backbone.prefix)[0]


def measure(name: str, batch: int, budget: float, rounds: int, patience: float) -> Timing:
    """Time all runs on one backbone and one batch."""
    vit, images = backbone_model(name, 224), random_images(batch, 224)
    slices = slimmed(vit, "slices", budget)
    bb, plain, merging = slices.backbone, LifeConfig(budget=budget, merge=False), LifeConfig(budget=budget)
    uneven = Uneven(batch, bb.grid[0] * bb.grid[1])
    runs: dict[str, Callable[[], object]] = {
        **{run: partial(build(run, vit, images, budget), images) for run in (BOUND, "dense", *OURS)},
        "uneven slices": partial(wrap(vit, plain, uneven), images),
        "adaptive slices": partial(adaptive(wrap(vit, plain, uneven), images), images),
        "uneven merging": partial(wrap(vit, merging, uneven), images),
        "adaptive merging": partial(adaptive(wrap(vit, merging, uneven), images), images),
    }
    with torch.inference_mode():
        embedded = bb.embed(images)
        tokens = slices.before_start(embedded)
    runs["decision"] = partial(decision, slices, tokens, embedded)
    runs["decision, learned scorer"] = partial(
        decision, slimmed(vit, "slices, learned scorer", budget), tokens, embedded
    )
    metadata = {"model": name, "batch": batch, "dtype": "float32", "budget": budget}
    metadata["schedule"] = str(slices.schedule())
    return alternate(runs, rounds=rounds, patience=patience, metadata=metadata)


def adaptive(model: SlimModel, images: Tensor) -> SlimModel:
    """The model in adaptive mode; calibrated on ``images``, so that their mean budget is met exactly."""
    return model.calibrate([images]).set_mode("adaptive")


def verdicts(timing: Timing) -> list[dict]:
    """Each target for this batch size, and the measured value."""
    batch, rows = timing.conditions["batch"], []
    for (run, reference), least in TARGETS.get(f"batch {batch}", {}).items():
        ratio = timing.ratios[run].median / timing.ratios[reference].median
        rows.append(_row(f"{run} / {reference}, throughput", ratio, least))
    if batch == 16:
        for run in ("decision", "decision, learned scorer"):
            fraction = timing.ratios["dense"].median / timing.ratios[run].median
            rows.append(_row(f"{run} / dense, time", fraction, most=DECISION_AT_MOST))
    return rows


def _row(what: str, value: float, least: float | None = None, most: float | None = None) -> dict:
    target = f"<= {most}" if least is None else f">= {least}"
    met = value <= most if most is not None else value >= least
    return {"what": what, "target": target, "measured": round(value, 4), "met": met}


# ---- cases: one image


def measure_case(name: str, rounds: int, patience: float, tiny: bool) -> list[dict]:
    """A record for the dense model and for each of `OURS`, with the target that the case has for it.

    ``patience`` is in seconds for the whole case.
    """
    case, runs = CASES[name], ("dense", *OURS)
    vit, images = backbone_model(case.model, case.pixels, tiny), random_images(1, case.pixels)
    protocol = {"rounds": rounds, "patience": patience / len(runs), "warmup": 1}
    records = []
    with threads(case.threads):
        for run in runs:
            timing = time_over_bound(
                run, vit, images, case.budget, metadata={"model": case.model, "case": name}, **protocol
            )
            least = TARGETS[name].get((run, BOUND))
            rows = [] if least is None else [_row(f"{run} / {BOUND}, throughput", timing.ratios[run].median, least)]
            records.append({**timing.to_dict(), "targets": rows})
    return records


@contextmanager
def threads(number: int) -> Iterator[None]:
    """torch computes in this number of threads inside the ``with`` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def case_table(results: list[dict]) -> str:
    """A Markdown table with a row for each run of each case."""
    lines = [
        "| case | threads | run | ms | over the bound (p10 to p90) | target | |",
        "| --- | ---: | --- " + "| ---: " * 3 + "| --- |",
    ]
    for record in results:
        own = record["conditions"]
        run, ratio = own["run"], record["ratios"][own["run"]]
        over = f"{ratio['median']:.3f} ({ratio['p10']:.3f} to {ratio['p90']:.3f})"
        row = next(iter(record["targets"]), {"target": "", "met": None})
        verdict = {True: "met", False: "missed", None: ""}[row["met"]]
        cells = [own["case"], str(own["threads"]), run, f"{1e3 * record['seconds'][run]['median']:.1f}", over]
        lines.append(f"| {' | '.join([*cells, row['target'], verdict])} |")
    return "\n".join(lines)


def show(timing: Timing, targets: list[dict]) -> None:
    """Print one model at one batch size."""
    own = timing.conditions
    print(f"\n{own['model']}, batch {own['batch']}, {own['schedule']}")
    for run, seconds in timing.seconds.items():
        print(f"  {run:26} {1e3 * seconds.median:8.1f} ms   speed over the bound {timing.verdict(run)}")
    for row in targets:
        verdict = "met" if row["met"] else "missed"
        print(f"  {row['what']:48} {row['measured']:<7} target {row['target']} {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["deit_tiny_patch16_224", "deit_small_patch16_224"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--budget", type=float, default=0.6)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--patience", type=float, default=180, help="seconds for each model and batch")
    parser.add_argument("--cases", nargs="*", choices=CASES, help="measure these cases, or all, and nothing else")
    parser.add_argument("--tiny", action="store_true", help="few channels, to try --cases")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results: list[dict] = []
    for name in tqdm((args.cases or CASES) if args.cases is not None else ()):
        results += measure_case(name, args.rounds, args.patience, args.tiny)
        save(args.out, results)
    if args.cases is not None:
        print(case_table(results))
        return
    for name, batch in tqdm([(m, b) for m in args.models for b in args.batches]):
        timing = measure(name, batch, args.budget, args.rounds, args.patience)
        results.append({**timing.to_dict(), "targets": verdicts(timing)})
        show(timing, results[-1]["targets"])
        save(args.out, results)


def save(path: Path | None, results: list[dict]) -> None:
    """Write what is measured so far, if there is a file to write."""
    if path:
        write_atomic(path, json.dumps({"patchlife": __version__, "bench": "overhead", "runs": results}, indent=1))


if __name__ == "__main__":
    main()
