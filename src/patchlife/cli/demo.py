"""``patchlife demo``: run the embedded model on its photos, dense and slimmed, and write pictures and a report."""

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
from .common import calibrate_if_needed, progress, say, use_threads
from .draw import caption, save_png, tile

if TYPE_CHECKING:
    from ..evaluation.timing import Timing
    from ..runtime.inference import Prediction
    from ..runtime.pipeline import Pipeline

__all__ = ["Measurements", "Outcome", "measure", "outcome_of", "predict_all", "run", "time_against_dense"]

BUDGETS = (0.8, 0.6, 0.45, 0.35)
"""Budgets of the trade-off table, in addition to the dense model and the requested budget."""

_DENSE, _SLIMMED = "dense", "slimmed"
_PATIENCE = 12.0  # seconds per timing; a slow machine runs fewer rounds
_STRIPS = 6  # photos in the picture of strips

Table = tuple[list[str], list[list[str]]]


def run(config: DemoConfig) -> int:
    """Run the demo; returns the exit code."""
    from ..runtime.demo_model import DEMO, demo_folder
    from ..runtime.opening import open_pipeline

    photos = list_photos(demo_folder() / "photos")
    use_threads(config.run)
    pipeline = open_pipeline(ModelConfig(DEMO, life=config.life), config.run.device)
    measurements = measure(pipeline, photos, config)
    say(f"drawing the life maps of {len(photos)} photos")
    report = _write(measurements, pipeline, config.out)
    tables = [_text(*_outcome_table(measurements)), _text(*_time_table(measurements))]
    print("\n\n".join([*tables, f"open {report.absolute()}"]))
    return 0


@dataclass(frozen=True)
class Outcome:
    """The accuracy and cost of the model at one setting.

    Attributes:
        name: of the setting.
        photos: number of labelled photos.
        correct: number of photos whose predicted class is their folder.
        agreeing: number of photos whose predicted class is that of the dense model.
        flops: mean FLOPs per photo.
        fraction_of_dense: ``flops`` as a fraction of the dense model's FLOPs.
    """

    name: str
    photos: int
    correct: int
    agreeing: int
    flops: float
    fraction_of_dense: float

    def cells(self) -> list[str]:
        """The row of the table: name, top-1, agreement, GFLOPs, fraction of dense."""
        top1, agreement = (f"{100 * count / self.photos:.1f} %" for count in (self.correct, self.agreeing))
        return [self.name, top1, agreement, f"{self.flops / 1e9:.3f}", f"{self.fraction_of_dense:.3f}"]


@dataclass(frozen=True)
class Measurements:
    """All results of the demo.

    Attributes:
        settings: mode and schedule of the slimmed model, as text.
        outcomes: of the dense model, of the requested settings, and of other budgets.
        timings: dense compared with slimmed, by batch size.
        slimmed: the slimmed model's prediction for each photo.
    """

    settings: str
    outcomes: list[Outcome]
    timings: dict[int, Timing]
    slimmed: list[Prediction]


def measure(pipeline: Pipeline, photos: Sequence[Path], config: DemoConfig) -> Measurements:
    """Time the model, then measure its accuracy at several budgets. The model keeps the last budget."""
    calibrate_if_needed(pipeline, photos, config.run)
    model, requested = pipeline.model, pipeline.model.settings
    settings = f"{requested.mode} mode, patches that enter each block: {model.schedule()}"
    say(f"timing dense and slimmed in turns on {pipeline.device}")
    sizes = sorted({1, config.run.batch_size})
    timings = {size: time_against_dense(pipeline, photos, size, config.rounds, config.run.threads) for size in sizes}
    say(f"classifying {len(photos)} photos at several budgets")
    slimmed = predict_all(pipeline, photos, config)
    model.set_budget(1.0)
    dense = predict_all(pipeline, photos, config)
    outcomes = [outcome_of(_DENSE, dense, dense, pipeline), outcome_of(_name(requested), slimmed, dense, pipeline)]
    for budget in BUDGETS if requested.kept else [b for b in BUDGETS if b != requested.budget]:
        model.set_budget(budget)
        predictions = predict_all(pipeline, photos, config)
        outcomes.append(outcome_of(f"budget {budget:g}", predictions, dense, pipeline))
    return Measurements(settings, outcomes, timings, slimmed)


def _name(requested: LifeConfig) -> str:
    return f"{_SLIMMED}, " + ("given schedule" if requested.kept else f"budget {requested.budget:g}")


def predict_all(pipeline: Pipeline, photos: Sequence[Path], config: DemoConfig) -> list[Prediction]:
    """The model's prediction for each photo. Raises ImageError if a photo fails: the embedded photos are all valid."""
    from ..runtime.inference import Failure, predict_photos

    predictions: list[Prediction] = []
    results = predict_photos(pipeline, photos, config.run.batch_size, config.run.workers)
    for result in progress(results, len(photos), config.run.progress):
        if isinstance(result, Failure):
            raise ImageError(f"{result.error}; reinstall patchlife")
        predictions.append(result)
    return predictions


def outcome_of(
    name: str, predictions: Sequence[Prediction], dense: Sequence[Prediction], pipeline: Pipeline
) -> Outcome:
    """Compare predictions with the labels and with the dense model's predictions."""
    predicted, true = _classes(predictions), pipeline.labels.classes_of(p.path for p in predictions)
    flops = sum(p.flops for p in predictions) / len(predictions)
    return Outcome(
        name,
        photos=len(predictions),
        correct=sum(a == b for a, b in zip(predicted, true, strict=True)),
        agreeing=sum(a == b for a, b in zip(predicted, _classes(dense), strict=True)),
        flops=flops,
        fraction_of_dense=flops / pipeline.model.cost().dense,
    )


def time_against_dense(
    pipeline: Pipeline, photos: Sequence[Path], batch_size: int, rounds: int, threads: int | None = None
) -> Timing:
    """Time the slimmed model and the dense model in turns, on one batch of the photos; loading is not included.

    On a CPU each of the two runs on ``threads`` CPU threads; if None, on the number at which it is fastest.
    """
    from ..evaluation.threads import fastest_threads, thread_counts
    from ..evaluation.timing import alternate

    batch = next(load_batches(photos[:batch_size], pipeline.preprocess, batch_size))
    images = batch.images.to(pipeline.device)
    runs = {_DENSE: lambda: pipeline.model.backbone.output(images), _SLIMMED: lambda: pipeline.model.output(images)}
    conditions: dict[str, object] = {
        "model": pipeline.name,
        "batch": len(images),
        "dtype": str(images.dtype).removeprefix("torch."),
    }
    best = None
    if pipeline.device.type == "cpu":
        counts = (threads,) if threads else thread_counts()
        best = dict.fromkeys(runs, counts[0])
        if len(counts) > 1:
            tried = fastest_threads(runs, counts, 5, _PATIENCE)
            best = {name: times.best for name, times in tried.items()}
            conditions["ms_by_threads"] = {name: times.milliseconds() for name, times in tried.items()}
    return alternate(runs, rounds, device=pipeline.device, patience=_PATIENCE, metadata=conditions, threads=best)


def _classes(predictions: Sequence[Prediction]) -> list[int]:
    return [int(prediction.probabilities.argmax()) for prediction in predictions]


# ---- tables


def _outcome_table(measurements: Measurements) -> Table:
    """Accuracy and FLOPs of each setting, the most expensive first."""
    columns = ["model", "top-1", "same as dense", "GFLOPs", "of dense"]
    return columns, [outcome.cells() for outcome in sorted(measurements.outcomes, key=lambda o: -o.flops)]


def _time_table(measurements: Measurements) -> Table:
    """Time per call, on how many CPU threads, and speed-up at each batch size."""
    rows = []
    for size, timing in measurements.timings.items():
        cells = [str(size)]
        for name in (_DENSE, _SLIMMED):
            cells += [f"{1000 * timing.seconds[name].median:.1f} ms", _threads_of(timing, name)]
        rows.append([*cells, timing.verdict(_SLIMMED)])
    return ["batch", _DENSE, "threads", _SLIMMED, "threads", "speed-up"], rows


def _threads_of(timing: Timing, name: str) -> str:
    """The number of CPU threads of a run; a dash on a GPU."""
    threads = timing.conditions["threads"]
    return str(threads[name]) if isinstance(threads, dict) else "-"


def _text(columns: list[str], rows: list[list[str]]) -> str:
    """The table as text for a terminal."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [columns, *rows]]
    return "\n".join("  ".join(line).rstrip() for line in lines)


# ---- pictures and the report


def _contact_sheet(pipeline: Pipeline, predictions: Sequence[Prediction]) -> Image.Image:
    """The life maps of all photos; a caption with a wrong class also names the true class."""
    from ..visual import contact_sheet

    true_classes = pipeline.labels.classes_of(prediction.path for prediction in predictions)
    tiles = []
    for prediction, predicted, true in zip(predictions, _classes(predictions), true_classes, strict=True):
        text = caption(pipeline, prediction) + ("" if predicted == true else f", not {pipeline.labels.names[true]}")
        tiles.append((tile(read_photo(prediction.path), pipeline, prediction), text))
    return contact_sheet(tiles, columns=8, width=150)


def _strips(pipeline: Pipeline, predictions: Sequence[Prediction]) -> Image.Image:
    """The patches that enter five blocks, for a few photos spread over the classes."""
    from ..visual import strip
    from ..visual.layout import stacked

    few = predictions[:: max(1, len(predictions) // _STRIPS)][:_STRIPS]
    panels = [strip(p.path, p.lives, preprocess=pipeline.preprocess, width=180) for p in few]
    return stacked(panels, gap=12)


def _write(measurements: Measurements, pipeline: Pipeline, folder: Path) -> Path:
    """Write the report, the pictures and a JSON file into ``folder``; returns the path of the report."""
    from ..visual.html import code, figure, heading, note, paragraph, save_page, table

    folder.mkdir(parents=True, exist_ok=True)
    sheet, strips = _contact_sheet(pipeline, measurements.slimmed), _strips(pipeline, measurements.slimmed)
    save_png(sheet, folder / "contact-sheet.png")
    save_png(strips, folder / "strips.png")
    write_atomic(folder / "demo.json", json.dumps(_numbers(measurements), indent=2) + "\n")
    photos = len(measurements.slimmed)
    return save_page(
        folder / "report.html",
        "PatchLife demo: dense and slimmed Vision Transformer",
        [
            paragraph(
                "One small module scores the patches of a photo once. The scores decide in how many blocks of the "
                "Vision Transformer each patch takes part. This report compares the embedded model "
                f"({pipeline.name}), dense and slimmed, on {photos} photos that were not used for training."
            ),
            table(*_outcome_table(measurements), caption=_sample_size_note(photos)),
            paragraph("All rows use the same weights: the budget is set at run time, without new training."),
            heading("Run time"),
            table(*_time_table(measurements), caption=f"Slimmed model: {measurements.settings}."),
            note(_conditions(measurements)),
            heading("Patches that enter each block"),
            figure(
                strips, "The patches that enter five of the blocks; patches that were dropped before are dark blue."
            ),
            heading("All photos"),
            figure(
                sheet,
                "Life maps: the brighter a patch, the longer its life. Captions: predictions of the slimmed model.",
            ),
            heading("Run it on your photos"),
            code("patchlife predict demo photos/\npatchlife draw vit_tiny_patch16_224 photos/ --pretrained --sheet"),
        ],
    )


def _numbers(measurements: Measurements) -> dict[str, object]:
    timings = {size: timing.to_dict() for size, timing in measurements.timings.items()}
    return {
        "settings": measurements.settings,
        "outcomes": [asdict(outcome) for outcome in measurements.outcomes],
        "timings": timings,
    }


def _sample_size_note(photos: int) -> str:
    return f"Top-1 on {photos} photos: one photo is {100 / photos:.1f} points; differences of a few photos are noise."


def _conditions(measurements: Measurements) -> str:
    """How the times were measured, in small print."""
    values = next(iter(measurements.timings.values())).conditions
    rounds = ", ".join(f"{t.conditions['rounds']} at batch {size}" for size, t in measurements.timings.items())
    return (
        "Times: median of a call; dense and slimmed run in turns, each on the number of CPU threads at which it was "
        "fastest (or on --threads). Speed-up: median of the ratio within a round, with the 10th and 90th percentile in "
        f"brackets. Rounds: {rounds}. {values['device']} ({values['cpu']}), {values['cores']} cores, "
        f"{values['dtype']}, load {values['load']}, OMP_WAIT_POLICY {values['omp_wait_policy']}, "
        f"malloc {values['malloc']}, torch {values['torch']}, timm {values['timm']}."
    )
