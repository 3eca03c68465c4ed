"""``patchlife predict``: photos in, one JSON line each out."""

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
from ..io.files import is_exported
from ..io.jsonl import encode, recover
from .common import calibrate_if_needed, check_engine, classes_of, find_photos, open_classifier, progress, say

if TYPE_CHECKING:
    from ..data.labels import Labels
    from ..runtime.inference import Prediction
    from ..runtime.pipeline import Pipeline

__all__ = ["Tally", "predict", "run"]

Record = dict[str, Any]
_KEY = "path"  # what every record begins with


def run(config: PredictConfig) -> int:
    """Write a line for each photo; returns the exit code."""
    check_engine(config.model.model, config.engine, config.trust)
    photos = find_photos(config.paths)
    earlier = _earlier(config.out, config.resume)
    pipeline = _opened(config)
    tally = Tally(_truth(pipeline.labels, photos, config.model.class_order) if config.labelled else {})
    calibrated_here = calibrate_if_needed(pipeline, photos, config.run)
    identity = _identity(pipeline, config.top, photos if calibrated_here else [])
    for record in earlier:
        _check_same_run(record, identity, config.out)
        tally.add(record)
    done = {record[_KEY] for record in earlier}
    todo = [photo for photo in photos if str(photo) not in done]
    records = predict(pipeline, todo, config.top, config.run.batch_size, config.run.workers)
    started = time.perf_counter()
    try:
        with _output(config.out) as write:
            for record in progress(records, len(photos), _bar(config), len(photos) - len(todo)):
                write(record | {"run": identity})
                tally.add(record)
    except KeyboardInterrupt:
        hint = "; go on with --resume" if config.out else ""
        say(f"{tally.photos} of {len(photos)} photos are done{hint}")
        raise
    speed = len(todo) / (time.perf_counter() - started)
    say(tally.summary() + (f", {speed:.1f} photos/s with reading them" if todo else ""))
    return 1 if tally.failed else 0


def _opened(config: PredictConfig) -> Pipeline:
    """The model, or the exported file or package, on the engine that was asked for."""
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
    """Classify photos.

    Yields a record for each, in their order: ``path``, and either ``error`` or ``top`` (class, label and
    probability of the likeliest), ``flops``, ``fraction_of_dense`` (of the dense model's FLOPs) and
    ``kept`` (patches that enter each block).
    """
    from ..runtime.inference import Failure, predict_photos

    dense = pipeline.model.dense_flops
    for result in predict_photos(pipeline, photos, batch_size, workers):
        if isinstance(result, Failure):
            yield {_KEY: str(result.path), "error": result.error}
            continue
        yield {
            _KEY: str(result.path),
            "top": _likeliest(result, pipeline.labels, top),
            "flops": result.flops,
            "fraction_of_dense": round(result.flops / dense, 6),
            "kept": result.lives.kept[0].tolist(),
        }


@dataclass
class Tally:
    """What is said about a run at its end.

    Attributes:
        truth: the class of each photo, by its path; empty if nobody knows.
        photos: records counted. answered: those without an error. labelled: those whose class is known, too.
        right: how many of these the model found. spent: sum over the answers, in dense models' FLOPs.
        first_error: of the photos that failed.
    """

    truth: dict[str, int] = field(default_factory=dict)
    photos: int = 0
    answered: int = 0
    labelled: int = 0
    right: int = 0
    spent: float = 0.0
    first_error: str = ""

    @property
    def failed(self) -> int:
        """Photos without an answer."""
        return self.photos - self.answered

    def add(self, record: Record) -> None:
        """Count one record."""
        self.photos += 1
        if error := record.get("error"):
            self.first_error = self.first_error or error
            return
        self.answered += 1
        self.spent += record["fraction_of_dense"]
        if record[_KEY] in self.truth:
            self.labelled += 1
            self.right += record["top"][0]["class"] == self.truth[record[_KEY]]

    def summary(self) -> str:
        """One line for people."""
        parts = [f"{self.photos} photos", f"{self.failed} failed"]
        if self.failed:
            parts[-1] += f" (the first: {self.first_error})"
        if self.answered:
            parts.append(f"{self.spent / self.answered:.3f} of the dense FLOPs")
        if self.labelled:
            parts.append(f"top-1 {100 * self.right / self.labelled:.2f} % of {self.labelled}")
        return ", ".join(parts)


# ---- a record's parts


def _likeliest(answer: Prediction, labels: Labels, top: int) -> list[Record]:
    best = answer.probabilities.topk(min(top, len(labels.names)))
    ranked = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [{"class": c, "label": labels.names[c], "probability": round(p, 6)} for c, p in ranked]


def _truth(labels: Labels, photos: Sequence[Path], order: ClassOrder | None) -> dict[str, int]:
    return dict(zip(map(str, photos), classes_of(labels, photos, order), strict=True))


# ---- where records go, and where a run goes on


def _earlier(out: Path | None, resume: bool) -> list[Record]:
    """The records that an interrupted run left in ``out``."""
    if out is not None and resume:
        return recover(out, _KEY)
    if out is not None and out.exists() and out.stat().st_size:
        raise ConfigError(f"{out} exists already; continue it with --resume, or choose another --out")
    return []


def _identity(pipeline: Pipeline, top: int, calibrated_on: Sequence[Path]) -> str:
    """Eight digits that differ where results may: by weights, settings, preprocessing or calibration."""
    import torch

    model = pipeline.model
    metadata = {
        "life": model.config.to_dict(),
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
            f"{out} was begun with another model or other settings (run {record.get('run')}, this is "
            f"{identity}); repeat those, or choose another --out"
        )


@contextmanager
def _output(out: Path | None) -> Iterator[Callable[[Record], None]]:
    """Where to write records: each is out of our hands before the next photo is run."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a", encoding="ascii") if out else nullcontext(sys.stdout) as stream:

        def write(record: Record) -> None:
            stream.write(encode(record))
            stream.flush()

        yield write


def _bar(config: PredictConfig) -> bool | None:
    """No progress bar, unless asked for, in the middle of the lines on a terminal."""
    lines_on_terminal = config.out is None and sys.stdout.isatty()
    return False if config.run.progress is None and lines_on_terminal else config.run.progress
