"""What several verbs do alike: talk on the standard error, show progress, get a model pipeline for photos."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..config import ClassOrder, EngineName, ModelConfig, RunConfig
from ..data import PHOTO_SUFFIXES, by_suffix, list_photos
from ..errors import ConfigError
from ..extras import require_engine, require_export
from ..io.files import BUNDLE, is_exported

if TYPE_CHECKING:
    from ..data.labels import Labels
    from ..runtime.pipeline import Pipeline

__all__ = [
    "calibrate_if_needed",
    "check_engine",
    "classes_of",
    "find_photos",
    "open_classifier",
    "progress",
    "say",
    "say_left_out",
]

T = TypeVar("T")


def say(text: str) -> None:
    """Tell the user something that is not a result."""
    print(f"patchlife: {text}", file=sys.stderr)


def check_engine(model: str, engine: EngineName | None, trust: bool) -> None:
    """Refuse what cannot be, and ask for missing packages, before any work.

    Args:
        model: what the user calls MODEL.
        engine: what is to run it.
        trust: open a .pt2 file.

    Raises:
        ConfigError: an exported MODEL and an engine, or trust for another kind of MODEL.
        MissingExtraError: the message is the install line.
    """
    if is_exported(model):
        if engine:
            raise ConfigError(f"{model} is an exported model and brings its engine; drop --engine")
        require_engine(_kind_of(Path(model)), f"running {model}")
    elif trust:
        raise ConfigError(f"trust is about exported .pt2 files, and {model} is none; drop --trust")
    elif engine in ("onnx", "openvino"):
        require_export(engine, what=f"--engine {engine}")


def _kind_of(exported: Path) -> str:
    """What runs an exported file or package; empty if it is damaged, which opening it will say."""
    try:
        if exported.is_dir():
            return str(json.loads((exported / BUNDLE).read_text("utf-8"))["kind"])
        if not zipfile.is_zipfile(exported):
            return "onnx"
        with zipfile.ZipFile(exported) as archive:
            return "openvino" if "model.xml" in archive.namelist() else "torch"
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return ""


def find_photos(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """What `list_photos` finds; says on the standard error how many other files there were."""
    left_out: set[Path] = set()
    photos = list_photos(paths, left_out)
    say_left_out(left_out)
    return photos


def say_left_out(files: Collection[Path]) -> None:
    """Say how many files beside photos a folder or glob holds, if there are any."""
    if files:
        count = "1 file is" if len(files) == 1 else f"{len(files)} files are"
        say(f"{count} left out, by suffix: {by_suffix(files)}; read are {', '.join(PHOTO_SUFFIXES)}")


def classes_of(labels: Labels, photos: Sequence[Path], order: ClassOrder | None) -> list[int]:
    """The class of each photo; says on the standard error how folders are read. ``photos`` are all of them."""
    classes = labels.classes_of(photos, order)
    say(labels.reading(photos, order))
    return classes


def progress(items: Iterable[T], total: int, wanted: bool | None, done: int = 0, unit: str = "photo") -> Iterable[T]:
    """Pass items on behind a progress bar with the time left; by default only if somebody looks.

    Args:
        items: one step each.
        total: all steps, those ``done`` before included.
        wanted: draw the bar or not; None draws it on a terminal.
        done: steps that need not be done again.
        unit: what a step is.
    """
    from tqdm import tqdm

    shown = sys.stderr.isatty() if wanted is None else wanted
    return tqdm(items, total=total, initial=done, unit=unit, disable=not shown, smoothing=0.05)


def open_classifier(config: ModelConfig, run: RunConfig) -> Pipeline:
    """The model on its device. Raises ConfigError if it has no classes to tell apart."""
    from ..runtime.opening import open_pipeline

    pipeline = open_pipeline(config, run.device)
    if not pipeline.labels.names:
        raise ConfigError(f"{pipeline.name} has no classifier, so it says nothing about a photo; patchlife info works")
    return pipeline


def calibrate_if_needed(pipeline: Pipeline, photos: Sequence[Path], run: RunConfig) -> bool:
    """In adaptive mode without thresholds: get them from the photos first; returns whether that was so."""
    model = pipeline.model
    if model.config.mode == "fixed" or model.calibration is not None or not model.schedule().drops:
        return False
    from ..runtime.inference import calibrate

    used = calibrate(pipeline, photos, run.workers)
    say(f"adaptive mode was not calibrated: did it on {used} of the photos, labels not needed")
    return True
