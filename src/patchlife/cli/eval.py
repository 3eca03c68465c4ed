"""``patchlife eval``: accuracy at several budgets, compared with the dense model on the same photos."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import EvalConfig
from ..errors import ConfigError, ImageError, MissingExtraError
from ..extras import installed
from ..io.exported_files import is_exported
from ..io.files import write_atomic
from .common import (
    calibrate_if_needed,
    check_engine,
    classes_of,
    find_photos,
    label_sets_of,
    open_classifier,
    progress,
    say,
)

if TYPE_CHECKING:
    import torch

    from ..evaluation.accuracy import Score
    from ..evaluation.multi_label import MultiLabelScore
    from ..runtime.pipeline import Pipeline

__all__ = ["run", "text_table"]


def run(config: EvalConfig) -> int:
    """Evaluate, print a table, write a JSON file and a plot; returns the exit code."""
    check_engine(config.model.model, config.engine, config.trust, config.run.dtype)
    plots = installed("matplotlib")
    if config.out and not plots:
        say(f"the plot is left out: {MissingExtraError('matplotlib', 'bench', 'the trade-off plot')}")
    listed = find_photos(config.data)
    photos = listed[:: config.every]
    from ..evaluation.accuracy import evaluate

    evaluated = _open_bundle(config, photos) if is_exported(config.model.model) else _open_model(config, photos)
    pipeline = evaluated.pipeline
    order = config.model.class_order
    if pipeline.multi_label:
        label_sets = label_sets_of(pipeline.labels, listed, order, config.labels_from)[:: config.every]
        return _run_multi_label(config, evaluated, photos, label_sets)
    classes = classes_of(pipeline.labels, listed, order, config.labels_from)[:: config.every]
    failures: list[str] = []
    batches = _batches(pipeline, photos, classes, config, failures)
    scores = evaluate(pipeline.model, evaluated.dense, batches, config.settings, evaluated.device)
    print(text_table(scores, len(photos) - len(failures)))
    if failures:
        say(f"{len(failures)} photos failed (the first: {failures[0]})")
    if config.out:
        _write(config.out, _result(config, evaluated, scores, len(photos), failures), scores, plots)
    return 1 if failures else 0


def _run_multi_label(
    config: EvalConfig, evaluated: _Evaluated, photos: Sequence[Path], label_sets: Sequence[set[int]]
) -> int:
    """As `run`, for a multi-label model: mean average precision instead of top-1, and no plot."""
    from ..evaluation.multi_label import evaluate_multi_label

    pipeline, failures = evaluated.pipeline, list[str]()
    classes = [[index in found for index in range(len(pipeline.labels.names))] for found in label_sets]
    batches = _batches(pipeline, photos, classes, config, failures)
    scores = evaluate_multi_label(pipeline.model, evaluated.dense, batches, config.settings, evaluated.device)
    print(f"{'mode':9}{'budget':>7}{'FLOPs':>7}{'mAP':>7}{'drop':>7}{'difference':>12}")
    for s in scores:
        percent = f"{100 * s.mean_average_precision:7.2f}{100 * s.drop:7.2f}"
        print(f"{s.mode:9}{s.budget:7.2f}{s.fraction:7.3f}{percent}{s.difference:12.4f}")
    print(
        f"{len(photos) - len(failures)} photos; mean average precision (mAP) and its drop in %; FLOPs as a fraction of "
        "dense; difference: of the probabilities, mean"
    )
    if failures:
        say(f"{len(failures)} photos failed (the first: {failures[0]})")
    if config.out:
        _write(config.out, _result(config, evaluated, scores, len(photos), failures), [], plot=False)
    return 1 if failures else 0


@dataclass(frozen=True)
class _Evaluated:
    """A slimmed model and the dense model that it is compared with.

    Attributes:
        pipeline: the slimmed model with preprocessing and labels.
        dense: from images to the logits of the dense model.
        device: where both expect images.
        engine: the name of the engine that runs the slimmed model.
    """

    pipeline: Pipeline
    dense: Callable[[torch.Tensor], torch.Tensor]
    device: torch.device
    engine: str


def _open_model(config: EvalConfig, photos: Sequence[Path]) -> _Evaluated:
    """The model with the requested engine; the dense model is the unmodified backbone in torch."""
    from ..backbones import adapt
    from ..backbones.weight_delta import revert_delta

    pipeline = open_classifier(config.model, config.run)
    model, device = pipeline.model, pipeline.device
    if "adaptive" in config.modes:
        model.set_mode("adaptive")
        calibrate_if_needed(pipeline, photos, config.run)
    backbone = model.backbone
    dense = (adapt(revert_delta(backbone.model, model.delta.tensors)) if model.delta else backbone).output
    if config.engine in (None, "eager"):
        return _Evaluated(pipeline, dense, device, "eager")
    from ..export.on_the_fly import with_engine

    model.set_mode("fixed").set_budget(config.budgets[0])  # with_engine creates the engine of this budget at once
    pipeline = with_engine(pipeline, config.engine, config.run.device)
    _create_engines(pipeline, config, len(photos))
    return _Evaluated(pipeline, dense, device, config.engine)


def _open_bundle(config: EvalConfig, photos: Sequence[Path]) -> _Evaluated:
    """An exported bundle; the dense model is its graph of budget 1."""
    import torch

    from ..runtime import open_engine
    from ..runtime.exported import open_exported

    bundle = config.model.model
    if "adaptive" in config.modes:
        raise ConfigError(
            f"{bundle} is an exported model, which runs fixed mode only, got adaptive; give --modes fixed"
        )
    try:
        dense = open_engine(bundle, budget=1.0, trust=config.trust)
    except ConfigError as error:
        raise ConfigError(
            f"eval compares with the dense model, which {bundle} does not contain ({error}); export a bundle with "
            "--budgets 1,..., or use patchlife predict --labelled, which needs no dense model"
        ) from None
    pipeline = open_exported(replace(config.model, life={**config.model.life, "budget": 1.0}), config.trust)
    _create_engines(pipeline, config, len(photos))
    return _Evaluated(
        pipeline, lambda images: torch.from_numpy(dense(images.numpy()).logits), pipeline.device, dense.metadata.kind
    )


def _create_engines(pipeline: Pipeline, config: EvalConfig, photos: int) -> None:
    """Export or compile the model at every budget, so that an error comes before photos are read."""
    import torch

    batch = min(config.run.batch_size, photos)
    for size in sorted({batch, photos % batch or batch}):  # the last batch may be smaller, and is compiled separately
        blank = torch.zeros(size, pipeline.preprocess.channels, *pipeline.preprocess.size)
        for budget in config.budgets:
            pipeline.model.set_budget(budget).predict(blank)


def text_table(scores: Sequence[Score], photos: int) -> str:
    """The scores as a table for a terminal."""
    header = (
        f"{'mode':9}{'budget':>7}{'FLOPs':>7}{'top-1':>7}{'top-5':>7}{'drop (95 % interval)':>26}{'agree':>7}{'KL':>7}"
    )
    lines = [header]
    for s in scores:
        low, high = (100 * bound for bound in s.drop_interval)
        drop = f"{100 * s.drop:.2f} ({low:.2f} to {high:.2f})"
        lines.append(
            f"{s.mode:9}{s.budget:7.2f}{s.fraction:7.3f}{100 * s.top1:7.2f}{100 * s.top5:7.2f}{drop:>26}"
            f"{100 * s.agreement:7.1f}{s.divergence:7.3f}"
        )
    lines.append(f"{photos} photos; top-1, top-5, drop and agreement in %; FLOPs as a fraction of dense; KL in nats")
    return "\n".join(lines)


def _batches(
    pipeline: Pipeline,
    photos: Sequence[Path],
    classes: Sequence[int] | Sequence[list[bool]],
    config: EvalConfig,
    failures: list[str],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of images and their classes; the errors of photos that cannot be read are added to ``failures``."""
    import torch

    from ..data import load_batches

    batch_size, workers = config.run.batch_size, config.run.workers
    batches = load_batches(photos, pipeline.preprocess, batch_size, workers)
    for batch in progress(batches, -(-len(photos) // batch_size), config.run.progress, unit="batch"):
        failures += [str(error) for _, error in batch.failures]
        if batch.indices:
            yield batch.images, torch.tensor([classes[index] for index in batch.indices])
    if len(failures) == len(photos):
        raise ImageError(f"none of the {len(photos)} photos could be read; the first error: {failures[0]}")


def _result(
    config: EvalConfig,
    evaluated: _Evaluated,
    scores: Sequence[Score] | Sequence[MultiLabelScore],
    photos: int,
    failures: list[str],
) -> dict[str, Any]:
    from ..evaluation.timing import conditions
    from ..runtime.sessions import engine_version
    from ..version import __version__

    return {
        "patchlife": __version__,
        "model": evaluated.pipeline.name,
        "adapter": config.model.model if Path(config.model.model).is_dir() else None,
        "engine": evaluated.engine,
        "data": str(config.data),
        "class_order": config.model.class_order,
        "labels_from": str(config.labels_from) if config.labels_from else None,
        "photos": photos - len(failures),
        "failures": failures,
        "scores": [score.to_dict() for score in scores],
        "conditions": conditions(evaluated.device)
        | engine_version(evaluated.engine)
        | {"batch_size": config.run.batch_size, "dtype": config.run.dtype},
    }


def _write(out: Path, result: dict[str, Any], scores: Sequence[Score], plot: bool) -> None:
    write_atomic(out, json.dumps(result, indent=2) + "\n")
    if not plot:
        say(f"wrote {out}")
        return
    from ..visual.plots import Point, plot_tradeoff

    curves: dict[str, list[Point]] = {}
    for score in scores:
        half_interval = 50 * (score.drop_interval[1] - score.drop_interval[0])
        curves.setdefault(score.mode, []).append(Point(score.fraction, 100 * score.top1, half_interval))
    dense_top1 = 100 * (scores[0].top1 + scores[0].drop)
    picture = plot_tradeoff(curves, dense_top1, f"{result['model']} on {result['photos']} photos")
    picture.save(out.with_suffix(".png"))
    say(f"wrote {out} and {out.with_suffix('.png').name}")
