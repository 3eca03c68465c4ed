"""What a fit did, on one page that opens offline: curves, agreement against budget, lives, life maps."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..data import Preprocess
from ..errors import ConfigError
from ..slimming import SlimModel
from ..visual import contact_sheet, draw
from ..visual.html import Section, figure, heading, note, paragraph, save_page, table
from ..visual.plots import new_figure, rendered
from .cached_evaluation import evaluate_cached
from .log import Line, lines_of
from .target_cache import TargetCache

__all__ = ["agreements", "write_report"]

BUDGETS = (1.0, 0.8, 0.6, 0.45)
_MAPS = 12

_Stages = dict[str, list[Line]]


def write_report(
    path: Path,
    model: SlimModel,
    held_out: TargetCache,
    preprocess: Preprocess,
    metrics: Path,
    summary: dict[str, Any],
) -> Path:
    """Write the page; ``held_out`` are photos that nothing was learned from."""
    stages = _stages(metrics, summary["stages"])
    sections: list[Section] = [
        paragraph(
            f"Lives learned from {summary['photos']} photos, without labels unless they were asked for, in "
            f"{summary['seconds']:.0f} s. {len(summary['skipped'])} photos could not be read."
        ),
        heading("Learning"),
        *[figure(picture, caption, lossless=True) for picture, caption in _curves(stages)],
        *[figure(picture, caption, lossless=True) for picture, caption in _validated(stages, summary["validated"])],
    ]
    if len(held_out):
        rows = agreements(model, held_out)
        sections += [
            heading("Against the dense model"),
            table(
                ["budget", "FLOPs", "same answer as dense", "KL, nats"],
                [[f"{b:g}", f"{spent:.3f}", f"{100 * same:.1f} %", f"{kl:.3f}"] for b, spent, same, kl in rows],
                f"{len(held_out)} photos that nothing was learned from; labels are not needed for this",
            ),
            heading("Lives"),
            *_lives(model, held_out, preprocess),
        ]
    sections.append(note(json.dumps(summary["config"] | summary["conditions"])))
    return save_page(path, "What was learned about lives", sections)


@torch.no_grad()
def agreements(model: SlimModel, held_out: TargetCache) -> list[tuple[float, float, float, float]]:
    """(budget, fraction of the dense FLOPs, fraction of equal answers, mean KL divergence) in fixed mode."""
    embedded = model.backbone.embed(model.backbone.blank())
    rows = []
    with model.temporarily(mode="fixed"):
        for budget in BUDGETS:
            try:
                model.set_budget(budget)
            except ConfigError:  # a late start block cannot save that much
                continue
            score = evaluate_cached(lambda tokens: model.resume(tokens, embedded), held_out, embedded.tokens.device)
            cost = model.cost()
            rows.append((budget, cost.total(model.schedule().kept) / cost.dense, score.agreement, score.kl))
    return rows


def _targets(model: SlimModel, held_out: TargetCache) -> tuple[Any, Any]:
    """All targets of some photos, and what an embedding says besides tokens, on the model's device."""
    targets = held_out.targets(range(len(held_out)))
    embedded = model.backbone.embed(model.backbone.blank())
    return type(targets)(*(values.to(embedded.tokens.device) for values in targets)), embedded


@torch.no_grad()
def _lives(model: SlimModel, held_out: TargetCache, preprocess: Preprocess) -> list[Section]:
    targets, embedded = _targets(model, held_out)
    lives = model.decide(targets.tokens, embedded).lives()
    shown = range(min(_MAPS, len(held_out)))
    tiles: list[tuple[Image.Image, str]] = []
    for image in shown:
        path = held_out.photos[image].path
        tiles.append((draw(path, lives[image], preprocess=preprocess, width=220, legend=False), path.name))
    picture = _histogram(model, targets.tokens, embedded)
    return [
        figure(
            picture,
            "How much each patch's life is importance to its image, by mode: the share of patches that outlive each block",
            lossless=True,
        ),
        figure(contact_sheet(tiles, columns=4), f"Life maps at budget {model.config.budget:g}: dark patches die first"),
    ]


def _histogram(model: SlimModel, tokens: torch.Tensor, embedded: Any) -> Image.Image:
    """Patches kept of every block: their spread over the photos in adaptive mode, the one number of fixed mode."""
    with model.temporarily(mode="adaptive"):
        adaptive = model.decide(tokens, embedded).lives()
    with model.temporarily(mode="fixed"):
        fixed = model.decide(tokens, embedded).lives()
    axes, figure_ = _axes()
    blocks = list(range(fixed.depth))
    axes.boxplot(adaptive.kept.cpu().T.tolist(), positions=blocks, showfliers=False)
    axes.plot(blocks, fixed.kept[0].tolist(), "o", label="fixed mode")
    axes.set(xlabel="block", ylabel="patches that enter it", title="Patches kept (boxes: adaptive mode, over photos)")
    axes.legend(frameon=False)
    return rendered(figure_)


def _curves(stages: _Stages) -> list[tuple[Image.Image, str]]:
    """A loss curve for each stage."""
    pictures = []
    for stage, lines in stages.items():
        rows = [line for line in lines if "validation" not in line]
        if not rows:
            continue
        axes, figure_ = _axes()
        names = [name for name in ("loss", "importance", "similarity") if name in rows[0]]
        for name in names:
            axes.plot([row["epoch"] for row in rows], _smooth([row[name] for row in rows]), label=name)
        axes.set(xlabel="epoch", title=stage, yscale="log")
        axes.legend(frameon=False)
        pictures.append((rendered(figure_), f"{stage}: {len(rows)} steps, running mean of 20"))
    return pictures


def _validated(stages: _Stages, sets: Collection[str]) -> list[tuple[Image.Image, str]]:
    """Accuracy on the validated photos for each stage: a line for each set and budget, and the dense model's."""
    pictures = []
    for stage, lines in stages.items():
        seen = sorted((line for line in lines if line.get("validation") in sets), key=lambda line: line["step"])
        if not seen:
            continue
        axes, figure_ = _axes()
        for index, name in enumerate(dict.fromkeys(line["validation"] for line in seen)):
            colour, ours = f"C{index}", [line for line in seen if line["validation"] == name]
            axes.axhline(100 * ours[0]["dense_top1"], color=colour, linestyle=":", label=f"{name}, dense")
            for style, budget in zip(
                ("-", "--"), sorted({line["budget"] for line in ours}, reverse=True), strict=False
            ):
                points = [(line["epoch"], 100 * line["top1"]) for line in ours if line["budget"] == budget]
                axes.plot(*zip(*points, strict=True), style, color=colour, marker=".", label=f"{name} at {budget:g}")
        axes.set(xlabel="epoch", ylabel="top-1, %", title=f"{stage}: photos that nothing is learned from")
        axes.legend(frameon=False, fontsize="small")
        last = seen[-1]
        pictures.append((rendered(figure_), f"{stage}: validated photos, over {last['seconds']:.0f} s of learning"))
    return pictures


def _stages(metrics: Path, names: Sequence[str]) -> _Stages:
    """The lines of each of these stages, in its order."""
    lines = [values for _, values in lines_of(metrics)]
    return {name: [line for line in lines if line["stage"] == name] for name in names}


def _smooth(values: Sequence[float], over: int = 20) -> list[float]:
    return [sum(values[max(0, i - over + 1) : i + 1]) / min(i + 1, over) for i in range(len(values))]


def _axes() -> tuple[Any, Any]:
    figure_ = new_figure(6.4, 3.6)
    axes = figure_.add_subplot()
    axes.grid(alpha=0.3)
    return axes, figure_
