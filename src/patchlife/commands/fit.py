"""``patchlife fit``: photos in, a life adapter out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

from ..errors import ConfigError
from ..images import Sample, list_samples
from ..learn.config import FitConfig
from .common import say

if TYPE_CHECKING:
    from ..labels import Labels
    from ..learn.cache import Photo

__all__ = ["run"]


def run(config: FitConfig) -> int:
    """Learn, save and say where; returns the exit code."""
    found = list_samples(config.data)
    from ..learn.fit import accelerator_for, fit, work_folder
    from ..models import open_model

    ready = open_model(config.model)  # on the CPU: accelerate moves it
    accelerator = accelerator_for(config.device)
    photos = _Photos(found, ready.labels if config.learn.label_weight else None)
    watched = _watched(config.watch, ready.labels)
    fitted = fit(ready.model, photos, ready.preprocess, config.out, config.learn, accelerator, watched)
    if accelerator.is_main_process:
        skipped = fitted.cache.skipped
        if skipped:
            say(f"{len(skipped)} photos could not be read, the first: {skipped[0]['error']}")
        say(f"{config.out}: learned from {len(fitted.cache)} photos in {fitted.summary['seconds']:.0f} s")
        say(
            f"{work_folder(config.out) / 'report.html'} shows how it went; delete that folder with its caches when done"
        )
    return 0


def _watched(folders: Sequence[str], labels: Labels) -> dict[str, list[Photo]]:
    """The photos of each folder that is looked at, with their classes."""
    from ..learn.watch import set_names, spread

    sets = {}
    for name, folder in zip(set_names(folders), folders, strict=True):
        sets[name] = spread(_Photos(list_samples([folder]), labels))
        if unknown := [photo.path for photo in sets[name] if photo.label < 0]:
            raise ConfigError(
                f"watch: expected labelled photos, got {unknown[0]} without a label; label it, or leave it"
            )
    return sets


class _Photos(Sequence["Photo"]):
    """The photos, with the class that their folder, shard or data set names if labels are wanted.

    A sample's label is read from its shard when the photo is taken: of a million, a fit may draw a thousand.
    """

    def __init__(self, found: Sequence[Path | Sample], labels: Labels | None) -> None:
        files = [path for path in found if isinstance(path, Path)]  # these come first
        self._found, self._labels = found, labels
        self._classes = labels.classes_of(files) if labels else [-1] * len(files)

    def __len__(self) -> int:
        return len(self._found)

    @overload
    def __getitem__(self, index: int) -> Photo: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Photo]: ...
    def __getitem__(self, index: int | slice) -> Photo | Sequence[Photo]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        from ..learn.cache import Photo

        source = self._found[index]
        if isinstance(source, Sample):
            return Photo(source, self._labels.class_said(source.label, source) if self._labels else -1)
        return Photo(source, self._classes[index])
