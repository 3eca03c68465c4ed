"""Generates ``docs/results.md`` from the result files: ``python bench/results_page.py``.

With ``--check`` nothing is written, and the exit code is 1 if the page does not match the files. The page shows the
newest run of each kind (model, weights, engine, dtype, device, photos) and lists the file names of older runs.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patchlife.benchmarks.report import conditions_line, methods_table
from patchlife.benchmarks.result import KIND, Result
from patchlife.benchmarks.tables import Table, advice_lines, findings, main_table, target_rows, title_of
from patchlife.io.files import write_atomic

__all__ = ["load_all", "main", "page"]

_PICTURE = "images/results.png"

_INTRODUCTION = """# Results

`python bench/results_page.py` generates this page from the JSON files in `results/`. A test fails if the page does not
match the files. Do not edit the page.

**How to read the tables**

- All methods run on the same backbone, in the same process, in turns. Numbers are medians over the rounds.
- The number in brackets is the speed relative to the dense model. The dense model runs right before or after each
  method, because the speed of a shared machine can change within one round; the ratio is taken from such pairs.
- All methods are set to equal FLOPs. The FLOPs column is the executed fraction of the dense model's FLOPs.
- *as dense %* is the percentage of photos with the same predicted class as the dense model.
- The *no-decision bound* is the slices of our schedule without scoring or sorting: no method on that schedule can be
  faster. *random* drops patches at random.
- If a method needs training and was not trained, only its speed is given.
- A ratio is *too noisy* if its 90th percentile is more than 1.5 times its 10th percentile. Its number is not given.
- We wrote every method from its paper, on the same blocks. No number here reproduces a published one."""


def load_all(folder: Path) -> dict[str, Result]:
    """Every result under ``folder``, by its path relative to ``folder``; other JSON files are skipped."""
    results = {}
    for path in sorted(folder.rglob("*.json")):
        if f'"kind": "{KIND}"' in path.read_text("utf-8")[:200]:
            results[str(path.relative_to(folder))] = Result.load(path)
    return results


def page(results: Mapping[str, Result], checks: Mapping[str, dict[str, Any]]) -> str:
    """The text of the page, from results and GPU checks by file name."""
    parts, shown = [_INTRODUCTION], _shown(results)
    if shown and _drawn(results[shown[0][0]]):
        parts.append(f"![Top-1 against images per second and against FLOPs, one line for each method]({_PICTURE})")
    for first, *older in shown:
        parts += _section(first, results[first], older)
    if not results:
        parts.append("No run has been committed yet.")
    parts += _gpu(checks)
    parts += _methods([results[first] for first, *_ in shown])
    return "\n\n".join(parts) + "\n"


def _shown(results: Mapping[str, Result]) -> list[list[str]]:
    """File names: one list for each kind of run in the order of the page, newest first in each list."""
    newest: dict[tuple, list[str]] = {}
    for name, result in sorted(results.items(), key=lambda item: (str(item[1].conditions.get("date")), item[0])):
        newest.setdefault(_kind(result), []).insert(0, name)
    return sorted(newest.values(), key=lambda names: _order(results[names[0]]))


def _drawn(result: Result) -> bool:
    return bool(result.speed and result.accuracy)


def _kind(result: Result) -> tuple:
    c = result.conditions
    return (
        result.model,
        result.weights,
        c.get("engine"),
        c.get("dtype"),
        c.get("device"),
        result.photos_of,
        bool(result.speed),
    )


def _order(result: Result) -> tuple:
    """Sort key: speed and accuracy first, then speed alone, then accuracy alone; by device, model and engine."""
    c = result.conditions
    return not result.speed, not result.accuracy, str(c.get("device")), result.model, str(c.get("engine"))


def _section(name: str, result: Result, older: list[str]) -> list[str]:
    engine = result.conditions.get("engine")
    what = f"{engine}, {result.conditions.get('device')}" if result.speed else f"top-1 on {result.photos_of}"
    parts = [f"## {result.model}, {what}", conditions_line(result)]
    parts[-1] += f" Weights: {result.weights}. Numbers: `{name}`."
    parts.append(f"Command: `{result.conditions.get('command')}`")
    if not result.complete:
        parts.append("**This run was interrupted.** The tables hold what was measured before.")
    for target in result.targets:
        parts += [f"### At {target:g} of the dense FLOPs", _markdown(main_table(result, target))]
    parts.append("### Where ours is not the best")
    sentences = findings(result)
    parts.append("\n".join(f"- {text}" for text in sentences) if sentences else "In no row above.")
    columns, rows = target_rows(result)
    if rows:
        parts += ["### Ours against the no-decision bound and against others", _markdown((columns, rows))]
    if lines := [f"- {text[0].upper()}{text[1:]}" for text in advice_lines(result)]:
        parts += ["### The fastest schedules on this machine", "\n".join(lines)]
    left_out = {(r.method, r.left_out) for r in result.speed if r.left_out}
    left_out |= {(r.method, r.left_out) for r in result.accuracy if r.left_out}
    if left_out:
        lines = [f"- {title_of(result, method)}: {reason}" for method, reason in sorted(left_out)]
        parts += ["### Left out", "\n".join(lines)]
    if older:
        parts.append("Earlier runs of this kind: " + ", ".join(f"`{n}`" for n in older) + ".")
    return parts


def _gpu(checks: Mapping[str, dict[str, Any]]) -> list[str]:
    parts = ["## GPU: exactness and ceilings"]
    if not checks:
        return [*parts, "`bench/gpu.sh` has not been run on a GPU yet; every number above is from a CPU."]
    for name, check in checks.items():
        right = sum(entry["ok"] for entry in check["exactness"])
        wrong = [e for e in check["exactness"] if not e["ok"]]
        ceilings = check["ceilings"]
        text = f"`{name}` ({check['date']}, {check['conditions']['device']}): {right} of {len(check['exactness'])} "
        text += "checks are within 1e-5 of the slow reference. Highest rates: copy "
        text += f"{ceilings['copy_gb_per_s']:.0f} GB/s, bfloat16 products {ceilings['bf16_matmul_tflops']:.0f} TFLOP/s."
        text += "".join(f" **Not exact: {e['what']} (difference {e['difference']:.1e}).**" for e in wrong)
        text += " Left out: " + "; ".join(check["left_out"]) + "." if check["left_out"] else ""
        parts.append(text)
    return parts


def _methods(results: Sequence[Result]) -> list[str]:
    rows: dict[tuple, list[str]] = {}
    columns: list[str] = []
    for result in results:
        columns, added = methods_table(result)
        rows |= {tuple(row): row for row in added}
    return ["## The methods", _markdown((columns, list(rows.values())))] if rows else []


def _markdown(table: Table) -> str:
    columns, rows = table
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)


def load_checks(folder: Path) -> dict[str, dict[str, Any]]:
    """GPU checks under ``folder``, by their path relative to it; ``--tiny`` runs are skipped."""
    checks = {}
    for path in sorted(folder.rglob("checks.json")):
        body = json.loads(path.read_text("utf-8"))
        if body.get("kind") == "patchlife-gpu-checks" and not body.get("tiny"):
            checks[str(path.relative_to(folder))] = body
    return checks


def _draw(result: Result, path: Path) -> None:
    from patchlife.benchmarks.plots import plot

    content = io.BytesIO()
    plot(result).save(content, format="png", optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content.getvalue())


def main(argv: list[str] | None = None) -> int:
    """Write the page, or compare it with --check; the working directory is the repository."""
    check = "--check" in (sys.argv[1:] if argv is None else argv)
    folder, out = Path("results"), Path("docs/results.md")
    results = load_all(folder)
    content = page(results, load_checks(folder))
    if not check:
        shown = _shown(results)
        if shown and _drawn(results[shown[0][0]]):
            _draw(results[shown[0][0]], out.parent / _PICTURE)
        print(write_atomic(out, content))
        return 0
    if out.exists() and out.read_text("utf-8") == content:
        return 0
    print(f"{out} does not match the files in {folder}/; run: python bench/results_page.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
