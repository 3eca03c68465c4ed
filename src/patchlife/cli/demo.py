"""``patchlife demo``: the embedded model on its photos, dense against slimmed, with pictures and a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ..config import DemoConfig, LifeConfig, ModelConfig
from ..data import list_photos, load_batches, read_photo
from ..errors import ImageError
from ..io.files import write_atomic
from .common import calibrate_if_needed, progress, say
from .draw import caption, save_png, tile

if TYPE_CHECKING:
    from ..evaluation.timing import Timing
    from ..runtime.inference import Prediction
    from ..runtime.pipeline import Pipeline

__all__ = ["Findings", "Outcome", "answer_all", "investigate", "outcome_of", "run", "time_against_dense"]

BUDGETS = (0.8, 0.6, 0.45, 0.35)
"""Of the trade-off, beside the dense model and what was asked for."""

_DENSE, _SLIMMED = "dense", "slimmed"
_PATIENCE = 12.0  # seconds for each timing: a slow machine takes fewer turns instead of more time
_STRIPS = 6

Table = tuple[list[str], list[list[str]]]


def run(config: DemoConfig) -> int:
    """Run the demo as the command line asks; returns the exit code."""
    from ..runtime.demo_model import DEMO, demo_folder
    from ..runtime.opening import open_pipeline

    photos = list_photos(demo_folder() / "photos")
    pipeline = open_pipeline(ModelConfig(DEMO, life=config.life), config.run.device)
    findings = investigate(pipeline, photos, config)
    say(f"drawing the lives of {len(photos)} photos")
    report = _write(findings, pipeline, config.out)
    print(f"{_text(*_outcome_table(findings))}\n\n{_text(*_time_table(findings))}\n\nopen {report.absolute()}")
    return 0


@dataclass(frozen=True)
class Outcome:
    """How a model did on labelled photos under one setting.

    Attributes:
        name: of the setting.
        photos: how many there were. right: how many of them were named as their folder is.
        agreeing: how many were named as the dense model does.
        flops: spent on a photo, on average. fraction_of_dense: the same, of the dense model's.
    """

    name: str
    photos: int
    right: int
    agreeing: int
    flops: float
    fraction_of_dense: float

    def cells(self) -> list[str]:
        """For a table: name, top-1, agreement, FLOPs, fraction."""
        top1, agreement = (f"{100 * count / self.photos:.1f} %" for count in (self.right, self.agreeing))
        return [self.name, top1, agreement, f"{self.flops / 1e9:.3f}", f"{self.fraction_of_dense:.3f}"]


@dataclass(frozen=True)
class Findings:
    """All that the demo found out.

    Attributes:
        settings: how the slimmed model was made, in words.
        outcomes: dense, slimmed as asked for, and at other budgets.
        timings: dense and slimmed against each other, by batch size.
        slimmed: the slimmed model's answers, photo by photo.
    """

    settings: str
    outcomes: list[Outcome]
    timings: dict[int, Timing]
    slimmed: list[Prediction]


def investigate(pipeline: Pipeline, photos: Sequence[Path], config: DemoConfig) -> Findings:
    """Time the model, then count what it gets right at several budgets. Leaves it at the last of them."""
    calibrate_if_needed(pipeline, photos, config.run)
    model, asked = pipeline.model, pipeline.model.config
    settings = f"{asked.mode} mode, patches that enter each block: {model.schedule()}"
    say(f"dense and slimmed take turns against the clock on {pipeline.device}")
    sizes = sorted({1, config.run.batch_size})
    timings = {size: time_against_dense(pipeline, photos, size, config.rounds) for size in sizes}
    say(f"one set of weights at several budgets, {len(photos)} photos each")
    slimmed = answer_all(pipeline, photos, config)
    model.set_budget(1.0)
    dense = answer_all(pipeline, photos, config)
    outcomes = [outcome_of(_DENSE, dense, dense, pipeline), outcome_of(_name(asked), slimmed, dense, pipeline)]
    for budget in BUDGETS if asked.kept else [b for b in BUDGETS if b != asked.budget]:
        model.set_budget(budget)
        found = answer_all(pipeline, photos, config)
        outcomes.append(outcome_of(f"budget {budget:g}", found, dense, pipeline))
    return Findings(settings, outcomes, timings, slimmed)


def _name(asked: LifeConfig) -> str:
    return f"{_SLIMMED}, " + ("own schedule" if asked.kept else f"budget {asked.budget:g}")


def answer_all(pipeline: Pipeline, photos: Sequence[Path], config: DemoConfig) -> list[Prediction]:
    """The model's answers, every one of them: these photos are known to be sound."""
    from ..runtime.inference import Failure, predict_photos

    found: list[Prediction] = []
    results = predict_photos(pipeline, photos, config.run.batch_size, config.run.workers)
    for result in progress(results, len(photos), config.run.progress):
        if isinstance(result, Failure):
            raise ImageError(f"{result.error}; reinstall patchlife")
        found.append(result)
    return found


def outcome_of(name: str, found: Sequence[Prediction], dense: Sequence[Prediction], pipeline: Pipeline) -> Outcome:
    """Count what was right."""
    said, truth = _classes(found), pipeline.labels.classes_of(answer.path for answer in found)
    flops = sum(answer.flops for answer in found) / len(found)
    return Outcome(
        name,
        photos=len(found),
        right=sum(a == b for a, b in zip(said, truth, strict=True)),
        agreeing=sum(a == b for a, b in zip(said, _classes(dense), strict=True)),
        flops=flops,
        fraction_of_dense=flops / pipeline.model.cost().dense,
    )


def time_against_dense(pipeline: Pipeline, photos: Sequence[Path], batch_size: int, rounds: int) -> Timing:
    """The slimmed model against the backbone itself, on a batch of these photos that is already loaded."""
    from ..evaluation.timing import alternate

    batch = next(load_batches(photos[:batch_size], pipeline.preprocess, batch_size))
    images = batch.images.to(pipeline.device)
    runs = {_DENSE: lambda: pipeline.model.backbone.vit(images), _SLIMMED: lambda: pipeline.model(images)}
    about = {"model": pipeline.name, "batch": len(images), "dtype": str(images.dtype).removeprefix("torch.")}
    return alternate(runs, rounds, device=pipeline.device, patience=_PATIENCE, metadata=about)


def _classes(found: Sequence[Prediction]) -> list[int]:
    return [int(answer.probabilities.argmax()) for answer in found]


# ---- tables


def _outcome_table(findings: Findings) -> Table:
    """What it says and what that costs, dearest first."""
    columns = ["model", "top-1", "same as dense", "GFLOPs", "of dense"]
    return columns, [outcome.cells() for outcome in sorted(findings.outcomes, key=lambda o: -o.flops)]


def _time_table(findings: Findings) -> Table:
    """How long it takes."""
    rows = []
    for size, timing in findings.timings.items():
        dense, slimmed = (f"{1000 * timing.seconds[name].median:.1f} ms" for name in (_DENSE, _SLIMMED))
        rows.append([str(size), dense, slimmed, timing.verdict(_SLIMMED)])
    return ["batch", _DENSE, _SLIMMED, "speed-up"], rows


def _text(columns: list[str], rows: list[list[str]]) -> str:
    """A table for a terminal."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [columns, *rows]]
    return "\n".join("  ".join(line).rstrip() for line in lines)


# ---- pictures and the report


def _contact_sheet(pipeline: Pipeline, found: Sequence[Prediction]) -> Image.Image:
    from ..visual import contact_sheet

    truth = pipeline.labels.classes_of(answer.path for answer in found)
    tiles = []
    for answer, said, true in zip(found, _classes(found), truth, strict=True):
        text = caption(pipeline, answer) + ("" if said == true else f", not {pipeline.labels.names[true]}")
        tiles.append((tile(read_photo(answer.path), pipeline, answer), text))
    return contact_sheet(tiles, columns=8, width=150)


def _strips(pipeline: Pipeline, found: Sequence[Prediction]) -> Image.Image:
    """What is alive at five blocks, for a few photos from the whole range of classes."""
    from ..visual import strip
    from ..visual.layout import stacked

    few = found[:: max(1, len(found) // _STRIPS)][:_STRIPS]
    panels = [strip(answer.path, answer.lives, preprocess=pipeline.preprocess, width=180) for answer in few]
    return stacked(panels, gap=12)


def _write(findings: Findings, pipeline: Pipeline, folder: Path) -> Path:
    """Report, pictures and numbers into ``folder``; returns the report."""
    from ..visual.html import code, figure, heading, note, paragraph, save_page, table

    folder.mkdir(parents=True, exist_ok=True)
    sheet, strips = _contact_sheet(pipeline, findings.slimmed), _strips(pipeline, findings.slimmed)
    save_png(sheet, folder / "contact-sheet.png")
    save_png(strips, folder / "strips.png")
    write_atomic(folder / "demo.json", json.dumps(_numbers(findings), indent=2) + "\n")
    photos = len(findings.slimmed)
    return save_page(
        folder / "report.html",
        "PatchLife demo: each patch lives as long as it is needed",
        [
            paragraph(
                "One small module looks at the patches of a photo once and decides how many blocks of the Vision "
                f"Transformer each of them lives. Here is the embedded model ({pipeline.name}) on {photos} photos that "
                "it was not trained on, dense and slimmed."
            ),
            table(*_outcome_table(findings), caption=_chance(photos)),
            paragraph("One set of weights: the budget is set at run time, and nothing is trained again."),
            heading("How long it takes"),
            table(*_time_table(findings), caption=f"Slimmed: {findings.settings}."),
            note(_conditions(findings)),
            heading("Who is still alive"),
            figure(strips, "The patches that enter five blocks; in night blue those that are dead by then."),
            heading("All photos"),
            figure(sheet, "Life maps: the brighter, the longer a patch lives. Captions: what the slimmed model says."),
            heading("Your own photos"),
            code("patchlife predict demo photos/\npatchlife draw vit_tiny_patch16_224 photos/ --pretrained --sheet"),
        ],
    )


def _numbers(findings: Findings) -> dict[str, object]:
    timings = {size: timing.to_dict() for size, timing in findings.timings.items()}
    return {
        "settings": findings.settings,
        "outcomes": [asdict(outcome) for outcome in findings.outcomes],
        "timings": timings,
    }


def _chance(photos: int) -> str:
    return f"Top-1 of {photos} photos: one photo is {100 / photos:.1f} points, and a few of them are chance."


def _conditions(findings: Findings) -> str:
    """Small print: how the times were taken."""
    about = next(iter(findings.timings.values())).conditions
    rounds = ", ".join(f"{t.conditions['rounds']} at batch {size}" for size, t in findings.timings.items())
    return (
        "Times: dense and slimmed in turns, the median of a call; speed-up: the median of the ratios within a turn, "
        f"10th and 90th percentile in brackets. Turns: {rounds}. {about['device']} ({about['cpu']}), "
        f"{about['threads']} threads of {about['cores']} cores, {about['dtype']}, load {about['load']}, "
        f"OMP_WAIT_POLICY {about['omp_wait_policy']}, torch {about['torch']}, timm {about['timm']}."
    )
