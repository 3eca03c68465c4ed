"""The curve of ``patchlife eval``: accuracy and KL divergence against the budget, with the points of other methods."""

from __future__ import annotations

import glob
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import EvalConfig
from ..errors import ConfigError
from ..io.files import write_atomic
from .common import say

if TYPE_CHECKING:
    from PIL import Image

    from ..visual.plots import Panel

__all__ = ["Curves", "draw_curves", "read_points", "within_reach", "write_curve"]

_BENCH = "patchlife-bench"  # the kind of a result file of bench

Curves = Mapping[str, Sequence[Mapping[str, Any]]]
"""Scores of each curve by its label, as in the JSON file of eval: ``fraction`` of the dense FLOPs, and measures."""


class _Measure(NamedTuple):
    name: str  # the field of a score
    axis: str
    factor: float
    dense: Callable[[Mapping[str, Any]], float | None]  # the dense model's value, in the unit of the axis
    from_zero: bool = False


_TOP1 = _Measure("top1", "top-1, %", 100, lambda score: 100 * (score["top1"] + score["drop"]))
_AGREEMENT = _Measure("agreement", "same class as the dense model, %", 100, lambda score: 100)
_DIVERGENCE = _Measure("divergence", "KL divergence from the dense model, nats", 1, lambda score: None, True)
_NEIGHBOURS = _Measure("knn", "accuracy of nearest neighbours, %", 100, lambda score: 100 * score["dense_knn"])
_COSINE = _Measure("cosine", "cosine to the dense embedding", 1, lambda score: 1)
_PRECISION = _Measure(
    "mean_average_precision",
    "mean average precision, %",
    100,
    lambda score: 100 * (score["mean_average_precision"] + score["drop"]),
)


# ---- budgets


def within_reach(config: EvalConfig, attempt: Callable[[float], object]) -> EvalConfig:
    """``config`` without the budgets at which ``attempt`` fails, if a curve is drawn; they are named on stderr.

    Raises ConfigError if no budget is left, and that of ``attempt`` if no curve is drawn.
    """
    budgets, reason = [], ""
    for budget in config.budgets:
        try:
            attempt(budget)
            budgets.append(budget)
        except ConfigError as error:
            if config.curve is None:
                raise
            reason = reason or str(error)
    if not budgets:
        raise ConfigError(f"none of the budgets of the curve can be reached: {reason}")
    if left_out := [f"{budget:g}" for budget in config.budgets if budget not in budgets]:
        say(f"left out of the curve: budget {', '.join(left_out)} ({reason})")
    return replace(config, budgets=tuple(budgets))


# ---- points of other results


def read_points(patterns: Sequence[Path], model: str, data: Path, photos: int) -> dict[str, list[dict[str, Any]]]:
    """The scores in result files of bench and eval, by label; a label that an earlier file has gets the file's path.

    Args:
        patterns: files, or glob patterns of them.
        model: the backbone's name. data: the folder of the photos. photos: their number, with unreadable ones.

    Raises:
        ConfigError: a file that is no such result, or is of another model or of other photos.
    """
    curves: dict[str, list[dict[str, Any]]] = {}
    for path in [Path(name) for pattern in patterns for name in sorted(glob.glob(str(pattern))) or [str(pattern)]]:
        body = _read(path)
        folder, count, found = _points_of_bench(body) if body.get("kind") == _BENCH else _points_of_eval(body, path)
        expected = (model, data.resolve().name, photos)
        if (got := (body["model"], Path(folder).resolve().name, count)) != expected:
            raise ConfigError(
                f"--points {path} must be of the same model and photos, expected {_conditions(*expected)}, got "
                f"{_conditions(*got)}; measure it again"
            )
        curves |= {f"{label} ({path})" if label in curves else label: scores for label, scores in found.items()}
    return curves


def _conditions(model: str, folder: str, photos: int) -> str:
    return f"{model} on {photos} photos of {folder}"


def _read(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--points {path} is not a result file of patchlife bench or eval: {error}") from None
    if not isinstance(body, dict) or not (
        (body.get("kind") == _BENCH and body.get("data") and body.get("accuracy")) or body.get("scores")
    ):
        raise ConfigError(
            f"--points {path} has no accuracy; give a file of patchlife bench --data, or of patchlife eval --out"
        )
    return body


def _points_of_bench(body: dict[str, Any]) -> tuple[str, int, dict[str, list[dict[str, Any]]]]:
    """(folder of the photos, number of photos, scores by title of the method); the dense model is left out."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in body["accuracy"]:
        info = body["methods"].get(row["method"], {})
        title = info.get("title", row["method"])
        if row["left_out"]:
            say(f"left out of the curve: {title} at {row['target']:g} ({row['left_out']})")
        elif row["method"] != "dense":
            measures = {"top1": row["right"] / row["photos"], "agreement": row["agreeing"] / row["photos"]}
            score = {"fraction": row["flops"], "divergence": row.get("divergence"), **measures}
            curves.setdefault(title, []).append(score)
    return body["data"]["folder"], body["data"]["photos"], curves


def _points_of_eval(body: dict[str, Any], path: Path) -> tuple[str, int, dict[str, list[dict[str, Any]]]]:
    """(folder of the photos, number of photos, scores by name of the file and mode)."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for score in body["scores"]:
        curves.setdefault(f"{path.stem}, {score['mode']}", []).append(score)
    return body["data"], body["photos"] + len(body["failures"]), curves


# ---- the picture


def draw_curves(curves: Curves, points: Curves, title: str) -> Image.Image:
    """``curves`` of this model, and ``points`` of others: a panel for each measure."""
    from ..visual.plots import plot_panels

    return plot_panels([_panel(measure, curves, points) for measure in _measures(curves)], title)


def _measures(curves: Curves) -> list[_Measure]:
    score = next(iter(curves.values()))[0]
    if "mean_average_precision" in score:
        return [_PRECISION]
    if "cosine" in score:
        return [_COSINE] if score["knn"] is None else [_NEIGHBOURS, _COSINE]
    return [_AGREEMENT if score["top1"] is None else _TOP1, _DIVERGENCE]


def _panel(measure: _Measure, curves: Curves, points: Curves) -> Panel:
    from ..visual.plots import Panel, Point

    drawn: dict[str, list[Point]] = {}
    for label, scores in [*curves.items(), *points.items()]:
        known = [score for score in scores if score.get(measure.name) is not None]
        drawn[label] = [
            Point(score["fraction"], measure.factor * score[measure.name], _half_interval(score, measure))
            for score in known
        ]
    dense = measure.dense(next(iter(curves.values()))[0])
    return Panel(measure.axis, drawn, dense, tuple(points), measure.from_zero)


def _half_interval(score: Mapping[str, Any], measure: _Measure) -> float:
    interval = score.get("drop_interval") if measure.name in ("top1", "knn") else None
    return measure.factor * (interval[1] - interval[0]) / 2 if interval else 0.0


def write_curve(out: Path, picture: Image.Image, result: Mapping[str, Any], curves: Curves, points: Curves) -> None:
    """Write the picture (.png), or a page with picture, table and conditions (.html)."""
    if out.suffix == ".png":
        stream = io.BytesIO()
        picture.save(stream, "PNG", optimize=True)
        write_atomic(out, stream.getvalue())
        return
    from ..visual import html

    measures = _measures(curves)
    rows = [
        [label, f"{score['fraction']:.3f}", *(_cell(score, measure) for measure in measures)]
        for label, scores in [*curves.items(), *points.items()]
        for score in scores
    ]
    columns = ["", "FLOPs / dense FLOPs", *(measure.axis for measure in measures)]
    caption = f"{result['photos']} photos of {Path(result['data']).name}"
    sections = [
        html.figure(picture, "Solid: this model. Dashed: other results. Bars: 95 % interval.", lossless=True),
        html.table(columns, rows, caption),
        html.note(json.dumps(result["conditions"])),
    ]
    html.save_page(out, f"{result['model']} by budget", sections)


def _cell(score: Mapping[str, Any], measure: _Measure) -> str:
    value = score.get(measure.name)
    if value is None:
        return ""
    return f"{100 * value:.1f}" if measure.factor == 100 else f"{value:.4f}"
