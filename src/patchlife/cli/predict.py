"""``patchlife predict``: classify photos and write one record for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import PredictConfig
from ..errors import ConfigError
from ..io.exported_files import is_exported
from .common import (
    calibrate_if_needed,
    check_engine,
    check_has_classes,
    check_takes_any_size,
    classes_of,
    find_samples,
    label_sets_of,
    open_classifier,
    use_threads,
)
from .parts import Verb, write_parts
from .recording import Tally, run_identity, write_results
from .results import KEY, Record, results_in

if TYPE_CHECKING:
    from ..data import AnyPhoto, Sample
    from ..data.labels import Labels
    from ..io.table import Table
    from ..runtime.pipeline import Pipeline

__all__ = ["predict", "run"]


def run(config: PredictConfig) -> int:
    """Write a record for each photo; returns the exit code."""
    check_engine(config.model.model, config.engine, config.trust, config.run.dtype)
    if config.cluster.ray is not None:
        labelled = config.labelled or config.labels_from is not None
        return write_parts(Verb(_open, _settings, _records, _table, _tally, labelled), config)
    results = results_in(None if config.out is None else Path(config.out))
    photos = find_samples(config.paths)
    earlier = results.earlier(config.resume)
    pipeline = _open(config)
    tally = _tally(pipeline.labels, pipeline.multi_label, photos, config)
    calibrated_now = calibrate_if_needed(pipeline, photos, config.run)
    identity = run_identity(pipeline, _settings(pipeline, config), photos if calibrated_now else [])

    def records_of(remaining: Sequence[AnyPhoto]) -> Iterator[Record]:
        return _records(pipeline, remaining, config)

    return write_results(results, photos, earlier, records_of, identity, tally, config.run)


def _settings(pipeline: Pipeline, config: PredictConfig) -> dict[str, Any]:
    """The options that change the records."""
    return {"top": config.top} | ({"multi_label": True} if pipeline.multi_label else {})


def _records(pipeline: Pipeline, photos: Sequence[AnyPhoto], config: PredictConfig) -> Iterator[Record]:
    return predict(pipeline, photos, config.top, config.run.batch_size, config.run.workers)


def _table() -> Table:
    from ..io.parquet import PREDICTIONS

    return PREDICTIONS


def _open(config: PredictConfig) -> Pipeline:
    """Open the model with the requested engine, or the exported file or bundle."""
    if is_exported(config.model.model):
        check_takes_any_size(config.model.model, config.keep_aspect)
        from ..runtime.exported import open_exported

        use_threads(config.run)
        pipeline: Pipeline = open_exported(config.model, config.trust)
        check_has_classes(pipeline)
        return pipeline
    pipeline = open_classifier(config.model, config.run, config.keep_aspect)
    if config.engine in (None, "eager"):
        return pipeline
    from ..export.on_the_fly import with_engine

    return with_engine(pipeline, config.engine, config.run.device)


def predict(
    pipeline: Pipeline, photos: Sequence[AnyPhoto], top: int = 5, batch_size: int = 16, workers: int | None = None
) -> Iterator[Record]:
    """Classify photos; yields one record for each, in their order.

    A record has ``path`` and either ``error`` or these fields: ``top`` (class, label and probability of the most
    likely classes), ``flops``, ``fraction_of_dense`` (of the dense model's FLOPs for its size) and ``kept``
    (patches that enter each block).
    """
    from ..runtime.inference import Failure, predict_photos

    for result in predict_photos(pipeline, photos, batch_size, workers):
        if isinstance(result, Failure):
            yield {KEY: str(result.path), "error": result.error}
            continue
        yield {
            KEY: str(result.path),
            "top": result.top(pipeline.labels, top),
            "flops": result.flops,
            "fraction_of_dense": round(result.flops / result.dense_flops, 6),
            "kept": result.lives.kept[0].tolist(),
        }


# ---- accuracy


@dataclass
class LabelledTally(Tally):
    """Counts with the top-1 accuracy.

    Attributes:
        classes: the class of each photo, by its path.
        labelled: number of processed photos whose class is known.
        correct: number of labelled photos whose predicted class is their class.
    """

    classes: Mapping[str, int] = field(default_factory=dict)
    labelled: int = 0
    correct: int = 0

    def add_result(self, record: Record) -> None:
        """Compare the most likely class with the photo's."""
        if record[KEY] in self.classes:
            self.labelled += 1
            self.correct += record["top"][0]["class"] == self.classes[record[KEY]]

    def summary(self) -> str:
        """The counts in one line."""
        accuracy = f", top-1 {100 * self.correct / self.labelled:.2f} % of {self.labelled}" if self.labelled else ""
        return super().summary() + accuracy


@dataclass
class MultiLabelTally(Tally):
    """Counts with the mean average precision; records must hold the probabilities of all classes.

    Attributes:
        classes: the classes of each photo, by its path.
        probabilities: of all classes, and classes, of each processed photo whose classes are known.
    """

    classes: Mapping[str, set[int]] = field(default_factory=dict)
    probabilities: list[tuple[dict[int, float], set[int]]] = field(default_factory=list)

    def add_result(self, record: Record) -> None:
        """Keep the probabilities."""
        if record[KEY] in self.classes:
            found = {entry["class"]: entry["probability"] for entry in record["top"]}
            self.probabilities.append((found, self.classes[record[KEY]]))

    def summary(self) -> str:
        """The counts in one line."""
        if not self.probabilities:
            return super().summary()
        import torch

        from ..evaluation.average_precision import mean_average_precision

        count = len(self.probabilities[0][0])
        scores = torch.tensor([[found[c] for c in range(count)] for found, _ in self.probabilities])
        positive = torch.tensor([[c in classes for c in range(count)] for _, classes in self.probabilities])
        percent = 100 * mean_average_precision(scores, positive)
        return f"{super().summary()}, mean average precision {percent:.2f} % of {len(self.probabilities)}"


def _tally(labels: Labels, multi_label: bool, photos: Sequence[Path | Sample], config: PredictConfig) -> Tally:
    """Counts, with the accuracy if the photos are labelled."""
    order, table = config.model.class_order, config.labels_from
    if not (config.labelled or table):
        return Tally()
    paths = list(map(str, photos))
    if not multi_label:
        classes = classes_of(labels, photos, order, table)
        return LabelledTally(classes=dict(zip(paths, classes, strict=True)))
    if config.top < (count := len(labels.names)):
        raise ConfigError(
            f"mean average precision needs the probability of every class, got --top {config.top}; give --top {count}"
        )
    label_sets = label_sets_of(labels, photos, order, table)
    return MultiLabelTally(classes=dict(zip(paths, label_sets, strict=True)))
