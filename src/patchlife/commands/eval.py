"""``patchlife eval``: accuracy at several budgets, photo by photo against the dense model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ImageError, MissingExtraError
from ..files import write_atomic
from ..images import list_photos
from ..learn.config import EvalConfig
from .common import calibrate_if_needed, open_classifier, progress, say

if TYPE_CHECKING:
    import torch

    from ..measure.accuracy import Score
    from ..models import ReadyModel

__all__ = ["run", "text_table"]


def run(config: EvalConfig) -> int:
    """Measure, print a table, write JSON and a plot; returns the exit code."""
    photos = list_photos(config.data)[:: config.every]
    from ..life.change import undone
    from ..measure.accuracy import evaluate

    ready = open_classifier(config.model, config.run)
    model = ready.model
    if "adaptive" in config.modes:
        model.set_mode("adaptive")
        calibrate_if_needed(ready, photos, config.run)
    dense = undone(model.backbone.vit, model.change.tensors) if model.change else model.backbone.vit
    failures: list[str] = []
    scores = evaluate(
        model,
        dense,
        _batches(ready, photos, config, failures),
        config.settings,
    )
    print(text_table(scores, len(photos) - len(failures)))
    if failures:
        say(f"{len(failures)} photos failed (the first: {failures[0]})")
    if config.out:
        _write(config.out, _result(config, ready, scores, len(photos), failures), scores)
    return 1 if failures else 0


def text_table(scores: Sequence[Score], photos: int) -> str:
    """The scores for people."""
    head = (
        f"{'mode':9}{'budget':>7}{'FLOPs':>7}{'top-1':>7}{'top-5':>7}{'drop (95 % interval)':>24}{'agree':>7}{'KL':>7}"
    )
    lines = [head]
    for s in scores:
        low, high = (100 * bound for bound in s.drop_interval)
        drop = f"{100 * s.drop:.2f} ({low:.2f} to {high:.2f})"
        lines.append(
            f"{s.mode:9}{s.budget:7.2f}{s.fraction:7.3f}{100 * s.top1:7.2f}{100 * s.top5:7.2f}{drop:>24}"
            f"{100 * s.agreement:7.1f}{s.divergence:7.3f}"
        )
    lines.append(f"{photos} photos; top-1, top-5, drop and agreement in %; FLOPs as a fraction of dense; KL in nats")
    return "\n".join(lines)


def _batches(
    ready: ReadyModel, photos: Sequence[Path], config: EvalConfig, failures: list[str]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Images and their classes; photos that cannot be read are added to ``failures``."""
    import torch

    from ..images import load_batches

    classes = ready.labels.classes_of(photos)
    batch_size, workers = config.run.batch_size, config.run.workers
    batches = load_batches(photos, ready.preprocess, batch_size, workers)
    for batch in progress(batches, -(-len(photos) // batch_size), config.run.progress, unit="batch"):
        failures += [str(error) for _, error in batch.failures]
        if batch.indices:
            yield batch.images, torch.tensor([classes[index] for index in batch.indices])
    if len(failures) == len(photos):
        raise ImageError(f"not one of {len(photos)} photos could be read; the first: {failures[0]}")


def _result(
    config: EvalConfig, ready: ReadyModel, scores: Sequence[Score], photos: int, failures: list[str]
) -> dict[str, Any]:
    from .. import __version__
    from ..measure.timing import conditions

    return {
        "patchlife": __version__,
        "model": ready.name,
        "adapter": config.model.model if Path(config.model.model).is_dir() else None,
        "data": str(config.data),
        "photos": photos - len(failures),
        "failures": failures,
        "scores": [score.to_dict() for score in scores],
        "conditions": conditions(ready.device) | {"batch_size": config.run.batch_size},
    }


def _write(out: Path, result: dict[str, Any], scores: Sequence[Score]) -> None:
    from ..measure.tradeoff import plot_tradeoff

    write_atomic(out, json.dumps(result, indent=2) + "\n")
    try:
        picture = plot_tradeoff(scores, f"{result['model']} on {result['photos']} photos")
    except MissingExtraError as error:
        say(f"no plot: {error}")
        return
    picture.save(out.with_suffix(".png"))
    say(f"wrote {out} and {out.with_suffix('.png').name}")
