"""``patchlife demo``: run the embedded model on its photos, dense and slimmed, and write pictures and a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ..config import DemoConfig, ModelConfig
from ..data import list_photos, read_photo
from ..io.files import write_atomic
from .common import say, use_threads
from .demo_measurements import DENSE, SLIMMED, Measurements, classes_of, measure
from .draw import caption, save_png, tile

if TYPE_CHECKING:
    from ..evaluation.timing import Timing
    from ..runtime.inference import Prediction
    from ..runtime.pipeline import Pipeline

__all__ = ["run"]

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
    print("\n\n".join([_headline(measurements), *tables, f"open {report.absolute()}"]))
    return 0


# ---- the result in one sentence, and in tables


def _headline(measurements: Measurements) -> str:
    """What was measured in this run: FLOPs, answers and speed of the slimmed model."""
    slimmed = measurements.outcomes[1]
    return (
        f"With {100 * slimmed.fraction_of_dense:.0f} % of the FLOPs the slimmed model gave the dense model's answer on "
        f"{slimmed.agreeing} of {slimmed.photos} photos. {_speed(measurements)}"
    )


def _speed(measurements: Measurements) -> str:
    """A sentence on the speed of the slimmed model, by engine, at the largest batch size."""
    last = {engine: list(timings.items())[-1] for engine, timings in _by_engine(measurements).items() if timings}
    if any(timing.noisy for _, timing in last.values()):
        return "The times were too noisy to state its speed."
    ratios = [f"{timing.ratios[SLIMMED].median:.2f}x as fast in {engine}" for engine, (_, timing) in last.items()]
    size = next(iter(last.values()))[0]
    return f"In batches of {size} it ran {' and '.join(ratios)}, on this machine."


def _by_engine(measurements: Measurements) -> dict[str, dict[int, Timing]]:
    """The timings by engine and batch size; empty for an engine that did not run."""
    return {"PyTorch": measurements.timings, "ONNX Runtime": measurements.onnx_timings}


def _outcome_table(measurements: Measurements) -> Table:
    """Accuracy and FLOPs of each setting, the most expensive first."""
    columns = ["model", "top-1", "same as dense", "GFLOPs", "of dense"]
    return columns, [outcome.cells() for outcome in sorted(measurements.outcomes, key=lambda o: -o.flops)]


def _time_table(measurements: Measurements) -> Table:
    """Time per call, on how many CPU threads, and speed-up at each batch size, for each engine."""
    rows = []
    for engine, timings in _by_engine(measurements).items():
        for size, timing in timings.items():
            cells = [engine, str(size)]
            for name in (DENSE, SLIMMED):
                cells += [f"{1000 * timing.seconds[name].median:.1f} ms", _threads_of(timing, name)]
            rows.append([*cells, timing.verdict(SLIMMED)])
    return ["engine", "batch", DENSE, "threads", SLIMMED, "threads", "speed-up"], rows


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
    for prediction, predicted, true in zip(predictions, classes_of(predictions), true_classes, strict=True):
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
            paragraph(_headline(measurements)),
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
    timings = {
        name: {size: timing.to_dict() for size, timing in each.items()}
        for name, each in (("timings", measurements.timings), ("onnx_timings", measurements.onnx_timings))
    }
    outcomes = [asdict(outcome) for outcome in measurements.outcomes]
    return {"settings": measurements.settings, "outcomes": outcomes, **timings}


def _sample_size_note(photos: int) -> str:
    return f"Top-1 on {photos} photos: one photo is {100 / photos:.1f} points; differences of a few photos are noise."


def _conditions(measurements: Measurements) -> str:
    """How the times were measured, in small print."""
    values = next(iter(measurements.timings.values())).conditions
    rounds = ", ".join(f"{t.conditions['rounds']} at batch {size}" for size, t in measurements.timings.items())
    onnx = next((timing.conditions["onnxruntime"] for timing in measurements.onnx_timings.values()), None)
    return (
        "Times: median of a call; dense and slimmed run in turns. In PyTorch each runs on the number of CPU threads at "
        "which it was fastest (or on --threads). Speed-up: median of the ratio within a round, with the 10th and 90th "
        f"percentile in brackets. Rounds: {rounds}. {values['device']} ({values['cpu']}), {values['cores']} cores, "
        f"{values['dtype']}, load {values['load']}, OMP_WAIT_POLICY {values['omp_wait_policy']}, "
        f"malloc {values['malloc']}, torch {values['torch']}, timm {values['timm']}"
        + (f", ONNX Runtime {onnx}." if onnx else ".")
    )
