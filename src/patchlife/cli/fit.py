"""``patchlife fit``: photos in, a life adapter out."""

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
    """Learn, save and say where; returns the exit code."""
    for package in ("accelerate", "matplotlib"):  # the second one draws the report, when all is learned
        require(package, "learn", "patchlife fit")
    if config.learn.tensorboard:
        require("tensorboard", "tensorboard", "--tensorboard")
    left_out: set[Path] = set()
    found = list_samples(config.data, left_out)
    from ..runtime.opening import open_pipeline
    from ..training.fit import accelerator_for, fit, work_folder

    pipeline = open_pipeline(config.model)  # on the CPU: accelerate moves it
    accelerator = accelerator_for(config.device)
    order = config.model.class_order
    photos = _Photos(found, pipeline.labels if config.learn.label_weight else None, order)
    validated = _validated(config.validation, pipeline.labels, order)
    if accelerator.is_main_process:
        say_left_out(left_out)
        for reading in dict.fromkeys(given.reading for given in (photos, *validated.values()) if given.reading):
            say(reading)
    seen = {name: _seen(given) for name, given in validated.items()}
    fitted = fit(pipeline.model, photos, pipeline.preprocess, config.out, config.learn, accelerator, seen)
    if accelerator.is_main_process:
        skipped = fitted.cache.skipped
        if skipped:
            say(f"{len(skipped)} photos could not be read, the first: {skipped[0]['error']}")
        say(f"{config.out}: learned from {len(fitted.cache)} photos in {fitted.summary['seconds']:.0f} s")
        say(
            f"{work_folder(config.out) / 'report.html'} shows how it went; delete that folder with its caches when done"
        )
    return 0


def _validated(folders: Sequence[str], labels: Labels, order: ClassOrder | None) -> dict[str, _Photos]:
    """The photos of each folder that is looked at, with their classes."""
    from ..training.validation import set_names

    names = set_names(folders)
    return {name: _Photos(list_samples([folder]), labels, order) for name, folder in zip(names, folders, strict=True)}


def _seen(photos: _Photos) -> list[Photo]:
    """Those of the photos that are looked at. Raises ConfigError if one has no label."""
    from ..training.validation import MOST_PHOTOS

    chosen = evenly_spaced(photos, MOST_PHOTOS)
    if unknown := [photo.path for photo in chosen if photo.label < 0]:
        raise ConfigError(
            f"validation: expected labelled photos, got {unknown[0]} without a label; label it, or leave it"
        )
    return chosen


class _Photos(Sequence["Photo"]):
    """The photos, with the class that their folder, shard or data set names if labels are wanted.

    A sample's label is read from its shard when the photo is taken: of a million, a fit may draw a thousand.
    ``reading`` says how the names of folders are read; it is empty where none are.
    """

    def __init__(self, found: Sequence[Path | Sample], labels: Labels | None, order: ClassOrder | None) -> None:
        files = [path for path in found if isinstance(path, Path)]  # these come first
        self._found, self._labels = found, labels
        by_folder = labels if files else None
        self._classes = by_folder.classes_of(files, order) if by_folder else [-1] * len(files)
        self.reading = by_folder.reading(files, order) if by_folder else ""

    def __len__(self) -> int:
        return len(self._found)

    @overload
    def __getitem__(self, index: int) -> Photo: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Photo]: ...
    def __getitem__(self, index: int | slice) -> Photo | Sequence[Photo]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        from ..training.target_cache import Photo

        source = self._found[index]
        if isinstance(source, Sample):
            return Photo(source, self._labels.class_said(source.label, source) if self._labels else -1)
        return Photo(source, self._classes[index])
