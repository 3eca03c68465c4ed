"""What glibc's malloc costs: time, system time, page faults and resident memory, by batch size and image size.

    python bench/malloc.py --out results/malloc_cpu.json      # about ten minutes on 2 cores, idle
    python bench/malloc.py --tiny                             # a test in less than a minute

Two settings are compared: glibc's default, and freed memory kept in the process (`patchlife.malloc`), as the command
line sets it up. Every run is a process of its own, because the setting must be made before memory is allocated and
cannot be undone. The settings run in turns; every second round runs in reverse order.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve shared cores

from patchlife import __version__
from patchlife.io.files import write_atomic
from patchlife.malloc import keep_freed_memory

SETTINGS = ("default", "keeps freed memory")
RUNS = ("dense", "slimmed")
CASES = ((224, 1), (224, 16), (224, 64), (224, 128), (512, 1), (512, 4), (1024, 1))
"""(image size in pixels, batch size)."""

Key = tuple[int, int, str]
"""(image size, batch size, run)."""


@dataclass(frozen=True)
class Usage:
    """What one process measured.

    Attributes:
        seconds: median of a call. user, system: CPU seconds of a call, mean.
        faults: page faults of a call, mean. calls: number of calls.
        built, peak: largest resident memory in MiB, before the first call and at the end.
        conditions: see `patchlife.evaluation.timing.conditions`.
    """

    seconds: float
    user: float
    system: float
    faults: float
    calls: int
    built: float
    peak: float
    conditions: dict[str, Any]


# ---- in a process of its own


def measure(model: str, size: int, batch: int, run: str, budget: float, patience: float) -> Usage:
    """Call the dense or the slimmed model on random images for ``patience`` seconds, at least five times."""
    import timm
    import torch

    from patchlife import LifeConfig, wrap
    from patchlife.evaluation.timing import conditions

    vit = timm.create_model(model, img_size=size).eval()
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    function = vit if run == "dense" else wrap(vit, LifeConfig(budget=budget))
    built = peak_mebibytes()
    with torch.inference_mode():
        for _ in range(3):
            function(images)
        before, taken, end = resource.getrusage(resource.RUSAGE_SELF), [], time.perf_counter() + patience
        while len(taken) < 5 or time.perf_counter() < end:
            start = time.perf_counter()
            function(images)
            taken.append(time.perf_counter() - start)
    after, calls = resource.getrusage(resource.RUSAGE_SELF), len(taken)
    return Usage(
        statistics.median(taken),
        (after.ru_utime - before.ru_utime) / calls,
        (after.ru_stime - before.ru_stime) / calls,
        (after.ru_minflt - before.ru_minflt) / calls,
        calls,
        built,
        peak_mebibytes(),
        conditions(),
    )


def peak_mebibytes() -> float:
    """Largest resident memory of this process so far; Linux states it in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(arguments: str) -> None:
    """Measure with one setting, and print the result as JSON."""
    given = json.loads(arguments)
    if given.pop("setting") != "default" and not keep_freed_memory():
        raise SystemExit("freed memory cannot be kept: this needs glibc, and no other setting of malloc")
    print(json.dumps(asdict(measure(**given))))


# ---- in the process that compares


def in_own_process(setting: str, **arguments: Any) -> Usage:
    """`measure` in a new process, without the user's settings of malloc."""
    environment = {n: v for n, v in os.environ.items() if not n.startswith("MALLOC_") and n != "GLIBC_TUNABLES"}
    command = [sys.executable, __file__, "--child", json.dumps({"setting": setting, **arguments})]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Usage(**json.loads(done.stdout))


def summary(key: Key, pairs: list[dict[str, Usage]]) -> dict[str, Any]:
    """One row: each setting's medians over the rounds, and the median of the speed-up within a round."""
    size, batch, run = key
    row: dict[str, Any] = {"image_size": size, "batch": batch, "run": run}
    for setting in SETTINGS:
        usages = [pair[setting] for pair in pairs]
        values = {f: [getattr(u, f) for u in usages] for f in ("seconds", "user", "system", "faults", "built", "peak")}
        row[setting] = {name: round(statistics.median(v), 5) for name, v in values.items()}
        row[setting]["all_seconds"] = [round(u.seconds, 5) for u in usages]
        row[setting]["load"] = [u.conditions["load"] for u in usages]
    default, kept = SETTINGS
    row["speed-up"] = round(statistics.median(pair[default].seconds / pair[kept].seconds for pair in pairs), 3)
    row["peak_over_default"] = round(row[kept]["peak"] / row[default]["peak"], 3)
    return row


def text(row: dict[str, Any]) -> str:
    cells = [f"{row['image_size']} px, batch {row['batch']:2}, {row['run']:7}"]
    for setting in SETTINGS:
        values = row[setting]
        cells.append(
            f"{setting}: {1000 * values['seconds']:.1f} ms, system {1000 * values['system']:.1f} ms, "
            f"{values['faults']:.0f} faults, peak {values['peak']:.0f} MiB"
        )
    return " | ".join([*cells, f"{row['speed-up']:.2f}x"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--budget", type=float, default=0.6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=4.0, help="seconds of each process")
    parser.add_argument("--tiny", action="store_true", help="a small model and one case, to test this script")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.child:
        return child(args.child)
    if args.tiny:
        args.model, args.rounds, args.patience = "test_vit", 1, 0.5
    same = {"model": args.model, "budget": args.budget, "patience": args.patience}
    measured: dict[Key, list[dict[str, Usage]]] = defaultdict(list)
    for number in range(args.rounds):
        for size, batch in [(160, 8)] if args.tiny else CASES:
            for run in RUNS:
                order = SETTINGS[:: -1 if number % 2 else 1]
                pair = {s: in_own_process(s, size=size, batch=batch, run=run, **same) for s in order}
                measured[size, batch, run].append(pair)
    rows = [summary(key, pairs) for key, pairs in measured.items()]
    print(*map(text, rows), sep="\n")
    if args.out:
        first = next(iter(measured.values()))[0]["default"].conditions
        conditions = {n: v for n, v in first.items() if n not in ("malloc", "load")}
        result = {"patchlife": __version__, "bench": "malloc", "conditions": conditions | same, "rows": rows}
        write_atomic(args.out, json.dumps({**result, "rounds": args.rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
