"""Collect the results of `run.sh` in one file and print the table of README.md.

python recipes/headless_vit_tiny/summary.py OUT PHOTOS EVERY EPOCHS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from patchlife.io.files import write_atomic

MODELS = ("untrained", "head", "adapter-0", "adapter-0.5")


def main(out: Path, *arguments: str) -> None:
    """Write OUT/results.json and print the table, for the models that were measured."""
    command = " ".join(["recipes/headless_vit_tiny/run.sh SHARED OUT", *arguments])
    result: dict[str, Any] = {"command": command, "fits": {}, "evals": {}}
    print("| | mode | FLOPs | cosine | its 5 % | kNN | below dense (95 % interval) |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for model in [name for name in MODELS if (out / f"{name}.json").is_file()]:
        title = "attention rule, nothing trained"
        if (summary := out / f"{model}.work" / "fit.json").is_file():
            fit = json.loads(summary.read_text())
            fit["config"]["cache"] = None  # a path of the machine it ran on
            result["fits"][model] = fit | {"skipped": len(fit["skipped"])}  # paths, for the same reason
            title = _title(fit["config"])
        evaluation = json.loads((out / f"{model}.json").read_text())
        kept = ("photos", "neighbours", "scores", "conditions")
        result["evals"][model] = {key: evaluation[key] for key in kept}
        for score in evaluation["scores"]:
            print(f"| {title} | {_cells(score)} |")
            title = ""
    write_atomic(out / "results.json", json.dumps(result, indent=1) + "\n")


def _title(config: dict[str, Any]) -> str:
    if config["finetune"] == "none":
        return "learned scorer only"
    epochs = "1 epoch" if config["finetune_epochs"] == 1 else f"{config['finetune_epochs']} epochs"
    what = "output and patches" if config["patch_weight"] else "the output only"
    return f"+ low rank, {epochs}, distils {what}"


def _cells(score: dict[str, Any]) -> str:
    low, high = score["drop_interval"]
    return (
        f"{score['mode']} | {score['fraction']:.3f} | {score['cosine']:.4f} | {score['low_cosine']:.4f} | "
        f"{100 * score['knn']:.1f} | {100 * score['drop']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
