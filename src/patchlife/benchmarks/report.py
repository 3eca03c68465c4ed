"""Reports of results: text for the terminal, one HTML page, and one PNG for each result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..io.files import write_atomic
from ..visual import html
from .plots import plot
from .result import Result
from .tables import (
    Table,
    advice_lines,
    findings,
    is_ours,
    main_table,
    speed_table,
    target_rows,
    title_of,
    within_max_drop_table,
)

__all__ = ["conditions_line", "text_report", "write_report"]


def write_report(results: Mapping[str, Result], stem: Path) -> Path:
    """Write ``stem``.html, and one PNG for each result beside it; returns the path of the page."""
    import io

    sections: list[html.Section] = []
    for name, result in results.items():
        picture = plot(result)
        stream = io.BytesIO()
        picture.save(stream, "PNG", optimize=True)
        suffix = "" if len(results) == 1 else f"-{name}"
        write_atomic(stem.with_name(f"{stem.name}{suffix}.png"), stream.getvalue())
        sections += _sections(name, result, picture)
    return html.save_page(stem.with_name(stem.name + ".html"), "Methods side by side", sections)


def _sections(name: str, result: Result, picture: object) -> list[html.Section]:
    parts = [html.heading(f"{result.model} ({result.weights} weights)"), html.note(conditions_line(result))]
    if not result.complete:
        parts.append(html.paragraph("This run was interrupted. The report holds what was measured before."))
    parts.append(html.figure(picture, _caption(result), lossless=True))  # type: ignore[arg-type]
    parts += [
        html.table(*main_table(result, target), caption=f"At {target:g} of the dense FLOPs.")
        for target in result.targets
    ]
    parts += [html.paragraph(text) for text in findings(result)]
    parts += [html.paragraph(f"Advice, {text}") for text in advice_lines(result)]
    parts += [html.table(*within_max_drop_table(e), caption=_candidates_caption(e)) for e in result.within_max_drop]
    parts.append(html.heading("Every measurement"))
    for batch in result.batches:
        for target in result.targets:
            caption = f"Batch {batch}, {target:g} of the dense FLOPs."
            parts.append(html.table(*speed_table(result, batch, target), caption=caption))
    if target_rows(result)[1]:
        parts.append(html.table(*target_rows(result), caption="Ours against the no-decision bound and against others."))
    parts.append(html.table(*methods_table(result), caption=f"The methods. Numbers: {name}.json."))
    return parts


def methods_table(result: Result) -> Table:
    """A row for each method: source, and what was trained."""
    columns = ["method", "source", "trained for this run"]
    return columns, [[m.title, m.source, m.training] for m in result.methods.values()]


def conditions_line(result: Result) -> str:
    """The conditions of a run in one line."""
    c = result.conditions
    parts = [f"{c.get('device')} ({c.get('cpu')})" if c.get("device") == "cpu" else str(c.get("device"))]
    parts += [f"{c.get('threads')} threads", str(c.get("dtype")), f"engine {c.get('engine')}"]
    parts += [f"{name} {c[name]}" for name in ("onnxruntime", "openvino") if name in c]
    parts += [f"malloc {c['malloc']}"] if "malloc" in c else []
    parts += [f"torch {c.get('torch')}", f"timm {c.get('timm')}", f"load {c.get('load')} at the start"]
    if result.speed:
        parts.append(f"timed on {c.get('images')}, methods in turn, up to {c.get('rounds')} rounds, medians")
    if result.data:
        parts.append(f"top-1 on {result.data['photos']} photos of {result.photos_of}")
        parts += [f"{result.data['unreadable']} unreadable"] if result.data["unreadable"] else []
    return f"{', '.join(parts)}; {c.get('date')}."


def text_report(result: Result) -> str:
    """Text for the terminal: a table for each target, then findings, advice and methods left out."""
    parts = [f"{result.model}, {result.weights} weights", conditions_line(result)]
    for target in result.targets:
        parts += ["", f"at {target:g} of the dense FLOPs", _aligned(main_table(result, target))]
    parts += ["", *findings(result)] if findings(result) else []
    parts += [f"Advice, {text}" for text in advice_lines(result)]
    left_out = {(row.method, row.left_out) for row in result.speed if row.left_out}
    left_out |= {(row.method, row.left_out) for row in result.accuracy if row.left_out}
    parts += [f"left out: {title_of(result, name)}: {why}" for name, why in sorted(left_out)]
    return "\n".join(parts)


def _caption(result: Result) -> str:
    ours = any(is_ours(result, name) for name in result.methods)
    return "Thick lines: ours. Dashed lines: other methods and controls." if ours else "All methods."


def _candidates_caption(entry: dict) -> str:
    return f"Schedules timed at batch {entry['batch']}, for at most {entry['max_drop']:g} points of top-1 lost."


def _aligned(table: Table) -> str:
    columns, rows = table
    widths = [max(len(cells[i]) for cells in (columns, *rows)) for i in range(len(columns))]
    lines = []
    for cells in (columns, *rows):
        first, *rest = (
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines)
