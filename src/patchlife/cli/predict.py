"""``patchlife predict``: classify photos and write one JSON line for each."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ClassOrder, PredictConfig
from ..errors import ConfigError
from ..io.exported_files import is_exported
from ..io.jsonl import encode, recover
from .common import calibrate_if_needed, check_engine, classes_of, find_photos, open_classifier, progress, say

if TYPE_CHECKING:
    from ..data.labels import Labels
    from ..runtime.inference import Prediction
    from ..runtime.pipeline import Pipeline

__all__ = ["Tally", "predict", "run"]

Record = dict[str, Any]
_KEY = "path"  # the first field of every record


def run(config: PredictConfig) -> int:
    """Write a JSON line for each photo; returns the exit code."""
    check_engine(config.model.model, config.engine, config.trust, config.run.dtype)
    photos = find_photos(config.paths)
    earlier = _earlier_records(config.out, config.resume)
    pipeline = _open(config)
    tally = Tally(_true_classes(pipeline.labels, photos, config.model.class_order) if config.labelled else {})
    calibrated_now = calibrate_if_needed(pipeline, photos, config.run)
    identity = _run_identity(pipeline, config.top, photos if calibrated_now else [])
    for record in earlier:
        _check_same_run(record, identity, config.out)
        tally.add(record)
    done = {record[_KEY] for record in earlier}
    remaining = [photo for photo in photos if str(photo) not in done]
    records = predict(pipeline, remaining, config.top, config.run.batch_size, config.run.workers)
    started = time.perf_counter()
    try:
        with _output(config.out) as write:
            for record in progress(records, len(photos), _show_bar(config), len(photos) - len(remaining)):
                write(record | {"run": identity})
                tally.add(record)
    except KeyboardInterrupt:
        hint = "; continue with --resume" if config.out else ""
        say(f"{tally.photos} of {len(photos)} photos are done{hint}")
        raise
    speed = len(remaining) / (time.perf_counter() - started)
    say(tally.summary() + (f", {speed:.1f} photos/s including reading" if remaining else ""))
    return 1 if tally.failed else 0


def _open(config: PredictConfig) -> Pipeline:
    """Open the model with the requested engine, or the exported file or bundle."""
    if is_exported(config.model.model):
        from ..runtime.exported import open_exported

        return open_exported(config.model, config.trust)
    pipeline = open_classifier(config.model, config.run)
    if config.engine in (None, "eager"):
        return pipeline
    from ..export.on_the_fly import with_engine

    return with_engine(pipeline, config.engine, config.run.device)


def predict(
    pipeline: Pipeline, photos: Sequence[Path], top: int = 5, batch_size: int = 16, workers: int | None = None
) -> Iterator[Record]:
    """Classify photos; yields one record for each, in their order.

    A record has ``path`` and either ``error`` or these fields: ``top`` (class, label and probability of the most
    likely classes), ``flops``, ``fraction_of_dense`` (of the dense model's FLOPs) and ``kept`` (patches that enter
    each block).
    """
    from ..runtime.inference import Failure, predict_photos

    dense = pipeline.model.dense_flops
    for result in predict_photos(pipeline, photos, batch_size, workers):
        if isinstance(result, Failure):
            yield {_KEY: str(result.path), "error": result.error}
            continue
        yield {
            _KEY: str(result.path),
            "top": _top_classes(result, pipeline.labels, top),
            "flops": result.flops,
            "fraction_of_dense": round(result.flops / dense, 6),
            "kept": result.lives.kept[0].tolist(),
        }


@dataclass
class Tally:
    """Counts for the summary at the end of a run.

    Attributes:
        true_classes: the class of each photo, by its path; empty without labels.
        photos: number of records.
        classified: number of records without an error.
        labelled: number of classified photos whose class is known.
        correct: number of labelled photos whose predicted class is their class.
        dense_fractions: sum of the classified photos' fractions of the dense FLOPs.
        first_error: the error of the first photo that failed.
    """

    true_classes: dict[str, int] = field(default_factory=dict)
    photos: int = 0
    classified: int = 0
    labelled: int = 0
    correct: int = 0
    dense_fractions: float = 0.0
    first_error: str = ""

    @property
    def failed(self) -> int:
        """Number of photos that could not be classified."""
        return self.photos - self.classified

    def add(self, record: Record) -> None:
        """Count one record."""
        self.photos += 1
        if error := record.get("error"):
            self.first_error = self.first_error or error
            return
        self.classified += 1
        self.dense_fractions += record["fraction_of_dense"]
        if record[_KEY] in self.true_classes:
            self.labelled += 1
            self.correct += record["top"][0]["class"] == self.true_classes[record[_KEY]]

    def summary(self) -> str:
        """The counts in one line."""
        parts = [f"{self.photos} photos", f"{self.failed} failed"]
        if self.failed:
            parts[-1] += f" (the first: {self.first_error})"
        if self.classified:
            parts.append(f"{self.dense_fractions / self.classified:.3f} of the dense FLOPs")
        if self.labelled:
            parts.append(f"top-1 {100 * self.correct / self.labelled:.2f} % of {self.labelled}")
        return ", ".join(parts)


# ---- parts of a record


def _top_classes(prediction: Prediction, labels: Labels, top: int) -> list[Record]:
    best = prediction.probabilities.topk(min(top, len(labels.names)))
    ranked = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [{"class": c, "label": labels.names[c], "probability": round(p, 6)} for c, p in ranked]


def _true_classes(labels: Labels, photos: Sequence[Path], order: ClassOrder | None) -> dict[str, int]:
    return dict(zip(map(str, photos), classes_of(labels, photos, order), strict=True))


# ---- writing records and resuming a run


def _earlier_records(out: Path | None, resume: bool) -> list[Record]:
    """The records of an interrupted run in ``out``."""
    if out is not None and resume:
        return recover(out, _KEY)
    if out is not None and out.exists() and out.stat().st_size:
        raise ConfigError(f"{out} already exists; continue it with --resume, or choose another --out")
    return []


def _run_identity(pipeline: Pipeline, top: int, calibrated_on: Sequence[Path]) -> str:
    """Eight hexadecimal digits of a hash of the weights, settings, preprocessing, labels and calibration."""
    import torch

    model = pipeline.model
    metadata = {
        "life": model.settings.to_dict(),
        "preprocess": pipeline.preprocess.to_dict(),
        "labels": pipeline.labels.names,
        "top": top,
        "calibrated_on": [str(photo) for photo in calibrated_on],
    }
    digest = hashlib.sha256(json.dumps(metadata).encode())
    tensors = [*model.state_dict().values()]
    if model.calibration is not None and not calibrated_on:
        tensors += model.calibration.tensors().values()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:8]


def _check_same_run(record: Record, identity: str, out: Path | None) -> None:
    if record.get("run") != identity:
        raise ConfigError(
            f"{out} was started with another model or other settings: expected run {identity}, got run "
            f"{record.get('run')}; use the same model and settings, or choose another --out"
        )


@contextmanager
def _output(out: Path | None) -> Iterator[Callable[[Record], None]]:
    """A function that writes one record to ``out`` or to standard output, and flushes it."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a", encoding="ascii") if out else nullcontext(sys.stdout) as stream:

        def write(record: Record) -> None:
            stream.write(encode(record))
            stream.flush()

        yield write


def _show_bar(config: PredictConfig) -> bool | None:
    """Whether to draw a progress bar; by default not if the records are printed on the same terminal."""
    lines_on_terminal = config.out is None and sys.stdout.isatty()
    return False if config.run.progress is None and lines_on_terminal else config.run.progress
