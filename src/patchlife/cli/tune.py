"""``patchlife tune``: search the shapes of the schedules on unlabelled photos, and write an adapter with them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import TuneConfig
from .common import find_photos, open_model, say

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluation.shape_search import Tuning
    from ..runtime.pipeline import Pipeline
    from ..slimming import SlimModel

__all__ = ["run"]

_BATCH = 32


def run(config: TuneConfig) -> int:
    """Search, save the adapter, and print what was found; returns the exit code."""
    from tqdm import tqdm

    from ..adapters import check_free, save
    from ..evaluation.shape_search import candidates, tune
    from ..training.solved_scorer import solved_scorer

    check_free(config.out)
    photos = find_photos(config.paths)
    random.Random(config.seed).shuffle(photos)
    pipeline = open_model(config.model, config.run)
    model = pipeline.model
    images = list(_batches(pipeline, photos[: config.photos], config.run.workers))
    solved = config.scorer == "solved" and not any(True for _ in model.scorer.parameters())
    if solved:
        starts = {shape.start for shape in candidates(model.backbone.depth)} | set(model.starts)
        model.scorer = solved_scorer(model.backbone, images, sorted(starts))
        say(f"solved a scorer for each of the start blocks {', '.join(map(str, sorted(starts)))}")
    shown = None if config.run.progress is None else not config.run.progress
    with tqdm(unit="run", desc="tune", disable=shown) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        tuning = tune(model, images, config.budgets, report)
    model.use_shapes(tuning.shapes)
    if solved:  # the others would only make the adapter larger
        model.scorer = model.scorer.only(model.starts)
    model.tuning = tuning.to_dict()
    if missing := _calibrate_missing(model, images):
        say(f"adaptive mode is calibrated on these photos, for start blocks {', '.join(map(str, missing))}")
    save(model, config.out)
    print(_table(tuning))
    if left_out := sorted(set(config.budgets) - {row.budget for row in tuning.rows} - {1.0}):
        say(f"no shape was searched for budget {', '.join(map(str, left_out))}: out of reach of the model's own shape")
    say(f"{config.out}: shapes of the schedules for {pipeline.name}, from {tuning.photos} photos")
    return 0


def _calibrate_missing(model: SlimModel, images: Sequence[Tensor]) -> list[int]:
    """Calibrate the start blocks without thresholds, which are returned; the thresholds of the others stay."""
    earlier = model.calibrations
    missing = sorted(set(model.starts) - {start for _, start in earlier})
    if missing:
        model.calibrate(images)
        for (_, start), calibration in earlier.items():
            model.use_calibration(calibration, start)
    return missing


def _batches(pipeline: Pipeline, photos: list[Path], workers: int | None) -> Iterator[Tensor]:
    """The photos that can be read, on the model's device. Raises ImageError if none can."""
    from ..data import load_batches
    from ..errors import ImageError

    read = 0
    failures: list[ImageError] = []
    for batch in load_batches(photos, pipeline.preprocess, _BATCH, workers):
        read, failures = read + len(batch.indices), failures + [error for _, error in batch.failures]
        if batch.indices:
            yield batch.images.to(pipeline.device)
    if not read:
        raise ImageError(f"none of the {len(photos)} photos could be read; the first error: {failures[0]}")
    if failures:
        say(f"{len(failures)} photos could not be read; the first error: {failures[0]}")


def _table(tuning: Tuning) -> str:
    """A line for each budget."""
    title = f"budget     before      tuned  drops before blocks ({tuning.measure} from the dense model)"
    rows = [f"{row.budget:>6g}  {row.loss_before:>9.4g}  {row.loss:>9.4g}  {row.shape}" for row in tuning.rows]
    return "\n".join([title, *rows])
