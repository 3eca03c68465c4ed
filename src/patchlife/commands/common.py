"""What several verbs do alike: talk on the standard error, show progress, get a model ready for photos."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..config import ModelConfig, RunConfig
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..models import ReadyModel

__all__ = ["calibrate_if_needed", "open_classifier", "progress", "say"]

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
