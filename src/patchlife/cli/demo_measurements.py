"""What ``patchlife demo`` measures: time of the dense and the slimmed model, then accuracy at several budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import DemoConfig, LifeConfig
from ..data import load_batches
from ..errors import ImageError
from ..extras import installed
from .common import calibrate_if_needed, progress, say

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluation.timing import Timing
    from ..runtime.inference import Prediction
    from ..runtime.pipeline import Pipeline

__all__ = [
    "DENSE",
    "SLIMMED",
    "Measurements",
    "Outcome",
    "classes_of",
    "measure",
    "outcome_of",
    "predict_all",
    "time_against_dense",
    "time_onnx",
]

BUDGETS = (0.8, 0.6, 0.45, 0.35)
"""Budgets of the trade-off table, in addition to the dense model and the requested budget."""

DENSE, SLIMMED = "dense", "slimmed"
_PATIENCE = 12.0  # seconds per timing; a slow machine runs fewer rounds


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
        onnx_timings: as ``timings``, both run by ONNX Runtime; empty where it cannot run them.
    """

    settings: str
    outcomes: list[Outcome]
    timings: dict[int, Timing]
    slimmed: list[Prediction]
    onnx_timings: dict[int, Timing] = field(default_factory=dict)


def measure(pipeline: Pipeline, photos: Sequence[Path], config: DemoConfig) -> Measurements:
    """Time the model, then measure its accuracy at several budgets. The model keeps the last budget."""
    calibrate_if_needed(pipeline, photos, config.run)
    model, requested = pipeline.model, pipeline.model.settings
    settings = f"{requested.mode} mode, patches that enter each block: {model.schedule()}"
    say(f"timing dense and slimmed in turns on {pipeline.device}")
    sizes = sorted({1, config.run.batch_size})
    timings = {size: time_against_dense(pipeline, photos, size, config.rounds, config.run.threads) for size in sizes}
    onnx_timings = {}
    if _runs_onnx(pipeline):
        say("timing the same by ONNX Runtime; the exported files are kept for the next time")
        onnx_timings = time_onnx(pipeline, photos, sizes, config.rounds)
    say(f"classifying {len(photos)} photos at several budgets")
    slimmed = predict_all(pipeline, photos, config)
    model.set_budget(1.0)
    dense = predict_all(pipeline, photos, config)
    outcomes = [outcome_of(DENSE, dense, dense, pipeline), outcome_of(_name(requested), slimmed, dense, pipeline)]
    for budget in BUDGETS if requested.kept else [b for b in BUDGETS if b != requested.budget]:
        model.set_budget(budget)
        predictions = predict_all(pipeline, photos, config)
        outcomes.append(outcome_of(f"budget {budget:g}", predictions, dense, pipeline))
    return Measurements(settings, outcomes, timings, slimmed, onnx_timings)


def _name(requested: LifeConfig) -> str:
    return f"{SLIMMED}, " + ("given schedule" if requested.kept else f"budget {requested.budget:g}")


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
    predicted, true = classes_of(predictions), pipeline.labels.classes_of(p.path for p in predictions)
    flops = sum(p.flops for p in predictions) / len(predictions)
    return Outcome(
        name,
        photos=len(predictions),
        correct=sum(a == b for a, b in zip(predicted, true, strict=True)),
        agreeing=sum(a == b for a, b in zip(predicted, classes_of(dense), strict=True)),
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

    images = _batch(pipeline, photos, batch_size).to(pipeline.device)
    runs = {DENSE: lambda: pipeline.model.backbone.output(images), SLIMMED: lambda: pipeline.model.output(images)}
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


def _runs_onnx(pipeline: Pipeline) -> bool:
    """Whether the model can be exported to ONNX and run here."""
    packages = all(map(installed, ("onnx", "onnxscript", "onnxruntime")))
    return packages and pipeline.device.type == "cpu" and pipeline.model.settings.mode == "fixed"


def time_onnx(pipeline: Pipeline, photos: Sequence[Path], batch_sizes: Sequence[int], rounds: int) -> dict[int, Timing]:
    """As `time_against_dense`, by ONNX Runtime, for each batch size. Both run on torch's number of CPU threads."""
    import torch

    from ..evaluation.timing import alternate
    from ..export.cache import cached_engine
    from ..runtime.sessions import engine_version
    from ..slimming import variant

    model = pipeline.model
    dense = variant(model, model.settings.replace(budget=1.0, kept=None)).eval()
    models = {DENSE: dense, SLIMMED: model}
    engines = {
        name: cached_engine(each, "onnx", pipeline.labels, pipeline.preprocess, lives=False)
        for name, each in models.items()
    }
    threads = dict.fromkeys(engines, torch.get_num_threads())
    timings = {}
    for size in batch_sizes:
        images = _batch(pipeline, photos, size).numpy()
        runs = {name: partial(engine, images) for name, engine in engines.items()}
        conditions = {
            "model": pipeline.name,
            "batch": len(images),
            "dtype": str(images.dtype),
            **engine_version("onnx"),
        }
        timings[size] = alternate(runs, rounds, patience=_PATIENCE, metadata=conditions, threads=threads)
    return timings


def _batch(pipeline: Pipeline, photos: Sequence[Path], size: int) -> Tensor:
    return next(load_batches(photos[:size], pipeline.preprocess, size)).images


def classes_of(predictions: Sequence[Prediction]) -> list[int]:
    """The index of the predicted class of each photo."""
    return [int(prediction.probabilities.argmax()) for prediction in predictions]
