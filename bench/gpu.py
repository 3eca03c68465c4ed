"""Run by `gpu.sh`: exactness on the GPU, two hardware ceilings, then all methods on five models within a time limit.

``checks.json`` lists every job that was left out, with its reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if importlib.util.find_spec("jaxtyping") is None:  # used in annotations only, so a stand-in is enough
    stand_in = types.ModuleType("jaxtyping")
    for kind in ("Bool", "Float", "Int", "Int8"):
        setattr(stand_in, kind, type(kind, (), {"__class_getitem__": classmethod(lambda cls, item: item[0])}))
    sys.modules["jaxtyping"] = stand_in

import timm
import torch
from families import FEW, START, fresh, photos
from gpu_plan import ENGINES, MODELS, TIMING, Job, Pace, left_out_lines, plan, prepare_until, reduced
from reference import masked

from patchlife import LifeConfig, __version__, flops, wrap
from patchlife.backbones import adapt
from patchlife.benchmarks.baselines import METHODS
from patchlife.benchmarks.comparison import time_methods
from patchlife.benchmarks.result import MethodInfo, Result
from patchlife.evaluation.memory import peak_bytes
from patchlife.evaluation.timing import alternate, conditions
from patchlife.io.files import write_atomic
from patchlife.runtime import CompiledBudgets, ExperimentalCompiledAdaptive
from patchlife.slimming.coverage import coverage_gain, running_max
from patchlife.slimming.similarity import falling, subspace

TARGET = 0.6
EXACT = 1e-5  # largest difference in float32, relative to the larger of 1 and the largest logit


def main() -> int:
    """Run all checks and jobs; returns 1 if a result is not exact."""
    args = _arguments()
    deadline = time.perf_counter() + 60 * args.minutes
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda" and not args.tiny:
        sys.exit("gpu.sh needs a CUDA device, and torch finds none; --tiny is a short test on the CPU")
    out = args.out or Path("results") / time.strftime("gpu-%Y%m%d-%H%M", time.gmtime())
    out.mkdir(parents=True, exist_ok=True)
    checks = {"kind": "patchlife-gpu-checks", "patchlife": __version__, "tiny": args.tiny}
    checks["date"] = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    checks |= {"conditions": conditions(device), "exactness": exactness(device, args.tiny)}
    checks |= {"ceilings": ceilings(device, args.tiny), "decision": parts_of_the_decision(device, args.tiny)}
    checks |= {"adaptive": None, "jobs": [], "left_out": []}
    write_atomic(out / "checks.json", json.dumps(checks, indent=1) + "\n")  # kept if a later step fails
    try:
        checks["adaptive"] = adaptive_beside_fixed(device, args.tiny)
    except Exception as error:  # the comparisons are more important than this
        checks["left_out"].append(f"adaptive beside fixed: {type(error).__name__}: {error}")
    torch.compiler.reset()
    results = run_jobs(args, device, deadline, out, checks)
    checks["seconds"] = round(60 * args.minutes - (deadline - time.perf_counter()))
    write_atomic(out / "checks.json", json.dumps(checks, indent=1) + "\n")
    _report(checks, results, out)
    return 0 if all(check["ok"] for check in checks["exactness"]) else 1


def run_jobs(args: argparse.Namespace, device: torch.device, deadline: float, out: Path, checks: dict) -> list[Result]:
    """Run the jobs that fit into the time; ``checks`` gets their seconds, and what was left out."""
    results: dict[tuple[str, str], Result] = {}
    pace, skipped, without = Pace(), [], {}
    engines = [e for e in args.engines if device.type == "cuda" or "graph" not in e]
    for asked in plan(args.models, engines, args.batches):
        started = time.perf_counter()
        job = asked if args.tiny else reduced(asked, deadline - started, pace)
        if job is None:
            skipped.append(asked)
            continue
        print(f"{deadline - started:4.0f} s left: {job}, {len(job.methods)} methods", flush=True)
        seconds: dict[str, float] = {}
        try:
            run(job, results, out, device, args.tiny, math.inf if args.tiny else deadline, seconds)
        except Exception as error:
            checks["left_out"].append(f"{job}: {type(error).__name__}: {error}")
        torch.compiler.reset()
        whole = time.perf_counter() - started
        pace.add(job, whole, len(seconds))
        checks["jobs"].append({"job": str(job), "seconds": round(whole, 1), "preparation_seconds": seconds})
        without[job] = [name for name in asked.methods if name not in seconds]
    checks["left_out"] += left_out_lines(skipped, without)
    return list(results.values())


def run(
    job: Job,
    results: dict[tuple[str, str], Result],
    out: Path,
    device: torch.device,
    tiny: bool,
    deadline: float,
    seconds: dict[str, float],
) -> None:
    """Time the methods of a job, and add the rows to the file of its model and engine.

    ``seconds`` gets the time that each method took before the timing: building, compiling, first runs.
    """
    started, key = time.perf_counter(), (job.model, job.engine)
    dtype = torch.bfloat16
    with device:
        vit = timm.create_model(job.model, **MODELS.get(job.model, {})).eval().to(device, dtype)
    bb = adapt(vit)
    images = torch.randn(job.batch, bb.channels, *bb.image_size, device=device, dtype=dtype)
    methods = [METHODS[name] for name in job.methods]
    if key not in results:
        settings = {"engine": job.engine, "dtype": "bfloat16", "images": "noise", "command": "bench/gpu.sh"}
        settings |= {"date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "patchlife": __version__}
        settings |= {"rounds": 30, "patience_seconds": TIMING, "image_size": list(bb.image_size)}
        results[key] = Result(job.model, "random", {**conditions(device), **settings}, {})
    result = results[key]
    infos = {m.name: MethodInfo(m.title, m.source, m.training, m.trained, m.ours) for m in methods}
    result.methods.update(infos)
    rounds, patience = (5, 1.0) if tiny else (30, TIMING)
    clock = Preparation(prepare_until(job, started, deadline), seconds)
    result.speed += time_methods(bb, methods, images, TARGET, job.engine, rounds, patience, clock.before)
    result.complete = True
    result.save(out / f"bench-{job.model}-{job.engine}.json")


class Preparation:
    """Takes the time of each method's preparation, and stops it when the time is over."""

    def __init__(self, until: float, seconds: dict[str, float]) -> None:
        self.until, self.seconds = until, seconds
        self.name, self.since = "", time.perf_counter()

    def before(self, name: str) -> str:
        """Called before each method, and once after the last one; the reason to leave it out, or nothing."""
        now = time.perf_counter()
        if self.name:
            self.seconds[self.name] = round(now - self.since, 2)
        late = bool(name) and name not in ("dense", "dense-eager") and now > self.until
        self.name, self.since = "" if late else name, now
        return "no time was left to prepare it" if late else ""


# ---- exactness


@torch.no_grad()
def exactness(device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    """Our runs against a slow reference that masks dropped patches in attention, in float32 on this device."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    checks = []
    for name in FEW[:2] if tiny else FEW:
        vit, images = fresh(name).to(device), photos(name).to(device)
        for mode in ("fixed", "adaptive"):
            for merge in (False, True):
                model = wrap(vit, LifeConfig(0.65, mode=mode, start=START, merge=merge))
                if mode == "adaptive":
                    model.calibrate([photos(name, 8, seed=1).to(device)])
                logits, lives = model.predict(images)
                lives = lives if device.type == "cpu" else _moved(lives, device)
                checks.append(
                    _check(f"{name}, {mode}{', merge' if merge else ''}", logits, masked(model, images, lives)[0])
                )
        checks.append(_check(f"{name}, budget 1", wrap(vit, LifeConfig(1.0))(images), vit(images)))
    return checks


def _moved(lives: Any, device: torch.device) -> Any:
    return type(lives)(lives.life.to(device), lives.kept.to(device), lives.score.to(device), lives.grid)


def _check(what: str, logits: torch.Tensor, reference: torch.Tensor) -> dict[str, Any]:
    difference = float((logits - reference).abs().max() / reference.abs().max().clamp(min=1))
    return {"what": what, "difference": difference, "ok": difference <= EXACT}


# ---- ceilings


def ceilings(device: torch.device, tiny: bool) -> dict[str, float]:
    """The device's highest rates: bytes copied (read and written) and bfloat16 products, per second."""
    count, side = (2**20, 256) if tiny else (2**29, 8192)
    source = torch.empty(count, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    runs: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "matmul": lambda: torch.mm(a, b, out=out),
    }
    timing = alternate(runs, rounds=5 if tiny else 40, device=device)
    copied, products = 2 * source.nbytes, 2 * side**3
    return {
        "copy_gb_per_s": copied / timing.seconds["copy"].median / 1e9,
        "bf16_matmul_tflops": products / timing.seconds["matmul"].median / 1e12,
    }


def parts_of_the_decision(device: torch.device, tiny: bool) -> dict[str, float]:
    """Seconds of the large operations in the decision of DINOv2-S at 518 px, batch 32: which one to replace."""
    batch, patches, dim, width = (2, 64, 16, 8) if tiny else (32, 1369, 384, 48)
    vectors = torch.nn.functional.normalize(torch.randn(batch, patches, dim, device=device), dim=2)
    directions, few = vectors[:, :width].transpose(1, 2).contiguous(), vectors[..., :width].contiguous()
    cosines = few[:, : patches // 7] @ few.transpose(1, 2)
    runs: dict[str, Callable[[], object]] = {
        "subspace": lambda: subspace(vectors, width),
        "qr": lambda: torch.linalg.qr(directions),
        "cosines of a block of rows": lambda: few[:, : patches // 7] @ few.transpose(1, 2),
        "running maximum of the block": lambda: running_max(cosines),
        "order": lambda: falling(vectors[..., 0]),
        "coverage gain": lambda: coverage_gain(vectors[..., 0].softmax(dim=1), few),
    }
    timing = alternate(runs, rounds=5 if tiny else 15, device=device, patience=5)
    return {name: spread.median for name, spread in timing.seconds.items()}


# ---- adaptive mode


def adaptive_beside_fixed(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Adaptive against fixed mode at the same mean FLOPs, bfloat16, batch 64; on a GPU also compiled."""
    with device:
        vit = timm.create_model("test_vit" if tiny else "deit_small_patch16_224").eval().to(device, torch.bfloat16)
    fixed, adaptive = wrap(vit, LifeConfig(TARGET)), wrap(vit, LifeConfig(TARGET))
    images = torch.randn(64, 3, *fixed.backbone.image_size, device=device, dtype=torch.bfloat16)
    adaptive.calibrate([images]).set_mode("adaptive")
    runs: dict[str, Callable[[], torch.Tensor]] = {
        "fixed": partial(fixed, images),
        "adaptive": partial(adaptive, images),
    }
    with torch.inference_mode():
        peaks = {name: peak_bytes(run, device) for name, run in runs.items()}
    if device.type == "cuda":
        whole, pieces = CompiledBudgets(fixed), ExperimentalCompiledAdaptive(adaptive)
        with torch.inference_mode():  # as in timing: compiled graphs are guarded on this mode
            whole.prepare([TARGET], images)
            for _ in range(3):
                pieces(images, TARGET)
        runs["fixed, compiled"] = partial(whole, images, TARGET)
        runs["adaptive, compiled"] = partial(pieces, images, TARGET)
    with torch.inference_mode():
        differences = {
            name: _check(name, run(), runs[name.partition(",")[0]]())["difference"] for name, run in runs.items()
        }
    fractions = {"fixed": flops(fixed).budget}
    fractions["adaptive"] = sum(adaptive.flops_of(adaptive.lives(images))) / len(images) / flops(fixed).dense
    # of logits from the eager ones of the same mode, in bfloat16: decisions and rounding differ a little
    metadata = {"batch": len(images), "peak_bytes": peaks, "flops": fractions, "differences": differences}
    return alternate(runs, rounds=5 if tiny else 30, device=device, patience=15, metadata=metadata).to_dict()


# ---- arguments and report


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the JSON files (default: results/gpu-DATE)")
    parser.add_argument("--minutes", type=float, default=8.5, help="time for everything (default: 8.5)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="default: all")
    parser.add_argument("--models", nargs="+", help=f"timm names (default: {' '.join(MODELS)})")
    parser.add_argument("--batches", nargs="+", type=int, help="default: 32 256 1")
    parser.add_argument("--device", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="a short test with a small model and small batches")
    args = parser.parse_args()
    args.engines = args.engines or (["eager"] if args.tiny else list(ENGINES))
    args.models = args.models or (["test_vit"] if args.tiny else list(MODELS))
    args.batches = args.batches or ([1, 2] if args.tiny else [32, 256, 1])
    return args


def _report(checks: dict[str, Any], results: list[Result], out: Path) -> None:
    from patchlife.benchmarks.report import text_report

    for result in results:
        print("\n" + text_report(result))
    wrong = [check for check in checks["exactness"] if not check["ok"]]
    print(f"\nexact: {len(checks['exactness']) - len(wrong)} of {len(checks['exactness'])} checks")
    for check in wrong:
        print(f"NOT exact: {check['what']}: difference {check['difference']:.1e}, allowed {EXACT:.0e}")
    print(", ".join(f"{name} {value:.1f}" for name, value in checks["ceilings"].items()))
    seconds = (checks["adaptive"] or {"seconds": {}})["seconds"]
    print("batch 64: " + ", ".join(f"{name} {1000 * spread['median']:.1f} ms" for name, spread in seconds.items()))
    for job in checks["left_out"]:
        print(f"left out: {job}")
    print(f"{checks['seconds']} s; numbers: {out}")


if __name__ == "__main__":
    sys.exit(main())
