"""Means over the seeds of a result of compare.py: a table in Markdown, and who is ahead.

python recipes/fewer_epochs/seed_table.py RESULT.json [RESULT.json ...]

Results of several runs, such as of different seeds, are joined.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Curves = list[dict[str, Any]]

TITLES = {
    "ours-delta": "PatchLife, any budget, delta",
    "ours": "PatchLife, any budget, all weights",
    "ours-one": "PatchLife, this budget only, all weights",
    "evit": "EViT",
    "dynamicvit": "DynamicViT",
    "tnt": "TNT, one layer",
    "tome": "ToMe",
}


def read(paths: list[str]) -> dict[str, Any]:
    """The result of one or several files: the curves of all, with the other fields of the first."""
    results = [json.loads(Path(path).read_text()) for path in paths]
    for name in ("photos", "image_size", "batch_size", "learning_rate"):
        if len({result[name] for result in results}) > 1:
            raise SystemExit(f"these results differ in {name}, so they cannot be joined")
    return results[0] | {"curves": [curve for result in results for curve in result["curves"]]}


def by_run(curves: Curves) -> dict[tuple[str, int], Curves]:
    """The curves of all seeds by (method, epochs)."""
    runs: dict[tuple[str, int], Curves] = {}
    for curve in curves:
        runs.setdefault((curve["method"], curve["epochs"]), []).append(curve)
    return runs


def sets_of(result: dict[str, Any]) -> list[str]:
    """Names of the sets of photos that were evaluated on."""
    return list(result["dense"])


def mean_points(curves: Curves) -> list[dict[str, Any]]:
    """The points of one run, means over its seeds."""
    points = []
    for same in zip(*(curve["curve"] for curve in curves), strict=True):
        point: dict[str, Any] = {key: mean(p[key] for p in same) for key in ("epoch", "seconds")}
        for name in same[0].keys() - point.keys():
            point[name] = {number: mean(p[name][number] for p in same) for number in ("top1", "kl")}
        points.append(point)
    return points


def table(result: dict[str, Any]) -> str:
    """Accuracy and KL at the end of each run, mean and standard deviation over its seeds, with epochs and seconds."""
    sets = sets_of(result)
    head = [
        "method",
        "epochs",
        "seconds",
        *(f"{name}: {what}" for name in sets for what in ("top-1, %", "KL")),
        "seeds",
    ]
    rows = [head, ["---"] * len(head)]
    for (method, epochs), curves in by_run(result["curves"]).items():
        ends = [curve["curve"][-1] for curve in curves]
        numbers = []
        for name in sets:
            numbers += [_spread([p[name]["top1"] for p in ends], 1), _spread([p[name]["kl"] for p in ends], 3)]
        seconds = f"{mean(p['seconds'] for p in ends):.0f}"
        rows.append([TITLES[method], str(epochs), seconds, *numbers, str(len(curves))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def comparisons(result: dict[str, Any]) -> list[str]:
    """For each of our runs and each run of a baseline: by how much ours is ahead, in the means over the seeds."""
    ends = {run: mean_points(curves)[-1] for run, curves in by_run(result["curves"]).items()}
    lines = []
    for (method, epochs), own in ends.items():
        if not method.startswith("ours"):
            continue
        for (other, other_epochs), theirs in ends.items():
            if other.startswith("ours"):
                continue
            by = "; ".join(
                f"{name} {own[name]['top1'] - theirs[name]['top1']:+.1f} points, KL {own[name]['kl']:.3f} against "
                f"{theirs[name]['kl']:.3f}"
                for name in sets_of(result)
            )
            lines.append(f"{TITLES[method]}, {epochs} epochs, against {TITLES[other]}, {other_epochs} epochs: {by}")
    return lines


def _spread(values: list[float], digits: int) -> str:
    """The mean, and the standard deviation if there are several values."""
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


if __name__ == "__main__":
    result = read(sys.argv[1:])
    print(table(result))
    print(*comparisons(result), sep="\n")
