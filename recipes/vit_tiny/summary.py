"""Collect the results of `run.sh` in one file and print the table of README.md.

python recipes/vit_tiny/summary.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from patchlife.io.files import write_atomic

MODELS = {"head": "scorer only", "adapter": "low-rank delta"}
SETS = ("in1k-samples", "in20-val")


def main(out: Path) -> None:
    """Write OUT/results.json and print the table, for the models that are there."""
    models = {model: title for model, title in MODELS.items() if (out / model).is_dir()}
    result: dict = {"fits": {}, "evals": {}}
    for model in models:
        fit = json.loads((out / f"{model}.work" / "fit.json").read_text())
        fit["config"]["cache"] = None  # a path of the machine it ran on
        fit["skipped"] = len(fit["skipped"])  # for the same reason
        result["fits"][model] = fit
        for name in SETS:
            evaluation = json.loads((out / f"{model}-{name}.json").read_text())
            kept = ("photos", "scores", "conditions")
            result["evals"][f"{model}, {name}"] = {key: evaluation[key] for key in kept}
    write_atomic(out / "results.json", json.dumps(result, indent=1) + "\n")
    print("| | mode | budget |" + "".join(f" `{name}` | drop | KL |" for name in SETS))
    print("| --- | --- | --- |" + " --- | --- | --- |" * len(SETS))
    for model, title in models.items():
        both = [result["evals"][f"{model}, {name}"]["scores"] for name in SETS]
        for scores in zip(*both, strict=True):
            print(f"| {title} | {scores[0]['mode']} | {scores[0]['budget']:g} |" + "".join(map(_cells, scores)))


def _cells(score: dict) -> str:
    low, high = score["drop_interval"]
    drop = f"{100 * score['drop']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
    return f" {100 * score['top1']:.1f} | {drop} | {score['divergence']:.4f} |"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
