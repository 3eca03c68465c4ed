"""The parts of the page, as HTML and SVG without scripts: a hovered patch is shown by style sheets alone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import torch
from torch import Tensor

from ..data import Preprocess
from ..visual import draw, strip
from ..visual.html import data_uri
from .explorer import Answer, View
from .folder import FolderCurve

__all__ = ["STYLE", "answers", "bars", "curve", "life_map", "message", "numbers", "strips"]

STYLE = """
.pl { font-variant-numeric: tabular-nums; line-height: 1.45; }
.pl svg, .pl img { width: 100%; height: auto; display: block; border-radius: 4px; background: #fff; }
.pl .wide { overflow-x: auto; }
.pl .wide img { min-width: 640px; }
.pl .cell { fill: transparent; }
.pl .merge { fill: none; stroke: #fff; stroke-width: 2.5; visibility: hidden; pointer-events: none; }
.pl .under { stroke: #111; stroke-width: 5; opacity: .55; }
.pl .all .merge:not(.source) { visibility: visible; stroke-width: 1.2; opacity: .8; }
.pl .all .under:not(.source) { stroke-width: 2.4; opacity: .3; }
.pl .patch:hover .merge { visibility: visible !important; stroke-width: 2.5; opacity: 1; }
.pl .patch:hover .cell { stroke: #fff; stroke-width: 2.5; fill: rgba(255, 255, 255, .25); }
.pl table, .pl tr, .pl th, .pl td { border: 0 !important; background: none !important; }
.pl table { border-collapse: collapse; width: 100%; margin: 0; }
.pl tr { border-bottom: 1px solid rgba(128, 128, 140, .3) !important; }
.pl th, .pl td { padding: .3rem .4rem; text-align: left; font-size: .95em; }
.pl .right { text-align: right; white-space: nowrap; }
.pl .changed { color: #b3261e; font-weight: 600; }
.pl .soft { opacity: .75; font-size: .9em; }
.pl .message { padding: .7rem .9rem; border: 1px solid #b3261e; border-radius: 6px; }
.pl text { font: 11px system-ui, sans-serif; fill: currentColor; }
.pl .plot { background: none; }
@media (prefers-color-scheme: dark) { .pl .changed { color: #ff8a80; } }
.dark .pl .changed { color: #ff8a80; }
"""

_WIDTH = 440  # of the life map, in its own pixels
_MOST_CELLS = 1100  # more patches than this are not drawn one by one: the page would be slow
_BAR, _HEIGHT = 34, 150


def message(text: str) -> str:
    """A message for the reader, such as that a photo cannot be read."""
    return _panel(f'<div class="message" role="alert">{escape(text)}</div>')


# ---- one photo


def life_map(view: View, preprocess: Preprocess, all_lines: bool = False) -> str:
    """The life map of the photo; over each patch its numbers, and lines to where it is merged.

    ``all_lines``: show the lines of all patches, not only of the hovered one.
    """
    picture = draw(view.photo.picture, view.lives, preprocess=preprocess, width=_WIDTH)
    height = max(round(_WIDTH * preprocess.size[0] / preprocess.size[1]), 1)  # without the legend below
    cells = _cells(view, _WIDTH, height) if view.lives.life.shape[1] <= _MOST_CELLS else ""
    kept = int((view.lives.life[0] >= view.lives.depth).sum())
    label = f"Life map: {kept} of {view.lives.life.shape[1]} patches take part in all {view.lives.depth} blocks"
    return _panel(
        f'<svg viewBox="0 0 {picture.width} {picture.height}" role="img" aria-label="{label}" '
        f'data-budget="{view.budget:g}">'
        f'<image href="{data_uri(picture)}" width="{picture.width}" height="{picture.height}"/>'
        f'<g class="{"all" if all_lines else "one"}">{cells}</g></svg>'
    )


def _cells(view: View, width: int, height: int) -> str:
    """A rectangle for each patch with its text, and the line to where it is merged."""
    rows, cols = view.lives.grid
    wide, high = width / cols, height / rows
    life = view.lives.life[0].tolist()
    found = []
    paths = {patch: view.merges.path(patch) for patch in view.merges.target}
    merged_into: dict[int, list[list[int]]] = {}
    for path in paths.values():
        merged_into.setdefault(path[-1], []).append(path)
    for patch in range(rows * cols):
        row, col = divmod(patch, cols)
        if patch in paths:
            line = _line([paths[patch]], "merge", wide, high, cols)
        else:
            line = _line(merged_into.get(patch, []), "merge source", wide, high, cols)
        found.append(
            f'<g class="patch"><rect class="cell" x="{col * wide:.1f}" y="{row * high:.1f}" width="{wide:.1f}" '
            f'height="{high:.1f}"/>{line}<title>{_patch_text(patch, cols, life, view)}</title></g>'
        )
    return "".join(found)


def _line(paths: Sequence[Sequence[int]], kind: str, wide: float, high: float, cols: int) -> str:
    """Lines through the centres of patches, white on a dark edge."""
    steps = ["L".join(f"{(p % cols + 0.5) * wide:.0f} {(p // cols + 0.5) * high:.0f}" for p in path) for path in paths]
    if not steps:
        return ""
    drawn = "M" + "M".join(steps)
    return f'<path class="{kind} under" d="{drawn}"/><path class="{kind}" d="{drawn}"/>'


def _patch_text(patch: int, cols: int, life: Sequence[float], view: View) -> str:
    depth, place = view.lives.depth, f"row {patch // cols + 1}, column {patch % cols + 1}"
    if life[patch] >= depth:
        return f"{place}: in all {depth} blocks"
    text = f"{place}: in {life[patch]:g} of {depth} blocks"
    if (target := view.merges.target.get(patch)) is not None:
        where = f"row {target // cols + 1}, column {target % cols + 1}"
        text += f", then merged into {where} with weight {view.merges.weight[patch]:.2f}"
    return text


def strips(view: View, preprocess: Preprocess) -> str:
    """The patches that enter five of the blocks."""
    picture = strip(view.photo.picture, view.lives, preprocess=preprocess, width=150)
    kept = ", ".join(map(str, view.lives.kept[0].tolist()))
    label = f"Patches that enter each block: {kept}"
    return _panel(f'<div class="wide"><img src="{data_uri(picture)}" alt="{label}"></div>')


def bars(view: View) -> str:
    """How many patches enter each block, as bars."""
    kept, top = view.lives.kept[0].tolist(), view.lives.life.shape[1]
    width, parts = _BAR * len(kept), []
    for block, count in enumerate(kept):
        high = (_HEIGHT - 40) * count / top
        x, y = block * _BAR, _HEIGHT - 20 - high
        parts.append(
            f'<rect x="{x + 4}" y="{y:.1f}" width="{_BAR - 8}" height="{high:.1f}" rx="2" fill="#a4469e"/>'
            f'<text x="{x + _BAR / 2}" y="{y - 4:.1f}" text-anchor="middle">{count}</text>'
            f'<text x="{x + _BAR / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{block}</text>'
        )
    label = f"Kept patches per block: {', '.join(map(str, kept))}"
    return _panel(
        f'<svg class="plot" viewBox="0 0 {width} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
        '<div class="soft">patches that enter each block</div>'
    )


def answers(view: View, names: Sequence[str], top: int = 5) -> str:
    """The most probable classes of the dense and the slimmed model side by side; a changed first one is marked."""
    dense, slimmed = view.dense, view.answer
    if not names:
        cosine = "" if dense is None else f"cosine to the dense embedding: {_cosine(dense, slimmed):.4f}"
        return _panel(f"<div>{cosine or 'an embedding; there is no dense model to compare with'}</div>")
    own = _top(slimmed.output, names, top)
    if dense is None:
        rows = "".join(f"<tr>{_answer_cells(*row)}</tr>" for row in own)
        return _panel(f'<table><tr><th>slimmed</th><th class="right">%</th></tr>{rows}</table>')
    theirs = _top(dense.output, names, top)
    changed = own[0][0] != theirs[0][0]
    rows = "".join(
        f"<tr>{_answer_cells(*before)}{_answer_cells(*after, changed=changed and place == 0)}</tr>"
        for place, (before, after) in enumerate(zip(theirs, own, strict=True))
    )
    text = "the answer changed" if changed else "the same answer"
    style = "changed" if changed else "soft"
    return _panel(
        '<table><tr><th>dense</th><th class="right">%</th><th>slimmed</th><th class="right">%</th></tr>'
        f'{rows}</table><div class="{style}">{text}; KL divergence {view.divergence:.4f}</div>'
    )


def _top(probabilities: Tensor, names: Sequence[str], top: int) -> list[tuple[str, float]]:
    values, classes = probabilities.topk(min(top, len(names)))
    return [(names[int(c)], float(v)) for v, c in zip(values, classes, strict=True)]


def _answer_cells(name: str, probability: float, changed: bool = False) -> str:
    style = ' class="changed"' if changed else ""
    return f'<td{style}>{escape(name)}</td><td class="right">{100 * probability:.1f}</td>'


def _cosine(one: Answer, other: Answer) -> float:
    return torch.cosine_similarity(one.output, other.output, dim=0).item()


def numbers(view: View) -> str:
    """FLOPs and time of both models."""
    own, dense = view.answer, view.dense
    rows = [("FLOPs", f"{view.dense_flops / 1e9:.2f} G", f"{own.flops / 1e9:.2f} G", own.flops / view.dense_flops)]
    if dense is not None:
        seconds = f"{1000 * dense.seconds:.1f} ms", f"{1000 * own.seconds:.1f} ms"
        rows.append(("time, one photo", *seconds, own.seconds / dense.seconds))
    else:
        rows.append(("time, one photo", "", f"{1000 * own.seconds:.1f} ms", float("nan")))
    cells = "".join(
        f'<tr><td>{name}</td><td class="right">{before}</td><td class="right">{after}</td>'
        f'<td class="right">{"" if ratio != ratio else f"{ratio:.2f}"}</td></tr>'
        for name, before, after, ratio in rows
    )
    threads = torch.get_num_threads()
    return _panel(
        '<table><tr><th></th><th class="right">dense</th><th class="right">slimmed</th><th class="right">of dense'
        f"</th></tr>{cells}</table>"
        f'<div class="soft">Times: medians of up to three calls, in turns, with this photo alone, {threads} '
        f"thread{'' if threads == 1 else 's'}; larger batches save more. Other work on this machine changes them.</div>"
    )


# ---- a folder


def curve(found: FolderCurve) -> str:
    """The measure of a folder against the budget, as a plot and a table."""
    budgets = sorted(found.values)
    low = min([*found.values.values(), *([found.dense] if found.dense is not None else [])])
    bottom = max(value for value in (0.0, 0.2, 0.4, 0.6, 0.8, 0.9) if value <= max(low - 0.01, 0.0))
    width, height, left, below = 560, 260, 44, 34

    def place(budget: float, value: float) -> tuple[float, float]:
        across = (budget - budgets[0]) / max(budgets[-1] - budgets[0], 1e-9)
        up = (value - bottom) / max(1.0 - bottom, 1e-9)
        return left + across * (width - left - 16), (height - below) * (1 - up) + 8

    grid = "".join(
        f'<line x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" opacity=".18"/>'
        f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>'
        for value, y in ((v, place(budgets[0], v)[1]) for v in (bottom + i * (1 - bottom) / 4 for i in range(5)))
    )
    points = [place(budget, found.values[budget]) for budget in budgets]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#a4469e"/>' for x, y in points)
    marks = "".join(
        f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{budget:g}</text>'
        for budget, (x, _) in zip(budgets, points, strict=True)
    )
    dense = ""
    if found.dense is not None:
        y = place(budgets[0], found.dense)[1]
        dense = (
            f'<line x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" stroke-dasharray="5 4"/>'
        )
    rows = "".join(
        f'<tr><td>{budget:g}</td><td class="right">{found.values[budget]:.3f}</td>'
        + (f'<td class="right">{abs(found.divergences[budget]):.4f}</td></tr>' if found.divergences else "</tr>")
        for budget in budgets[::-1]
    )
    divergence = '<th class="right">KL from dense</th>' if found.divergences else ""
    note = f"{found.photos} photos" + (f"; dense model {found.dense:.3f} (dashed)" if found.dense is not None else "")
    unread = "".join(f"<li>{escape(text)}</li>" for text in found.unread[:20])
    return _panel(
        f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{found.measure} against the budget">'
        f'{grid}{dense}<polyline points="{line}" fill="none" stroke="#a4469e" stroke-width="2"/>{dots}{marks}</svg>'
        f'<div class="soft">{note}</div>'
        f'<table><tr><th>budget</th><th class="right">{found.measure}</th>{divergence}</tr>{rows}</table>'
        + (f'<div class="soft">not read:<ul>{unread}</ul></div>' if unread else "")
    )


def _panel(inner: str) -> str:
    return f'<div class="pl">{inner}</div>'
