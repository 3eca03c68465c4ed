"""``patchlife fit``: train a life adapter on photos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

from ..config import ClassOrder, FitConfig
from ..data import Sample, evenly_spaced, list_samples
from ..errors import ConfigError
from ..extras import require
from .common import say, say_left_out

if TYPE_CHECKING:
    from ..data.labels import Labels
    from ..training.target_cache import Photo

__all__ = ["run"]


def run(config: FitConfig) -> int:
    """Train, save the adapter, and print where it is; returns the exit code."""
    for package in ("accelerate", "matplotlib"):  # matplotlib draws the report after training
        require(package, "train", "patchlife fit")
    if config.training.tracker:
        from ..training.log import check_tracker

        check_tracker(config.training.tracker)
    left_out: set[Path] = set()
    samples = list_samples(config.data, left_out)
    from ..runtime.opening import open_pipeline
    from ..training.fit import accelerator_for, fit, work_folder

    pipeline = open_pipeline(config.model)  # on the CPU: accelerate moves it
    work = work_folder(config.out)
    accelerator = accelerator_for(config.device, config.training.tracker, work)
    order = config.model.class_order
    use_labels = config.training.label_weight and pipeline.labels.names  # without a classifier `fit` refuses the weight
    photos = _Photos(samples, pipeline.labels if use_labels else None, order)
    validation = _validation_sets(config.validation, pipeline.labels, order)
    if accelerator.is_main_process:
        say_left_out(left_out)
        notes = [photo_set.class_note for photo_set in (photos, *validation.values())]
        for note in dict.fromkeys(filter(None, notes)):
            say(note)
    required = bool(pipeline.labels.names) and config.training.target != "features"
    chosen = {name: _validation_photos(photo_set, required) for name, photo_set in validation.items()}
    try:
        fitted = fit(pipeline.model, photos, pipeline.preprocess, config.out, config.training, accelerator, chosen)
    finally:
        accelerator.end_training()  # closes the trackers
    if accelerator.is_main_process:
        skipped = fitted.summary["skipped"]
        if skipped:
            say(f"{len(skipped)} photos could not be read; the first error: {skipped[0]['error']}")
        for stage, seconds in fitted.summary["seconds_per_step"].items():
            say(f"stage {stage}: {seconds} s per step" if seconds else f"stage {stage}: no steps")
        say(f"{config.out}: trained on {fitted.summary['photos']} photos in {fitted.summary['seconds']:.0f} s")
        say(f"{work / 'report.html'} has curves and results; {work} holds caches and can be deleted")
    return 0


def _validation_sets(folders: Sequence[str], labels: Labels, order: ClassOrder | None) -> dict[str, _Photos]:
    """The photos of each validation folder, with their classes, by the name of the set.

    For a model without classes each folder of a set is a class; of a set with one folder the classes are unknown.
    """
    from ..data.labels import folder_labels
    from ..training.validation import set_names

    sets = {}
    for name, folder in zip(set_names(folders), folders, strict=True):
        samples = list_samples([folder])
        own = labels if labels.names else folder_labels(path for path in samples if isinstance(path, Path))
        known = labels.names or (len(own.names) > 1 and all(isinstance(path, Path) for path in samples))
        sets[name] = _Photos(samples, own if known else None, order if labels.names else None)
    return sets


def _validation_photos(photos: _Photos, required: bool) -> list[Photo]:
    """The photos of a validation set that are used. Raises ConfigError if one has no label and labels are required."""
    from ..training.validation import MAX_PHOTOS

    chosen = evenly_spaced(photos, MAX_PHOTOS)
    if required and (unlabelled := [photo.path for photo in chosen if photo.label < 0]):
        raise ConfigError(
            f"--validation: expected labelled photos, got {unlabelled[0]} without a label; label it or leave it out"
        )
    return chosen


class _Photos(Sequence["Photo"]):
    """Photos with the class index of their folder, shard or data set; -1 for all photos if ``labels`` is None.

    The label of a sample is read from its shard only when the photo is used: a fit may use a thousand of a million.
    ``class_note`` says how names of folders are read as classes; it is empty if no folder is read.
    """

    def __init__(self, samples: Sequence[Path | Sample], labels: Labels | None, order: ClassOrder | None) -> None:
        files = [path for path in samples if isinstance(path, Path)]  # files come first
        self._samples, self._labels = samples, labels
        by_folder = labels if files else None
        self._classes = by_folder.classes_of(files, order) if by_folder else [-1] * len(files)
        self.class_note = by_folder.describe_folders(files, order) if by_folder else ""

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, index: int) -> Photo: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Photo]: ...
    def __getitem__(self, index: int | slice) -> Photo | Sequence[Photo]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        from ..training.target_cache import Photo

        source = self._samples[index]
        if isinstance(source, Sample):
            return Photo(source, self._labels.class_of_label(source.label, source) if self._labels else -1)
        return Photo(source, self._classes[index])
