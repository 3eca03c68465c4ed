"""Tables and sentences made from results; terminal, HTML and docs share them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..evaluation.threads import threads_text
from ..evaluation.timing import NOISY
from .result import Accuracy, Result, Speed

__all__ = [
    "Table",
    "accuracy_of",
    "advice_lines",
    "findings",
    "is_baseline",
    "main_table",
    "speed_table",
    "target_rows",
    "title_of",
    "within_max_drop_table",
]

Table = tuple[list[str], list[list[str]]]
"""Column names, and rows with a cell for each column."""

CONTROLS = ("dense", "dense-eager", "no-decision-bound", "random")
"""Methods for comparison only: nobody slims a model with them."""


def title_of(result: Result, method: str) -> str:
    """The title of a method in tables."""
    if method == "dense-eager":
        return "dense, eager in torch"
    return result.methods[method].title if method in result.methods else method


def is_ours(result: Result, method: str) -> bool:
    """Whether a method is this project's."""
    return method in result.methods and result.methods[method].ours


def is_baseline(result: Result, method: str) -> bool:
    """Whether a method is another project's, and not a control."""
    return method not in CONTROLS and not is_ours(result, method)


def accuracy_of(result: Result, method: str, target: float) -> Accuracy | None:
    """A method's row at a target; the dense model has one row for all targets."""
    for row in result.accuracy:
        if row.method == method and (row.target == target or method == "dense"):
            return row
    return None


def main_table(result: Result, target: float) -> Table:
    """Accuracy and speed at one target: a row for each method, a column for each batch size."""
    columns = ["method", "FLOPs"]
    columns += ["top-1 %", "as dense %"] if result.accuracy else []
    diverging = any(row.divergence is not None for row in result.accuracy)
    columns += ["KL"] if diverging else []
    columns += [f"images/s, batch {b}" for b in result.batches]
    names = [row.method for row in result.speed if row.target == target]
    names += [row.method for row in result.accuracy if row.target == target or row.method == "dense"]
    rows = []
    for name in dict.fromkeys(names):
        timed = {row.batch: row for row in result.speed if row.method == name and row.target == target}
        evaluated = accuracy_of(result, name, target)
        cells = [title_of(result, name), _fraction([*timed.values(), evaluated])]
        if result.accuracy:
            cells += _accuracy_cells(evaluated)
        if diverging:
            cells.append(_divergence_cell(evaluated))
        rows.append([*cells, *(_throughput_cell(timed.get(b)) for b in result.batches)])
    return columns, rows


def speed_table(result: Result, batch: int, target: float) -> Table:
    """All timing results at one batch size and target."""
    columns = ["method", "setting", "FLOPs", "engine", "ms a batch (p10 to p90)", "images/s", "vs dense (p10 to p90)"]
    columns += ["activations, MB"]
    rows = []
    for row in result.at(batch, target):
        if row.seconds is None or row.ratio is None:
            rows.append([title_of(result, row.method), row.left_out, *[""] * 6])
            continue
        s, r = row.seconds, row.ratio
        time = f"{1000 * s.median:.1f} ({1000 * s.p10:.1f} to {1000 * s.p90:.1f})"
        gain = f"{r.median:.2f}x ({r.p10:.2f}x to {r.p90:.2f}x)"
        rows.append(
            [
                title_of(result, row.method),
                row.knob,
                f"{row.flops:.3f}",
                row.engine,
                "too noisy" if row.noisy else time,
                "too noisy" if row.noisy else _number(row.images_per_second),
                f"too noisy ({r.p10:.2f}x to {r.p90:.2f}x)" if row.noisy else gain,
                "" if row.memory is None else f"{row.memory / 1e6:.1f}",
            ]
        )
    return columns, rows


def target_rows(result: Result) -> Table:
    """Throughput of ours over the no-decision bound, the fastest baseline and ToMe; and time saved over FLOPs saved."""
    columns = ["batch", "FLOPs", "ours, fixed / bound", "ours, no merging / bound", "ours / best baseline"]
    columns += ["ours / ToMe", "time saved / FLOPs saved"]
    rows = []
    for batch in result.batches:
        for target in result.targets:
            by = {row.method: row for row in result.at(batch, target) if row.images_per_second}
            ours = _fastest(by.values(), lambda name: is_ours(result, name))
            baseline = _fastest(by.values(), lambda name: is_baseline(result, name))
            if ours is None:
                continue
            saved = (1 - 1 / _gain(ours)) / (1 - (ours.flops or 0))
            cells = [str(batch), f"{target:g}"]
            cells += [
                _over(by.get("ours-fixed"), by.get("no-decision-bound")),
                _over(by.get("ours-slices"), by.get("no-decision-bound")),
            ]
            cells += [_over(ours, baseline), _over(ours, by.get("tome"))]
            rows.append([*cells, f"{100 * saved:.0f} %"])
    return columns, rows


def advice_lines(result: Result) -> list[str]:
    """The advised schedule, and threads, at each batch size: at each FLOPs target, and within the allowed drop."""
    lines = []
    for e in result.advice:
        where = f"batch {e['batch']}, {e['target']:g} of the FLOPs"
        lines += [f"{where}: {_threads_text(e)}."] if e.get("ms_by_threads") else []
        lines.append(f"{where}: {e['verdict']}.")
    return lines + [
        f"batch {e['batch']}, at most {e['max_drop']:g} points of top-1 lost: {e['verdict']}."
        for e in result.within_max_drop
    ]


def _threads_text(entry: dict[str, Any]) -> str:
    """The best number of threads (see `ThreadTimes`) of the dense and the slimmed model, and all times."""
    parts = []
    for name, times in entry["ms_by_threads"].items():
        best = entry["threads"][name]
        others = ", ".join(f"{ms:g} ms on {n}" for n, ms in times.items() if n != str(best))
        parts.append(f"the {name} model runs best on {threads_text(best)} ({times[str(best)]:g} ms; {others})")
    return f"{', '.join(parts)}; the next line compares them at these numbers"


def within_max_drop_table(entry: dict[str, Any]) -> Table:
    """The schedules timed at one batch size; those that are not faster than dense were not evaluated."""
    columns = ["start", "drops", "FLOPs", "vs dense (p10 to p90)", "top-1 %", "points lost (95 % interval)", ""]
    rows = []
    for row in entry["candidates"]:
        ratio, accuracy = row["ratio"], row["accuracy"]
        cells = [str(row["start"]), ", ".join(map(str, row["drops"])), f"{row['flops']:.3f}"]
        cells.append(f"{ratio['median']:.2f}x ({ratio['p10']:.2f}x to {ratio['p90']:.2f}x)")
        if accuracy is None:
            rows.append([*cells, "", "", "too noisy" if ratio["p90"] > NOISY * ratio["p10"] else "not faster"])
            continue
        low, high = accuracy["interval"]
        cells += [f"{accuracy['top1']:.1f}", f"{accuracy['drop']:.2f} ({low:.2f} to {high:.2f})"]
        rows.append([*cells, "chosen" if row == entry["chosen"] else ""])
    return columns, rows


def findings(result: Result) -> list[str]:
    """One sentence for each comparison, of speed or of top-1, in which one of our methods is not the best."""
    sentences = []
    for batch in result.batches:
        for target in result.targets:
            rows = [r for r in result.at(batch, target) if r.ratio and not r.noisy]
            gains = [(r.method, _gain(r)) for r in rows if r.method not in CONTROLS]
            where = f"Speed, batch {batch}, {target:g} of the FLOPs"
            sentences += _not_best(result, where, gains, lambda v: f"{v:.2f}x dense")
            noisy = [title_of(result, r.method) for r in result.at(batch, target) if r.noisy]
            sentences += [f"{where}: too noisy for {', '.join(noisy)}."] if noisy else []
    for target in result.targets:
        evaluated = [(r.method, r.top1) for r in result.accuracy if r.target == target and r.method not in CONTROLS]
        scores = [(name, top1) for name, top1 in evaluated if top1 is not None]
        sentences += _not_best(result, f"Top-1, {target:g} of the FLOPs", scores, lambda v: f"{v:.1f} %")
    return sentences


def _not_best(result: Result, where: str, scores: list[tuple[str, float]], show: Callable[[float], str]) -> list[str]:
    """One sentence with the best baseline and all of our methods behind it; no sentence if none is behind."""
    baselines = [(name, value) for name, value in scores if is_baseline(result, name)]
    if not baselines:
        return []
    leader, lead = max(baselines, key=lambda pair: pair[1])
    behind = [(name, value) for name, value in scores if is_ours(result, name) and value < lead]
    if not behind:
        return []
    ours = ", ".join(f"{title_of(result, name)} ({show(value)})" for name, value in behind)
    info = result.methods.get(leader)
    untrained = "" if info is None or info.trained else ", untrained: speed only"
    return [f"{where}: {title_of(result, leader)} ({show(lead)}{untrained}) is ahead of {ours}."]


def _fastest(rows: Iterable[Speed], wanted: Callable[[str], bool]) -> Speed | None:
    return max((r for r in rows if wanted(r.method)), key=_gain, default=None)


def _gain(row: Speed) -> float:
    return row.ratio.median if row.ratio else 0.0


def _over(ours: Speed | None, other: Speed | None) -> str:
    """Ratio of throughputs, as the quotient of the two ratios to dense."""
    return f"{_gain(ours) / _gain(other):.2f}" if ours and other else ""


def _fraction(rows: list[Speed | Accuracy | None]) -> str:
    fractions = [row.flops for row in rows if row is not None and row.flops is not None]
    return f"{fractions[-1]:.3f}" if fractions else ""


def _accuracy_cells(row: Accuracy | None) -> list[str]:
    if row is None or row.top1 is None:
        return ["", ""]
    return [f"{row.top1:.1f}", f"{100 * row.agreeing / row.photos:.1f}"]


def _divergence_cell(row: Accuracy | None) -> str:
    return "" if row is None or row.divergence is None else f"{row.divergence:.3f}"


def _throughput_cell(row: Speed | None) -> str:
    if row is None or row.ratio is None:
        return ""
    return "too noisy" if row.noisy else f"{_number(row.images_per_second)} ({row.ratio.median:.2f}x)"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"
