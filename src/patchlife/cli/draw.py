"""``patchlife draw``: photos in, pictures of their patches' lives out."""

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
    """Draw as the command line asks; returns the exit code."""
    folder = config.out.absolute()
    listed = find_photos(config.paths)
    photos = [p for p in listed if folder not in p.absolute().parents]  # not last time's pictures
    if not photos:
        raise ConfigError(f"all photos found lie in {config.out}, where the pictures go; choose another --out")
    pipeline = open_classifier(config.model, config.run)
    calibrate_if_needed(pipeline, photos, config.run)
    failed = 0
    for error in progress(draw_all(pipeline, photos, config), len(photos), config.run.progress):
        if error:
            failed += 1
            say(error)
    say(f"{len(photos) - failed} of {len(photos)} photos drawn into {config.out}")
    return 1 if failed else 0


def draw_all(pipeline: Pipeline, photos: Sequence[Path], config: DrawConfig) -> Iterator[str | None]:
    """Draw photos into ``config.out``; yields for each, in their order, None or why it could not be drawn."""
    from ..runtime.inference import Failure, predict_photos

    sheets = Sheets(config.out) if config.sheet else None
    places = _places(photos, config.out)
    for result in predict_photos(pipeline, photos, config.run.batch_size, config.run.workers):
        if isinstance(result, Failure):
            yield result.error
            continue
        try:
            photo = read_photo(result.path)
        except ImageError as error:  # gone or changed since the model saw it
            yield str(error)
            continue
        _draw(photo, pipeline, result, places[result.path], config)
        if sheets:
            sheets.add(tile(photo, pipeline, result), caption(pipeline, result))
        yield None
    if sheets:
        sheets.close()


def tile(photo: Image.Image, pipeline: Pipeline, answer: Prediction) -> Image.Image:
    """A small life map, for a contact sheet."""
    from ..visual import draw

    return draw(photo, answer.lives, preprocess=pipeline.preprocess, width=220, legend=False)


def caption(pipeline: Pipeline, answer: Prediction) -> str:
    """What the model says about a photo: "tench 96 %"."""
    probability, index = answer.probabilities.max(dim=0)
    return f"{pipeline.labels.names[int(index)]} {100 * float(probability):.0f} %"


def save_png(picture: Image.Image, path: Path) -> Path:
    """Write a picture, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return write_atomic(path, stream.getvalue())


@dataclass
class Sheets:
    """Contact sheets that are written as they fill up.

    Attributes:
        folder: where to.
        tiles: pictures in a sheet.
    """

    folder: Path
    tiles: int = 100
    _waiting: list[tuple[Image.Image, str]] = field(default_factory=list)
    _written: int = 0

    def add(self, picture: Image.Image, text: str) -> None:
        """Put a picture on the sheet."""
        self._waiting.append((picture, text))
        if len(self._waiting) == self.tiles:
            self.close()

    def close(self) -> None:
        """Write what has come together."""
        from ..visual import contact_sheet

        if self._waiting:
            self._written += 1
            save_png(contact_sheet(self._waiting), self.folder / f"sheet-{self._written}.png")
            self._waiting.clear()


def _draw(photo: Image.Image, pipeline: Pipeline, answer: Prediction, place: Path, config: DrawConfig) -> None:
    """Write one photo's pictures to ``place``, with endings of their own."""
    from ..visual import draw, strip

    lives, looks = answer.lives, pipeline.preprocess
    life_map = draw(photo, lives, preprocess=looks, width=config.width, whole=config.whole)
    save_png(life_map, place.with_name(place.name + ".life.png"))
    if config.strip:
        save_png(strip(photo, lives, preprocess=looks), place.with_name(place.name + ".strip.png"))


def _places(photos: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Where each photo's pictures go: the photos' own tree, suffixes dropped unless two would collide."""
    root = os.path.commonpath([photo.absolute().parent for photo in photos])
    inside = {photo: Path(os.path.relpath(photo.absolute(), root)) for photo in photos}
    taken = Counter(path.with_suffix("") for path in inside.values())
    return {
        photo: folder / (path if taken[path.with_suffix("")] > 1 else path.with_suffix(""))
        for photo, path in inside.items()
    }
