"""The report of a fit, one HTML page: training curves, accuracy or agreement by budget, life maps."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..data import Preprocess
from ..slimming import SlimModel
from ..visual import class_colours, contact_sheet, draw, draw_answers
from ..visual.html import Section, figure, heading, note, paragraph, save_page
from ..visual.layout import stacked
from ..visual.plots import new_figure, rendered
from .budget_curve import budget_sections
from .dense import DenseTarget
from .log import Line, lines_of
from .target_cache import TargetCache
from .targets import target_starts

__all__ = ["write_report"]

_MAPS = 12
_ANSWERS = 6  # photos whose answers are drawn

_IMPORTANCE = {
    False: "how much the later blocks of the dense model read from each patch",
    True: "how wrong the features or answers of the dense model are if its later blocks skip a patch",
}
_StageLines = dict[str, list[Line]]


def write_report(
    path: Path,
    model: SlimModel,
    held_out: TargetCache,
    preprocess: Preprocess,
    metrics: Path,
    summary: dict[str, Any],
    dense: DenseTarget | None = None,
    validation: Mapping[str, TargetCache] | None = None,
) -> Path:
    """Write the page.

    Args:
        path: of the file. model: as trained.
        held_out: photos that were not trained on, with targets of ``dense`` if it is given.
        preprocess: from a photo to the model's input.
        metrics: the log of the training. summary: as in ``fit.json``.
        dense: what is predicted for each patch, for dense prediction.
        validation: labelled photos by name. The curve over budgets is of them; without any, of ``held_out``.
    """
    stages = _stages(metrics, summary["stages"])
    sections: list[Section] = [
        paragraph(
            "The model drops image patches between its blocks to save computation. The life of a patch is the number "
            "of blocks that it takes part in. A small module, the scorer, predicts it once for each image. The budget "
            "is the computation of the slimmed model as a fraction of the dense (unmodified) model."
        ),
        paragraph(
            f"Trained on {summary['photos']} photos in {summary['seconds']:.0f} s. "
            f"{len(summary['skipped'])} photos could not be read and were skipped."
        ),
        heading("Training"),
        paragraph(
            f"Stage regression trains the scorer to predict {_IMPORTANCE[dense is not None]} (importance), and which "
            "patches are similar. Stage slimming, if it was run, trains the later blocks on fewer patches to give the "
            f"{'features' if dense else 'output'} of the dense model."
        ),
        *[figure(picture, caption, lossless=True) for picture, caption in _curves(stages)],
        *[figure(picture, caption, lossless=True) for picture, caption in _validation(stages, summary["validation"])],
    ]
    sections += budget_sections(model, held_out, validation, dense)
    if len(held_out):
        sections += [
            heading("Lives of the patches"),
            *_lives(model, held_out, preprocess),
        ]
        if dense is not None and dense.head is not None:
            sections += [heading("Answers for every pixel"), _answers(model, held_out, preprocess, dense)]
    sections.append(note(json.dumps(summary["config"] | summary["conditions"])))
    return save_page(path, "PatchLife training report", sections)


def _targets(model: SlimModel, held_out: TargetCache) -> tuple[Any, Any]:
    """(targets of all held-out photos, an embedding with image size and rotary tables), on the model's device."""
    targets = held_out.targets(range(len(held_out)))
    embedded = model.backbone.embed(model.backbone.blank(held_out.image_size))
    return targets.at_start(model.start, target_starts(model)).to(embedded.tokens.device), embedded


@torch.no_grad()
def _lives(model: SlimModel, held_out: TargetCache, preprocess: Preprocess) -> list[Section]:
    targets, embedded = _targets(model, held_out)
    lives = model.decide(targets.tokens, embedded).lives()
    shown = range(min(_MAPS, len(held_out)))
    tiles: list[tuple[Image.Image, str]] = []
    for image in shown:
        path = held_out.photos[image].path
        tiles.append((draw(path, lives[image], preprocess=preprocess, width=220, legend=False), path.name))
    picture = _kept_by_block(model, targets.tokens, embedded)
    return [
        figure(
            picture,
            "Number of patches that enter each block. In fixed mode it is the same for every photo; in adaptive mode "
            "it differs, and the boxes show the quartiles over the photos.",
            lossless=True,
        ),
        figure(
            contact_sheet(tiles, columns=4),
            f"Life maps at budget {model.settings.budget:g}: the darker a patch, the earlier it is dropped",
        ),
    ]


@torch.no_grad()
def _answers(model: SlimModel, held_out: TargetCache, preprocess: Preprocess, dense: DenseTarget) -> Section:
    """Photo, answers of the dense and of the slimmed model, and life map of a few photos."""
    embedded = model.backbone.embed(model.backbone.blank(held_out.image_size))
    rows = []
    for row in range(min(_ANSWERS, len(held_out))):
        targets = held_out.targets([row]).to(embedded.tokens.device)
        each = [targets.patches, dense.slimmed(model, targets, embedded)]
        expected, found = (dense.answers(features, embedded.grid)[0] for features in each)
        answers = [
            (name, answer.argmax(dim=0).cpu().numpy()) for name, answer in (("dense", expected), ("slimmed", found))
        ]
        lives = model.decide(targets.tokens, embedded).lives()
        rows.append(draw_answers(held_out.photos[row].path, answers, lives, class_colours(len(expected)), preprocess))
    return figure(
        stacked(rows, 12),
        f"Photos that were not trained on, at budget {model.settings.budget:g}: a colour for each class; in the life "
        "map, the darker a patch, the earlier it is dropped",
    )


def _kept_by_block(model: SlimModel, tokens: torch.Tensor, embedded: Any) -> Image.Image:
    """A plot of the number of patches that enter each block: box plots over the photos in adaptive mode."""
    with model.temporarily(mode="adaptive"):
        adaptive = model.decide(tokens, embedded).lives()
    with model.temporarily(mode="fixed"):
        fixed = model.decide(tokens, embedded).lives()
    axes, figure_ = _axes()
    blocks = list(range(fixed.depth))
    axes.boxplot(adaptive.kept.cpu().T.tolist(), positions=blocks, showfliers=False)
    axes.plot(blocks, fixed.kept[0].tolist(), "o", label="fixed mode")
    axes.set(xlabel="block", ylabel="patches that enter the block", title="Patches kept (boxes: adaptive mode)")
    axes.legend(frameon=False)
    return rendered(figure_)


def _curves(stages: _StageLines) -> list[tuple[Image.Image, str]]:
    """(plot of the losses, caption) of each stage."""
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
        pictures.append(
            (
                rendered(figure_),
                f"Stage {stage}: training loss and its parts, mean of the last 20 steps; {len(rows)} steps",
            )
        )
    return pictures


def _validation(stages: _StageLines, sets: Collection[str]) -> list[tuple[Image.Image, str]]:
    """(plot of accuracy on the validation sets, caption) of each stage; a line for each set and budget.

    Of a model without a classifier it is the accuracy of nearest neighbours, or without labels the cosine. For dense
    prediction it is the agreement of the pixels, or without a head the cosine of the patch features.
    """
    pictures = []
    for stage, lines in stages.items():
        results = sorted((line for line in lines if line.get("validation") in sets), key=lambda line: line["step"])
        if not results:
            continue
        axes, figure_ = _axes()
        measure, axis, factor = _measure(results)
        what = axis.partition(",")[0]
        for index, name in enumerate(dict.fromkeys(line["validation"] for line in results)):
            colour, of_set = f"C{index}", [line for line in results if line["validation"] == name]
            axes.axhline(
                factor * of_set[0].get(f"dense_{measure}", 1), color=colour, linestyle=":", label=f"{name}, dense"
            )
            for style, budget in zip(
                ("-", "--"), sorted({line["budget"] for line in of_set}, reverse=True), strict=False
            ):
                points = [(line["epoch"], factor * line[measure]) for line in of_set if line["budget"] == budget]
                axes.plot(*zip(*points, strict=True), style, color=colour, marker=".", label=f"{name} at {budget:g}")
        axes.set(xlabel="epoch", ylabel=axis, title=f"{stage}: {what} on validation photos")
        axes.legend(frameon=False, fontsize="small")
        caption = f"{what} on validation photos, which are not trained on, at each budget; dotted: dense model"
        pictures.append((rendered(figure_), f"Stage {stage}: {caption}; {results[-1]['seconds']:.0f} s of training"))
    return pictures


def _measure(results: Sequence[Line]) -> tuple[str, str, float]:
    """(name, label of the axis, factor) of the number in these lines that is plotted."""
    if "top1" in results[0]:
        return "top1", "accuracy, %", 100
    if "patch_cosine" in results[0]:
        if results[0]["pixel_agreement"] is None:
            return "patch_cosine", "cosine to the dense patch features", 1
        return "pixel_agreement", "pixels with the same answer, %", 100
    if all(line["knn"] is not None for line in results):
        return "knn", "accuracy of nearest neighbours, %", 100
    return "cosine", "cosine to the dense embedding", 1


def _stages(metrics: Path, names: Sequence[str]) -> _StageLines:
    """The lines of each stage of this run."""
    lines = [values for _, values in lines_of(metrics)]
    return {name: [line for line in lines if line["stage"] == name] for name in names}


def _smooth(values: Sequence[float], over: int = 20) -> list[float]:
    return [sum(values[max(0, i - over + 1) : i + 1]) / min(i + 1, over) for i in range(len(values))]


def _axes() -> tuple[Any, Any]:
    figure_ = new_figure(6.4, 3.6)
    axes = figure_.add_subplot()
    axes.grid(alpha=0.3)
    return axes, figure_
