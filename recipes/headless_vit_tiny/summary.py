"""Collect the results of `run.sh` in one file and print the table of README.md.

python recipes/headless_vit_tiny/summary.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from patchlife.io.files import write_atomic

MODELS = {
    "untrained": "attention rule, nothing trained",
    "head": "learned scorer only",
    "adapter-0": "+ low rank, distils the output",
    "adapter-0.5": "+ low rank, distils output and patches",
}


def main(out: Path) -> None:
    """Write OUT/results.json and print the table, for the models that were measured."""
    result: dict[str, Any] = {"fits": {}, "evals": {}}
    print("| | mode | FLOPs | cosine | its 5 % | kNN | below dense (95 % interval) |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for model, title in MODELS.items():
        if not (out / f"{model}.json").is_file():
            continue
        if (summary := out / f"{model}.work" / "fit.json").is_file():
            fit = json.loads(summary.read_text())
            fit["config"]["cache"] = None  # a path of the machine it ran on
            result["fits"][model] = fit | {"skipped": len(fit["skipped"])}  # paths, for the same reason
        evaluation = json.loads((out / f"{model}.json").read_text())
        kept = ("photos", "neighbours", "scores", "conditions")
        result["evals"][model] = {key: evaluation[key] for key in kept}
        for score in evaluation["scores"]:
            print(f"| {title} | {_cells(score)} |")
            title = ""
    write_atomic(out / "results.json", json.dumps(result, indent=1) + "\n")


def _cells(score: dict[str, Any]) -> str:
    low, high = score["drop_interval"]
    return (
        f"{score['mode']} | {score['fraction']:.3f} | {score['cosine']:.4f} | {score['low_cosine']:.4f} | "
        f"{100 * score['knn']:.1f} | {100 * score['drop']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
