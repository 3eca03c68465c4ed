"""Functions shared by several verbs: messages on standard error, progress bars, finding photos, opening models."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..config import ClassOrder, EngineName, ModelConfig, Precision, RunConfig
from ..data import PHOTO_SUFFIXES, AnyPhoto, Sample, by_suffix, list_photos, list_samples
from ..errors import ConfigError
from ..extras import require_engine, require_export
from ..io.exported_files import BUNDLE, exported_format, is_exported

if TYPE_CHECKING:
    from ..data.labels import Labels
    from ..runtime.pipeline import Pipeline

__all__ = [
    "calibrate_if_needed",
    "check_engine",
    "check_has_classes",
    "check_takes_any_size",
    "classes_of",
    "find_photos",
    "find_samples",
    "label_sets_of",
    "needs_calibration",
    "open_classifier",
    "open_model",
    "progress",
    "say",
    "say_left_out",
    "size_note",
    "use_threads",
]

T = TypeVar("T")


def say(text: str) -> None:
    """Print a message to standard error; results go to standard output."""
    print(f"patchlife: {text}", file=sys.stderr)


def check_engine(model: str, engine: EngineName | None, trust: bool, dtype: Precision = "float32") -> None:
    """Check MODEL, --engine, --trust and --dtype against each other, and that the needed packages are installed.

    Args:
        model: the MODEL argument.
        engine: the --engine option.
        trust: the --trust option.
        dtype: the --dtype option.

    Raises:
        ConfigError: --engine or --dtype with an exported MODEL, or --trust with any other MODEL.
        MissingExtraError: a package is not installed; the message says how to install it.
    """
    if is_exported(model):
        if engine:
            raise ConfigError(f"{model} is an exported model, which is run by the engine of its format; drop --engine")
        if dtype != "float32":
            raise ConfigError(
                f"{model} is an exported model, which runs in its own number format; remove --dtype {dtype}"
            )
        require_engine(_kind_of(Path(model)), f"running {model}")
    elif trust:
        raise ConfigError(f"--trust is only for exported .pt2 files, got {model}; drop --trust")
    elif engine in ("onnx", "openvino"):
        require_export(engine, what=f"--engine {engine}")


def _kind_of(exported: Path) -> str:
    """The format of an exported file or bundle; empty if it is damaged, which is reported when it is opened."""
    try:
        if exported.is_dir():
            return str(json.loads((exported / BUNDLE).read_text("utf-8"))["kind"])
        with open(exported, "rb") as file:
            return exported_format(file)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return ""


def find_photos(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """List photos as `list_photos` does, and print how many other files were left out."""
    left_out: set[Path] = set()
    photos = list_photos(paths, left_out)
    say_left_out(left_out)
    return photos


def find_samples(paths: Iterable[str]) -> list[Path | Sample]:
    """List photos as `list_samples` does, and print how many other files were left out."""
    left_out: set[Path] = set()
    photos = list_samples(paths, left_out)
    say_left_out(left_out)
    return photos


def say_left_out(files: Collection[Path]) -> None:
    """Print how many files were left out because they are not photos, if there are any."""
    if files:
        count = "1 file is" if len(files) == 1 else f"{len(files)} files are"
        say(f"{count} left out, by suffix: {by_suffix(files)}; suffixes of photos are {', '.join(PHOTO_SUFFIXES)}")


def classes_of(
    labels: Labels, given: Sequence[Path | Sample], order: ClassOrder | None, table: Path | None = None
) -> list[int]:
    """The class index of each photo, from its folder, the label in its shard, or the CSV file ``table``.

    Prints how folder names are read. ``given`` must be the whole data set.
    """
    samples = [photo for photo in given if isinstance(photo, Sample)]
    if samples:
        return _classes_of_samples(labels, samples, len(given), table)
    photos = [photo for photo in given if not isinstance(photo, Sample)]
    if table is None:
        classes = labels.classes_of(photos, order)
        say(labels.describe_folders(photos, order))
        return classes
    from ..data.label_table import read_label_table, separated

    rows = read_label_table(table, photos)
    try:
        class_of_text = labels.classes_of_texts({row.label: row.where for row in reversed(rows)}, order)
    except ConfigError as error:
        if not any(len(separated(row.label)) > 1 for row in rows):
            raise
        raise ConfigError(f"{error}; several labels of a photo need a multi-label model (--multi-label)") from None
    return [class_of_text[row.label] for row in rows]


def _classes_of_samples(labels: Labels, samples: Sequence[Sample], photos: int, table: Path | None) -> list[int]:
    """The class index of each sample of shards. Raises ConfigError if a photo is no sample or has no label."""
    if table is not None or len(samples) < photos:
        raise ConfigError(
            "accuracy needs either files, in folders of their classes or in a CSV file, or shards with labels, got "
            "both kinds; give one kind"
        )
    found = {sample: labels.class_of_label(sample.label, sample) for sample in samples}
    if unlabelled := [sample for sample, index in found.items() if index < 0]:
        raise ConfigError(
            f"{unlabelled[0]} has no label; give shards with KEY.cls or KEY.json, or photos in folders of their classes"
        )
    return [found[sample] for sample in samples]


def label_sets_of(
    labels: Labels, photos: Sequence[Path | Sample], order: ClassOrder | None, table: Path | None
) -> list[set[int]]:
    """The class indices of each photo for a multi-label model; without ``table`` one class, that of the folder."""
    if table is None:
        return [{index} for index in classes_of(labels, photos, order)]
    from ..data.label_table import read_label_table, separated

    if any(isinstance(photo, Sample) for photo in photos):
        raise ConfigError("--labels-from has the labels of files, got photos in shards or at addresses; give files")
    rows = read_label_table(table, [photo for photo in photos if not isinstance(photo, Sample)])
    where = {text: row.where for row in reversed(rows) for text in separated(row.label)}
    class_of_text = labels.classes_of_texts(where, order)
    return [{class_of_text[text] for text in separated(row.label)} for row in rows]


def progress(items: Iterable[T], total: int, wanted: bool | None, done: int = 0, unit: str = "photo") -> Iterable[T]:
    """Iterate over items with a progress bar.

    Args:
        items: one for each step.
        total: number of steps, including those ``done`` before.
        wanted: whether to draw the bar; None draws it if standard error is a terminal.
        done: steps that an earlier run completed.
        unit: what the bar calls a step.
    """
    from tqdm import tqdm

    shown = sys.stderr.isatty() if wanted is None else wanted
    return tqdm(items, total=total, initial=done, unit=unit, disable=not shown, smoothing=0.05)


def use_threads(run: RunConfig) -> None:
    """Set the number of CPU threads of torch, and of engines that are opened afterwards; nothing without --threads."""
    if run.threads:
        import torch

        torch.set_num_threads(run.threads)


def open_model(config: ModelConfig, run: RunConfig, keep_aspect: bool = False) -> Pipeline:
    """Open a model on its device, in its number format; prints if its image processor changed its image size."""
    from ..runtime.opening import open_pipeline

    use_threads(run)
    pipeline = open_pipeline(config, run.device, dtype=run.dtype, keep_aspect=keep_aspect)
    if note := size_note(pipeline, config):
        say(note)
    return pipeline


def open_classifier(config: ModelConfig, run: RunConfig, keep_aspect: bool = False) -> Pipeline:
    """`open_model`. Raises ConfigError if it has no classifier."""
    pipeline = open_model(config, run, keep_aspect)
    check_has_classes(pipeline)
    return pipeline


def check_takes_any_size(model: str, keep_aspect: bool) -> None:
    """Raise ConfigError for --keep-aspect with an exported MODEL."""
    if keep_aspect:
        raise ConfigError(
            f"{model} is an exported model, which takes images of one size; remove --keep-aspect, or give the model or "
            "adapter that it was exported from"
        )


def check_has_classes(pipeline: Pipeline) -> None:
    """Raise ConfigError for a model without a classifier."""
    if not pipeline.labels.names:
        raise ConfigError(
            f"{pipeline.name} has no classifier, so it gives embeddings: write them with patchlife embed, or choose a "
            "model with classes"
        )


def size_note(pipeline: Pipeline, config: ModelConfig) -> str:
    """One sentence if the image processor of a model of transformers changed its image size; otherwise empty."""
    backbone = pipeline.model.backbone
    if config.image_size or backbone.image_size == backbone.trained_size:
        return ""
    (rows, cols), own = backbone.image_size, backbone.trained_size
    return (
        f"photos are resized to {rows} x {cols} pixels, as the model's image processor does; its position embeddings, "
        f"made for {own[0]} x {own[1]}, are interpolated (--image-size {own[0]} for their own size)"
    )


def needs_calibration(pipeline: Pipeline) -> bool:
    """Whether the model is adaptive and has no thresholds."""
    model = pipeline.model
    calibrated = model.calibration is not None and set(model.starts) <= {start for _, start in model.calibrations}
    return not (model.settings.mode == "fixed" or calibrated or not model.schedule().drops)


def calibrate_if_needed(pipeline: Pipeline, photos: Sequence[AnyPhoto], run: RunConfig) -> bool:
    """Calibrate an adaptive model that has no thresholds, on the photos; returns whether this was needed."""
    if not needs_calibration(pipeline):
        return False
    from ..runtime.inference import calibrate

    used = calibrate(pipeline, photos, run.workers)
    say(f"adaptive mode was not calibrated; calibrated it on {used} of the photos (without labels)")
    return True
