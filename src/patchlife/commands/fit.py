"""``patchlife fit``: a folder of photos in, a life adapter out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..images import list_photos
from ..learn.config import FitConfig
from .common import say

if TYPE_CHECKING:
    from ..labels import Labels
    from ..learn.cache import Photo

__all__ = ["run"]


def run(config: FitConfig) -> int:
    """Learn, save and say where; returns the exit code."""
    paths = list_photos(config.data)
    from ..learn.fit import accelerator_for, fit, work_folder
    from ..models import open_model

    ready = open_model(config.model)  # on the CPU: accelerate moves it
    accelerator = accelerator_for(config.device)
    photos = _photos(paths, ready.labels if config.learn.label_weight else None)
    fitted = fit(ready.model, photos, ready.preprocess, config.out, config.learn, accelerator)
    if accelerator.is_main_process:
        skipped = fitted.cache.skipped
        if skipped:
            say(f"{len(skipped)} photos could not be read, the first: {skipped[0]['error']}")
        say(f"{config.out}: learned from {len(fitted.cache)} photos in {fitted.summary['seconds']:.0f} s")
        say(
            f"{work_folder(config.out) / 'report.html'} shows how it went; delete that folder with its caches when done"
        )
    return 0


def _photos(paths: Sequence[Path], labels: Labels | None) -> list[Photo]:
    """The photos, with the class that their folder names if labels are wanted."""
    from ..learn.cache import Photo

    classes = labels.classes_of(paths) if labels else [-1] * len(paths)
    return [Photo(path, label) for path, label in zip(paths, classes, strict=True)]
