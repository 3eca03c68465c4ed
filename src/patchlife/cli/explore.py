"""``patchlife explore``: a page in the browser with a budget to turn, and what it does to a photo and to a folder."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ..config import ExploreConfig
from ..data import list_photos
from ..extras import require
from ..io.exported_files import is_exported
from .common import calibrate_if_needed, check_engine, find_photos, open_model, say, use_threads

if TYPE_CHECKING:
    from ..runtime.pipeline import Pipeline

__all__ = ["run"]


def run(config: ExploreConfig) -> int:
    """Serve the page until it is interrupted; returns the exit code."""
    require("gradio", "explore", "patchlife explore")
    check_engine(config.model.model, None, config.trust, config.run.dtype)
    photos = _photos(config)
    pipeline, budgets = _opened(config)
    from ..explore.explorer import Explorer
    from ..explore.page import launch, page

    if budgets is None:
        calibrate_if_needed(pipeline, photos, config.run)
    if config.host not in ("127.0.0.1", "localhost", "::1"):
        say(f"the page is open to everyone who can reach {config.host}; --host 127.0.0.1 is for this machine only")
    with TemporaryDirectory(prefix="patchlife-explore-") as folder:  # uploads and thumbnails; gone at the end
        os.environ["GRADIO_TEMP_DIR"] = folder
        launch(page(Explorer(pipeline, photos, budgets), photos), config.host, config.port, config.open)
    return 0


def _photos(config: ExploreConfig) -> list[Path]:
    """The photos of the page: those given, or those of the demo."""
    from ..runtime.demo_model import DEMO, demo_folder

    if config.paths:
        return find_photos(config.paths)
    return list_photos(demo_folder() / "photos") if config.model.model == DEMO else []


def _opened(config: ExploreConfig) -> tuple[Pipeline, list[float] | None]:
    """(the model, the budgets of an exported file or bundle; None for any budget)."""
    model = config.model
    if not is_exported(model.model):
        return open_model(model, config.run), None
    from ..runtime.bundle import Bundle
    from ..runtime.exported import open_exported

    use_threads(config.run)
    budgets = Bundle(model.model).budgets if Path(model.model).is_dir() else []
    if budgets and "budget" not in model.life:
        model = replace(model, life=model.life | {"budget": budgets[0]})
    pipeline = open_exported(model, config.trust)
    return pipeline, budgets or [pipeline.model.settings.budget]
