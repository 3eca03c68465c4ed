"""What several verbs do alike: talk on the standard error, show progress, get a model ready for photos."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..config import ModelConfig, RunConfig
from ..errors import ConfigError
from ..files import is_exported

if TYPE_CHECKING:
    from ..models import ReadyModel

__all__ = ["calibrate_if_needed", "check_engine", "open_classifier", "progress", "say"]

T = TypeVar("T")


def say(text: str) -> None:
    """Tell the user something that is not a result."""
    print(f"patchlife: {text}", file=sys.stderr)


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


def check_engine(model: str, engine: str | None, trust: bool) -> None:
    """Refuse what cannot be, and ask for missing packages, before any work.

    Args:
        model: what the user calls MODEL.
        engine: what is to run it.
        trust: open a .pt2 file.

    Raises:
        ConfigError: an exported MODEL and an engine, or trust for another kind of MODEL.
        MissingExtraError: the message is the install line.
        ExportError: MODEL is a damaged package.
    """
    if is_exported(model):
        if engine:
            raise ConfigError(f"{model} is an exported model and brings its engine; drop --engine")
        from ..deploy.engines import format_of
        from ..deploy.extras import need_for_run

        return need_for_run(format_of(Path(model)))
    if trust:
        raise ConfigError(f"trust is about exported .pt2 files, and {model} is none; drop --trust")
    if engine not in (None, "eager"):
        from ..deploy.extras import need_for_export

        need_for_export(engine)


def open_classifier(config: ModelConfig, run: RunConfig) -> ReadyModel:
    """The model on its device. Raises ConfigError if it has no classes to tell apart."""
    from ..models import open_model

    ready = open_model(config, run.device)
    if not ready.labels.names:
        raise ConfigError(f"{ready.name} has no classifier, so it says nothing about a photo; patchlife info works")
    return ready


def calibrate_if_needed(ready: ReadyModel, photos: Sequence[Path], run: RunConfig) -> bool:
    """In adaptive mode without thresholds: get them from the photos first; returns whether that was so."""
    model = ready.model
    if model.config.mode == "fixed" or model.calibration is not None or not model.schedule().drops:
        return False
    from ..inference import calibrate

    used = calibrate(ready, photos, run.workers)
    say(f"adaptive mode was not calibrated: did it on {used} of the photos, labels not needed")
    return True
