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
    """Train and save an adapter; returns the exit code."""
    for package in ("accelerate", "matplotlib"):  # matplotlib draws the report after the training
        require(package, "learn", "patchlife fit")
    if config.learn.tensorboard:
        require("tensorboard", "tensorboard", "--tensorboard")
    left_out: set[Path] = set()
    sources = list_samples(config.data, left_out)
    from ..runtime.opening import open_pipeline
    from ..training.fit import accelerator_for, fit, work_folder

    pipeline = open_pipeline(config.model)  # on the CPU; accelerate moves the model
    accelerator = accelerator_for(config.device)
    order = config.model.class_order
    photos = _Photos(sources, pipeline.labels if config.learn.label_weight else None, order)
    validation_sets = _validation_sets(config.validation, pipeline.labels, order)
    if accelerator.is_main_process:
        say_left_out(left_out)
        for text in dict.fromkeys(p.folder_description for p in (photos, *validation_sets.values())):
            if text:
                say(text)
    validation = {name: _evenly_spaced_labelled(validation_set) for name, validation_set in validation_sets.items()}
    fitted = fit(pipeline.model, photos, pipeline.preprocess, config.out, config.learn, accelerator, validation)
    if accelerator.is_main_process:
        skipped = fitted.cache.skipped
        if skipped:
            say(f"{len(skipped)} photos could not be read; the first error: {skipped[0]['error']}")
        say(f"{config.out}: trained on {len(fitted.cache)} photos in {fitted.summary['seconds']:.0f} s")
        work = work_folder(config.out)
        say(f"training report: {work / 'report.html'}; {work} also holds caches and may be deleted")
    return 0


def _validation_sets(folders: Sequence[str], labels: Labels, order: ClassOrder | None) -> dict[str, _Photos]:
    """The labelled photos of each validation folder, by the name of the set."""
    from ..training.validation import set_names

    names = set_names(folders)
    return {name: _Photos(list_samples([folder]), labels, order) for name, folder in zip(names, folders, strict=True)}


def _evenly_spaced_labelled(photos: _Photos) -> list[Photo]:
    """The photos of a set that are used for validation. Raises ConfigError if one has no label."""
    from ..training.validation import MOST_PHOTOS

    chosen = evenly_spaced(photos, MOST_PHOTOS)
    if unknown := [photo.path for photo in chosen if photo.label < 0]:
        raise ConfigError(
            f"--validation: expected labelled photos, got {unknown[0]} without a label; label the photo or remove it"
        )
    return chosen


class _Photos(Sequence["Photo"]):
    """Photos with their class indices; -1 for all photos if ``labels`` is None.

    The label of a sample is read from its shard or data set only when the sample is indexed, because a fit may use a
    thousand of a million samples.

    Attributes:
        folder_description: how folder names are read as classes; empty if they are not read.
    """

    def __init__(self, sources: Sequence[Path | Sample], labels: Labels | None, order: ClassOrder | None) -> None:
        files = [source for source in sources if isinstance(source, Path)]  # list_samples lists files first
        self._sources, self._labels = sources, labels
        folder_labels = labels if files else None
        self._classes = folder_labels.classes_of(files, order) if folder_labels else [-1] * len(files)
        self.folder_description = folder_labels.describe_folders(files, order) if folder_labels else ""

    def __len__(self) -> int:
        return len(self._sources)

    @overload
    def __getitem__(self, index: int) -> Photo: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Photo]: ...
    def __getitem__(self, index: int | slice) -> Photo | Sequence[Photo]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        from ..training.target_cache import Photo

        source = self._sources[index]
        if isinstance(source, Sample):
            return Photo(source, self._labels.class_of_label(source.label, source) if self._labels else -1)
        return Photo(source, self._classes[index])
