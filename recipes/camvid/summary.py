"""Print the tables of README.md from the scores of run.sh, and write them with the seconds of training as one result.

python recipes/camvid/summary.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from camvid import THIN

from patchlife.io.files import write_atomic


def main(out: Path) -> None:
    """Write OUT/results.json and print one row for each method, settings and budget."""
    result: dict[str, Any] = json.loads((out / "scores.json").read_text())
    result["command"] = "recipes/camvid/run.sh SHARED OUT"
    fits = {name: out / f"{name}.fit.json" for name in ("dense", "scorer", "adapter", "long-scorer", "long-adapter")}
    result["fits"] = {name: json.loads(file.read_text()) for name, file in fits.items() if file.is_file()}
    write_atomic(out / "results.json", json.dumps(result, indent=1) + "\n")
    print(f"dense: mIoU {_points(result['dense']['miou'])}, {_thin(result['dense'])}\n")
    print("| method | FLOPs | below dense (95 % interval) | KL | pixels equal | " + " | ".join(THIN) + " |")
    print("| --- | --- | --- | --- | --- |" + " --- |" * len(THIN))
    for score in sorted(result["scores"], key=_place):
        print(f"| {_cells(score)} |")


def _place(score: dict[str, Any]) -> tuple[Any, ...]:
    return -score["budget"], score["drop"]


def _cells(score: dict[str, Any]) -> str:
    low, high = score["drop_interval"]
    settings = ", ".join(f"{name} {value}" for name, value in score["settings"].items())
    cells = [
        score["method"] + (f" ({settings})" if settings else ""),
        f"{score['fraction']:.3f}",
        f"{_points(score['drop'])} ({_points(low)} to {_points(high)})",
        f"{score['kl']:.4f}",
        f"{_points(score['agreement'])}",
        *(_points(score["iou"][name]) for name in THIN),
    ]
    return " | ".join(cells)


def _thin(score: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_points(score['iou'][name])}" for name in THIN)


def _points(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
