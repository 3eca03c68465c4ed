"""The section of a fit's report on budgets: how close the slimmed model is to the dense one from budget 0.3 to 1.0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..config import CURVE_BUDGETS
from ..slimming import SlimModel
from ..visual.html import Section, figure, heading, table
from ..visual.plots import Panel, Point, plot_panels
from .cached_evaluation import CachedDenseScore, CachedEmbeddingScore, CachedScore, Score, measured
from .dense import DenseTarget
from .target_cache import TargetCache

__all__ = ["agreements", "budget_sections"]


def budget_sections(
    model: SlimModel,
    held_out: TargetCache,
    validation: Mapping[str, TargetCache] | None = None,
    dense: DenseTarget | None = None,
) -> list[Section]:
    """A picture and a table for each of the labelled ``validation`` sets; without any, for the held-out photos."""
    sets = {f"the validation photos {name}": cache for name, cache in (validation or {}).items()}
    sections = [heading("Accuracy by budget" if sets else "Agreement with the dense model by budget")]
    for name, cache in (sets or {"photos that were not trained on": held_out}).items():
        if len(cache):
            sections += _sections(name, agreements(model, cache, dense), len(cache), labelled=bool(sets))
    return sections if len(sections) > 1 else []


@torch.no_grad()
def agreements(
    model: SlimModel, photos: TargetCache, dense: DenseTarget | None = None
) -> list[tuple[float, float, Score]]:
    """(budget, fraction of the dense FLOPs, score) in fixed mode, from budget 1.0 down to the last one in reach."""
    rows = []
    with model.temporarily(mode="fixed"):
        for budget in model.in_reach(CURVE_BUDGETS):
            model.set_budget(budget)
            cost, kept = model.cost(photos.image_size), model.schedule(photos.image_size).kept
            rows.append((budget, cost.total(kept) / cost.dense, measured(model, photos, dense)))
    return rows


class _Measure(NamedTuple):
    name: str  # with the unit: title of a column, label of an axis
    value: float
    digits: int
    dense: float | None = None  # the dense model's value
    from_zero: bool = False
    drawn: bool = True


def _sections(name: str, rows: list[tuple[float, float, Score]], photos: int, labelled: bool) -> list[Section]:
    scores = [_measures(score, labelled) for _, _, score in rows]
    missing = [f"{budget:g}" for budget in CURVE_BUDGETS if budget not in [row[0] for row in rows]]
    unreachable = f" Budgets out of reach: {', '.join(missing)}." if missing else ""
    panels = [
        Panel(
            first.name,
            {"slimmed model": [Point(row[1], score[at].value) for row, score in zip(rows, scores, strict=True)]},
            first.dense,
            from_zero=first.from_zero,
        )
        for at, first in enumerate(scores[0])
        if first.drawn
    ]
    cells = [
        [f"{budget:g}", f"{cost:.3f}", *(f"{measure.value:.{measure.digits}f}" for measure in score)]
        for (budget, cost, _), score in zip(rows, scores, strict=True)
    ]
    title = f"Slimmed model in fixed mode against the dense model on {photos} of {name}"
    return [
        figure(plot_panels(panels, f"{photos} photos"), f"{title}, by budget.{unreachable}", lossless=True),
        table(["budget", "FLOPs / dense FLOPs", *(measure.name for measure in scores[0])], cells, title),
    ]


def _measures(score: Score, labelled: bool) -> list[_Measure]:
    if isinstance(score, CachedScore):
        top1 = [_Measure("top-1, %", 100 * score.top1, 1, 100 * score.dense_top1)] if labelled else []
        same = _Measure("same class as the dense model, %", 100 * score.agreement, 1, 100, drawn=not labelled)
        return [*top1, same, _Measure("KL divergence, nats", score.kl, 4, from_zero=True)]
    if isinstance(score, CachedEmbeddingScore):
        return _embedding_measures(score)
    return _pixel_measures(score)


def _embedding_measures(score: CachedEmbeddingScore) -> list[_Measure]:
    neighbours = []
    if score.knn is not None and score.dense_knn is not None:
        neighbours = [_Measure("accuracy of nearest neighbours, %", 100 * score.knn, 1, 100 * score.dense_knn)]
    return [
        *neighbours,
        _Measure("cosine to the dense embedding", score.cosine, 4, 1),
        _Measure("its 5 % quantile", score.low_cosine, 4, drawn=False),
    ]


def _pixel_measures(score: CachedDenseScore) -> list[_Measure]:
    pixels = []
    if score.pixel_agreement is not None and score.pixel_kl is not None:
        pixels = [
            _Measure("pixels with the same answer, %", 100 * score.pixel_agreement, 2, 100),
            _Measure("KL divergence, nats per pixel", score.pixel_kl, 4, from_zero=True),
        ]
    return [
        *pixels,
        _Measure("cosine to the dense patch features", score.patch_cosine, 4, 1, drawn=not pixels),
        _Measure("its 5 % quantile", score.low_patch_cosine, 4, drawn=False),
    ]
