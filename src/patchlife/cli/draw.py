"""``patchlife draw``: draw the life maps of photos."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ..config import DrawConfig
from ..data import read_photo
from ..errors import ConfigError, ImageError
from ..io.files import write_atomic
from .common import calibrate_if_needed, find_photos, open_classifier, progress, say

if TYPE_CHECKING:
    from ..runtime.inference import Prediction
    from ..runtime.pipeline import Pipeline

__all__ = ["Sheets", "caption", "draw_all", "run", "save_png", "tile"]


def run(config: DrawConfig) -> int:
    """Draw a life map of each photo; returns the exit code."""
    folder = config.out.absolute()
    listed = find_photos(config.paths)
    photos = [p for p in listed if folder not in p.absolute().parents]  # without the pictures of an earlier run
    if not photos:
        raise ConfigError(f"all photos are in the output folder {config.out}; choose another --out")
    pipeline = open_classifier(config.model, config.run)
    calibrate_if_needed(pipeline, photos, config.run)
    failed = 0
    for error in progress(draw_all(pipeline, photos, config), len(photos), config.run.progress):
        if error:
            failed += 1
            say(error)
    say(f"{len(photos) - failed} of {len(photos)} photos drawn; pictures in {config.out}")
    return 1 if failed else 0


def draw_all(pipeline: Pipeline, photos: Sequence[Path], config: DrawConfig) -> Iterator[str | None]:
    """Draw photos into ``config.out``; yields for each, in their order, None or an error message."""
    from ..runtime.inference import Failure, predict_photos

    sheets = Sheets(config.out) if config.sheet else None
    targets = _target_paths(photos, config.out)
    for result in predict_photos(pipeline, photos, config.run.batch_size, config.run.workers):
        if isinstance(result, Failure):
            yield result.error
            continue
        try:
            photo = read_photo(result.path)
        except ImageError as error:  # deleted or changed since it was classified
            yield str(error)
            continue
        _draw(photo, pipeline, result, targets[result.path], config)
        if sheets:
            sheets.add(tile(photo, pipeline, result), caption(pipeline, result))
        yield None
    if sheets:
        sheets.close()


def tile(photo: Image.Image, pipeline: Pipeline, prediction: Prediction) -> Image.Image:
    """A small life map for a contact sheet."""
    from ..visual import draw

    return draw(photo, prediction.lives, preprocess=pipeline.preprocess, width=220, legend=False)


def caption(pipeline: Pipeline, prediction: Prediction) -> str:
    """The predicted class and its probability: "tench 96 %"."""
    probability, index = prediction.probabilities.max(dim=0)
    return f"{pipeline.labels.names[int(index)]} {100 * float(probability):.0f} %"


def save_png(picture: Image.Image, path: Path) -> Path:
    """Write a PNG file atomically; its folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return write_atomic(path, stream.getvalue())


@dataclass
class Sheets:
    """Contact sheets; each is written when it is full.

    Attributes:
        folder: where the sheets are written.
        tiles: pictures per sheet.
    """

    folder: Path
    tiles: int = 100
    _pending: list[tuple[Image.Image, str]] = field(default_factory=list)
    _sheets_written: int = 0

    def add(self, picture: Image.Image, text: str) -> None:
        """Add a picture and its caption."""
        self._pending.append((picture, text))
        if len(self._pending) == self.tiles:
            self.close()

    def close(self) -> None:
        """Write the last sheet, if it has any picture."""
        from ..visual import contact_sheet

        if self._pending:
            self._sheets_written += 1
            save_png(contact_sheet(self._pending), self.folder / f"sheet-{self._sheets_written}.png")
            self._pending.clear()


def _draw(photo: Image.Image, pipeline: Pipeline, prediction: Prediction, target: Path, config: DrawConfig) -> None:
    """Write the pictures of one photo to ``target`` with the suffixes .life.png and .strip.png."""
    from ..visual import draw, strip

    lives, preprocess = prediction.lives, pipeline.preprocess
    life_map = draw(photo, lives, preprocess=preprocess, width=config.width, whole=config.whole)
    save_png(life_map, target.with_name(target.name + ".life.png"))
    if config.strip:
        save_png(strip(photo, lives, preprocess=preprocess), target.with_name(target.name + ".strip.png"))


def _target_paths(photos: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """The path of each photo's pictures: subfolders are kept, suffixes are dropped if the names stay unique."""
    root = os.path.commonpath([photo.absolute().parent for photo in photos])
    relative = {photo: Path(os.path.relpath(photo.absolute(), root)) for photo in photos}
    stems = Counter(path.with_suffix("") for path in relative.values())
    return {
        photo: folder / (path if stems[path.with_suffix("")] > 1 else path.with_suffix(""))
        for photo, path in relative.items()
    }
