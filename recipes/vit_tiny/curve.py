"""Accuracy and KL divergence of the slimmed ViT-Tiny against the budget, with other methods: a JSON file in results/,
the picture docs/images/budget_curve.png, and the tables of docs/how_to/choose_a_budget.md.

    python recipes/vit_tiny/curve.py SHARED [--every 4] [--adapter FOLDER] [--methods tome,ppt,mame]

SHARED has weights/vit_tiny_patch16_224.safetensors and data/. The work is done by `patchlife bench` (other methods, and
this one with nothing trained), `patchlife tune` (on 256 of the photos that the adapter was trained on) and `patchlife
eval`. Finished parts in --work are not repeated; --draw-only makes picture and tables from the JSON file alone.
"""

from __future__ import annotations

import argparse
import json
import re
from datetime import date
from pathlib import Path
from typing import Any

from patchlife.cli.main import main as patchlife
from patchlife.config import CURVE_BUDGETS
from patchlife.io.files import write_atomic
from patchlife.visual.layout import stacked
from patchlife.visual.plots import Panel, Point, plot_panels

ROOT = Path(__file__).parents[2]
SETS = {"in1k-samples": "one photo of each ImageNet class", "in20/val": "validation photos of 20 ImageNet classes"}
PICTURE, PAGE = ROOT / "docs/images/budget_curve.png", ROOT / "docs/how_to/choose_a_budget.md"
MEASURES = (("top1", "top-1, %", 100), ("divergence", "KL divergence from the dense model, nats", 1))
OURS = ("adapter, fixed", "adapter, adaptive", "tuned, fixed", "nothing trained, fixed")
TITLES = {"ours-fixed": "nothing trained, fixed"}


# ---- measure


def measured(shared: Path, work: Path, adapter: Path, methods: str, every: int) -> dict[str, Any]:
    """All curves on all sets, as in the JSON file."""
    weights = shared / "weights" / "vit_tiny_patch16_224.safetensors"
    result: dict[str, Any] = {"adapter": adapter.name, "sets": {}}
    tuned, photos = work / "tuned", [shared / "data" / part / "train" for part in ("in20", "caltech101")]
    if not tuned.is_dir():
        _run("tune", "vit_tiny_patch16_224", *photos, "--checkpoint", weights, "--out", tuned)
    for name in SETS:
        folder, data = work / f"{name.replace('/', '-')}-{every}", shared / "data" / name
        bench = _bench(folder / "bench", weights, data, methods, every)
        options = ["--checkpoint", weights, "--every", every, "--points", bench]
        both = [
            _eval(adapter, data, folder / "adapter.json", "--modes", "fixed,adaptive", *options),
            _eval(tuned, data, folder / "tuned.json", *options),
        ]
        result["sets"][name], result["conditions"] = _curves(json.loads(bench.read_text()), *both)
        result["sets"][name]["every"] = every
    return result


def _eval(model: Path, data: Path, out: Path, *options: object) -> dict[str, Any]:
    """The result of eval."""
    if not out.exists():
        _run("eval", model, data, *options, "--curve", out.with_suffix(".html"), "--out", out)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def _bench(out: Path, weights: Path, data: Path, methods: str, every: int) -> Path:
    """The result file of bench."""
    if not (found := list(out.glob("*.json"))):
        names, budgets = f"ours-fixed,{methods}", ",".join(map(str, CURVE_BUDGETS))
        options = ["--no-speed", "--data", data, "--every", every, "--methods", names, "--flops", budgets, "--out", out]
        _run("bench", "vit_tiny_patch16_224", "--checkpoint", weights, *options)
        found = list(out.glob("*.json"))
    (result,) = found
    return result


def _run(*words: object) -> None:
    if code := patchlife([str(word) for word in words]):
        raise SystemExit(code)


def _curves(
    bench: dict[str, Any], scores: dict[str, Any], tuned: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(dense model, number of photos and points of each curve; conditions)."""
    curves: dict[str, list[dict[str, Any]]] = {name: [] for name in OURS}
    names = ("budget", "fraction", "top1", "drop", "drop_interval", "agreement", "divergence")
    for title, measurement in (("adapter", scores), ("tuned", tuned)):
        for score in measurement["scores"]:
            curves[f"{title}, {score['mode']}"].append({name: score[name] for name in names})
    (dense,) = [row for row in bench["accuracy"] if row["method"] == "dense"]
    for row in bench["accuracy"]:
        if row["method"] == "dense" or row["left_out"]:
            continue
        title = TITLES.get(row["method"], bench["methods"][row["method"]]["title"])
        curves.setdefault(title, []).append(
            {
                "budget": row["target"],
                "fraction": row["flops"],
                "top1": row["right"] / row["photos"],
                "drop": (dense["right"] - row["right"]) / row["photos"],
                "agreement": row["agreeing"] / row["photos"],
                "divergence": row["divergence"],
            }
        )
    left_out = [[row["method"], row["target"], row["left_out"]] for row in bench["accuracy"] if row["left_out"]]
    kept = {"photos": scores["photos"], "dense_top1": dense["right"] / dense["photos"], "left_out": left_out}
    return kept | {"curves": curves}, scores["conditions"]


# ---- draw


def draw(result: dict[str, Any], path: Path) -> None:
    """The picture: a row for each set, a panel for each measure."""
    rows = []
    for name, found in result["sets"].items():
        panels = []
        for measure, axis, factor in MEASURES:
            curves = {
                label: [Point(score["fraction"], factor * score[measure]) for score in scores]
                for label, scores in found["curves"].items()
            }
            dense, others = 100 * found["dense_top1"], [label for label in curves if label not in OURS]
            panels.append(Panel(axis, curves, dense if measure == "top1" else None, others, measure == "divergence"))
        rows.append(plot_panels(panels, f"ViT-Tiny, {found['photos']} photos of {name}"))
    stacked(rows, 10).quantize(64).save(path, optimize=True)


# ---- the page


def tables(result: dict[str, Any]) -> str:
    """A table for each set: points of top-1 lost / KL, a row for each budget."""
    parts = []
    for name, found in result["sets"].items():
        labels = [label for label, scores in found["curves"].items() if scores]
        parts += [
            f"`{name}` ({SETS[name]}): {found['photos']} photos, dense model {100 * found['dense_top1']:.1f} %",
            "",
            f"| budget | {' | '.join(labels)} |",
            f"| --- |{' --- |' * len(labels)}",
        ]
        for budget in sorted({score["budget"] for label in labels for score in found["curves"][label]}, reverse=True):
            cells = [_cell(found["curves"][label], budget) for label in labels]
            parts.append(f"| {budget:g} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def _cell(scores: list[dict[str, Any]], budget: float) -> str:
    found = [score for score in scores if score["budget"] == budget]
    if not found:
        return "out of reach"
    return f"{100 * found[0]['drop'] + 0.0:.1f} / {abs(found[0]['divergence']):.3f}"


def write_page(page: Path, result: dict[str, Any]) -> None:
    """Replace what is between the two comments of the page by the tables."""
    text, count = re.subn(
        r"(<!-- curve -->\n).*(<!-- end of curve -->)",
        lambda match: f"{match[1]}\n{tables(result)}\n{match[2]}",
        page.read_text("utf-8"),
        flags=re.DOTALL,
    )
    assert count == 1, f"{page} must have one pair of comments around the tables"
    write_atomic(page, text)


def main() -> None:
    """Measure, unless --draw-only is given; draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--every", type=int, default=1, help="use every N-th photo")
    parser.add_argument("--adapter", type=Path, default=Path(__file__).with_name("adapter"))
    parser.add_argument("--methods", default="tome,ppt,mame", help="other methods, as in patchlife bench --methods")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "budget_curve")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / f"budget_curve_vit_tiny_cpu_{date.today()}.json")
    parser.add_argument("--draw-only", action="store_true", help="only draw the JSON file of an earlier run")
    args = parser.parse_args()
    if not args.draw_only:
        result = measured(args.shared, args.work, args.adapter, args.methods, args.every)
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")
    result = json.loads(args.out.read_text())
    draw(result, PICTURE)
    write_page(PAGE, result)


if __name__ == "__main__":
    main()
