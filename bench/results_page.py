"""``docs/results.md`` from the result files, and nothing else: ``python bench/results_page.py``.

With ``--check`` it writes nothing and fails if the page is not what the files say. Only the newest run of a kind
(model, weights, engine, number format, device, photos) is shown; older ones are named, for files are never changed or
deleted.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patchlife.benchmarks.report import conditions_line, methods_table
from patchlife.benchmarks.result import Result, load_all
from patchlife.benchmarks.tables import Table, advice_lines, findings, main_table, target_rows, title_of
from patchlife.io.files import write_atomic

__all__ = ["main", "page"]

_PICTURE = "images/results.png"

_INTRODUCTION = """# Results

Generated from the JSON files in `results/` by `python bench/results_page.py`; a test fails when this page
is not what they say. Do not edit it.

**How to read it.** All methods run on the same backbone, in the same process, taking turns; numbers are medians over
the rounds, with how many times as fast as the dense model in brackets (pair by pair: the dense model runs right before
or after each method, for a shared machine's speed can change within one round). Methods are set to equal FLOPs; the
FLOPs column is what was executed. *limit* is our schedule's slices with nothing decided: nothing on that schedule can
be faster. *random* drops patches at random. Where a method has to be trained and was not, only its speed is given. A
ratio whose 90th percentile is more than 1.5 times its 10th is called too noisy, and no number is given. Every method
was written by us from its paper, on the same blocks; nothing here reproduces a published number."""


def page(results: Mapping[str, Result], checks: Mapping[str, dict[str, Any]]) -> str:
    """The page, from results and GPU checks by file name."""
    parts, shown = [_INTRODUCTION], _shown(results)
    if shown and _drawn(results[shown[0][0]]):
        parts.append(f"![Top-1 against images per second and against FLOPs, a line a method]({_PICTURE})")
    for first, *older in shown:
        parts += _section(first, results[first], older)
    if not results:
        parts.append("No run has been committed yet.")
    parts += _gpu(checks)
    parts += _methods([results[first] for first, *_ in shown])
    return "\n\n".join(parts) + "\n"


def _shown(results: Mapping[str, Result]) -> list[list[str]]:
    """File names: a list a kind, in the page's order, the newest of a kind first."""
    newest: dict[tuple, list[str]] = {}
    for name, result in sorted(results.items(), key=lambda item: (str(item[1].conditions.get("date")), item[0])):
        newest.setdefault(_kind(result), []).insert(0, name)
    return sorted(newest.values(), key=lambda names: _place(results[names[0]]))


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


def _place(result: Result) -> tuple:
    """Accuracy and speed first, then speed alone, then accuracy alone; by what they ran on and by name."""
    c = result.conditions
    return not result.speed, not result.accuracy, str(c.get("device")), result.model, str(c.get("engine"))


def _section(name: str, result: Result, older: list[str]) -> list[str]:
    engine = result.conditions.get("engine")
    what = f"{engine}, {result.conditions.get('device')}" if result.speed else f"top-1 on {result.photos_of}"
    parts = [f"## {result.model}, {what}", conditions_line(result)]
    parts[-1] += f" Weights: {result.weights}. Numbers: `{name}`."
    parts.append(f"Command: `{result.conditions.get('command')}`")
    if not result.complete:
        parts.append("**This run was interrupted**; what follows is what it had measured by then.")
    for target in result.targets:
        parts += [f"### At {target:g} of the dense FLOPs", _markdown(main_table(result, target))]
    parts.append("### Where ours is not the best")
    said = findings(result)
    parts.append("\n".join(f"- {text}" for text in said) if said else "Nowhere, in the rows above.")
    columns, rows = target_rows(result)
    if rows:
        parts += ["### Ours against the limit and against others", _markdown((columns, rows))]
    if lines := [f"- {text[0].upper()}{text[1:]}" for text in advice_lines(result)]:
        parts += ["### Which schedule, measured here", "\n".join(lines)]
    left_out = {(r.method, r.left_out) for r in result.speed if r.left_out}
    left_out |= {(r.method, r.left_out) for r in result.accuracy if r.left_out}
    if left_out:
        lines = [f"- {title_of(result, method)}: {why}" for method, why in sorted(left_out)]
        parts += ["### Left out", "\n".join(lines)]
    if older:
        parts.append("Earlier runs of the same: " + ", ".join(f"`{n}`" for n in older) + ".")
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
        text += (
            f"checks within 1e-5 of the slow reference; copy {ceilings['copy_gb_per_s']:.0f} GB/s, bfloat16 products "
        )
        text += f"{ceilings['bf16_matmul_tflops']:.0f} TFLOP/s."
        text += "".join(f" **Not exact: {e['what']} ({e['apart']:.1e}).**" for e in wrong)
        text += " Left out for lack of time: " + "; ".join(check["left_out"]) + "." if check["left_out"] else ""
        parts.append(text)
    return parts


def _methods(results: Sequence[Result]) -> list[str]:
    rows: dict[tuple, list[str]] = {}
    columns: list[str] = []
    for result in results:
        columns, some = methods_table(result)
        rows |= {tuple(row): row for row in some}
    return ["## The methods", _markdown((columns, list(rows.values())))] if rows else []


def _markdown(table: Table) -> str:
    columns, rows = table
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)


def load_checks(folder: Path) -> dict[str, dict[str, Any]]:
    """GPU checks under ``folder``, by their path in it; rehearsals do not count."""
    found = {}
    for path in sorted(folder.rglob("checks.json")):
        body = json.loads(path.read_text("utf-8"))
        if body.get("kind") == "patchlife-gpu-checks" and not body.get("tiny"):
            found[str(path.relative_to(folder))] = body
    return found


def _draw(result: Result, path: Path) -> None:
    from patchlife.benchmarks.plots import plot

    content = io.BytesIO()
    plot(result).save(content, format="png", optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content.getvalue())


def main(argv: list[str] | None = None) -> int:
    """Write the page, or with --check compare; run it in the repository."""
    words = sys.argv[1:] if argv is None else argv
    check = "--check" in words
    folder, out = Path("results"), Path("docs/results.md")
    results = load_all(folder)
    wanted = page(results, load_checks(folder))
    if not check:
        shown = _shown(results)
        if shown and _drawn(results[shown[0][0]]):
            _draw(results[shown[0][0]], out.parent / _PICTURE)
        print(write_atomic(out, wanted))
        return 0
    if out.exists() and out.read_text("utf-8") == wanted:
        return 0
    print(f"{out} is not what {folder}/ says; run: python bench/results_page.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
