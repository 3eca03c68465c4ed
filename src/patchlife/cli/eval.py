"""``patchlife eval``: accuracy, or quality of embeddings, at several budgets, compared with the dense model."""

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
from .common import calibrate_if_needed, check_engine, classes_of, find_photos, open_model, progress, say, use_threads
from .eval_embeddings import embedding_scores, embedding_table
from .eval_multi_label import multi_label_scores, multi_label_table

if TYPE_CHECKING:
    import torch

    from ..evaluation.accuracy import Score
    from ..evaluation.embeddings import EmbeddingScore
    from ..evaluation.multi_label import MultiLabelScore
    from ..runtime.pipeline import Pipeline

    AnyScore = Score | EmbeddingScore | MultiLabelScore
    Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]

__all__ = ["run", "text_table"]


def run(config: EvalConfig) -> int:
    """Evaluate, print a table, write a JSON file and a plot; returns the exit code."""
    check_engine(config.model.model, config.engine, config.trust, config.run.dtype)
    plots = installed("matplotlib")
    if config.out and not plots:
        say(f"the plot is left out: {MissingExtraError('matplotlib', 'bench', 'the trade-off plot')}")
    listed = find_photos(config.data)
    photos = listed[:: config.every]
    evaluated = _open_bundle(config, photos) if is_exported(config.model.model) else _open_model(config, photos)
    failures: dict[Path, str] = {}
    scores = _evaluate(config, evaluated, listed, failures)
    failed = [failures[photo] for photo in photos if photo in failures]
    print(_table(config, scores, len(photos) - len(failed)))
    if failures:
        say(f"{len(failures)} photos failed (the first: {next(iter(failures.values()))})")
    if config.out:
        _write(config.out, _result(config, evaluated, scores, len(photos), failed), scores, plots)
    return 1 if failures else 0


def _evaluate(
    config: EvalConfig, evaluated: _Evaluated, listed: Sequence[Path], failures: dict[Path, str]
) -> Sequence[AnyScore]:
    """The scores at every setting; the errors of photos that cannot be read are added to ``failures``."""
    from ..evaluation.accuracy import evaluate

    pipeline, photos = evaluated.pipeline, listed[:: config.every]

    def batches_of(paths: Sequence[Path], classes: Sequence[int] | Sequence[list[bool]]) -> Batches:
        return _batches(pipeline, paths, classes, config, failures)

    if not pipeline.labels.names:
        return embedding_scores(config, pipeline, evaluated.dense, photos, batches_of)
    if unused := [name for name in ("gallery", "neighbours") if getattr(config, name)]:
        raise ConfigError(f"--{unused[0]} is for models without a classifier, got {pipeline.name}; remove it")
    if pipeline.multi_label:
        return multi_label_scores(config, pipeline, evaluated.dense, listed, evaluated.device, batches_of)
    classes = classes_of(pipeline.labels, listed, config.model.class_order, config.labels_from)[:: config.every]
    batches = batches_of(photos, classes)
    return evaluate(pipeline.model, evaluated.dense, batches, config.settings, evaluated.device)


@dataclass(frozen=True)
class _Evaluated:
    """A slimmed model and the dense model that it is compared with.

    Attributes:
        pipeline: the slimmed model with preprocessing and labels.
        dense: from images to the logits, or embeddings, of the dense model.
        device: where both expect images.
        engine: the name of the engine that runs the slimmed model.
    """

    pipeline: Pipeline
    dense: Callable[[torch.Tensor], torch.Tensor]
    device: torch.device
    engine: str


def _open_model(config: EvalConfig, photos: Sequence[Path]) -> _Evaluated:
    """The model with the requested engine; the dense model is the unmodified backbone in torch."""
    import torch

    pipeline = open_model(config.model, replace(config.run, dtype="float32"))  # to subtract a delta without rounding
    model, device = pipeline.model, pipeline.device
    dense = model.dense_backbone()
    for converted in (model, dense.model):
        converted.to(getattr(torch, config.run.dtype))
    if "adaptive" in config.modes:
        model.set_mode("adaptive")
        calibrate_if_needed(pipeline, photos, config.run)
    if config.engine in (None, "eager"):
        return _Evaluated(pipeline, dense.output, device, "eager")
    from ..export.on_the_fly import with_engine

    model.set_mode("fixed").set_budget(config.budgets[0])  # with_engine creates the engine of this budget at once
    pipeline = with_engine(pipeline, config.engine, config.run.device)
    _create_engines(pipeline, config, len(photos))
    return _Evaluated(pipeline, dense.output, device, config.engine)


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
    use_threads(config.run)
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


def _table(config: EvalConfig, scores: Sequence[AnyScore], photos: int) -> str:
    from ..evaluation.accuracy import Score
    from ..evaluation.embeddings import NEIGHBOURS, EmbeddingScore
    from ..evaluation.multi_label import MultiLabelScore

    if several := [score for score in scores if isinstance(score, MultiLabelScore)]:
        return multi_label_table(several, photos)
    embeddings = [score for score in scores if isinstance(score, EmbeddingScore)]
    if embeddings:
        return embedding_table(embeddings, photos, config.neighbours or NEIGHBOURS)
    return text_table([score for score in scores if isinstance(score, Score)], photos)


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
    failures: dict[Path, str],
) -> Batches:
    """Batches of images and their classes; the errors of photos that cannot be read are added to ``failures``."""
    import torch

    from ..data import load_batches

    batch_size, workers = config.run.batch_size, config.run.workers
    batches = load_batches(photos, pipeline.preprocess, batch_size, workers)
    for batch in progress(batches, -(-len(photos) // batch_size), config.run.progress, unit="batch"):
        failures |= {photos[index]: str(error) for index, error in batch.failures}
        if batch.indices:
            yield batch.images, torch.tensor([classes[index] for index in batch.indices])
    if all(photo in failures for photo in photos):
        raise ImageError(f"none of the {len(photos)} photos could be read; the first error: {failures[photos[0]]}")


def _result(
    config: EvalConfig,
    evaluated: _Evaluated,
    scores: Sequence[AnyScore],
    photos: int,
    failures: list[str],
) -> dict[str, Any]:
    from ..evaluation.embeddings import NEIGHBOURS
    from ..evaluation.timing import conditions
    from ..runtime.sessions import engine_version
    from ..version import __version__

    search = {
        "gallery": str(config.gallery) if config.gallery else None,
        "neighbours": config.neighbours or NEIGHBOURS,
    }
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
        **({} if evaluated.pipeline.labels.names else search),
        "scores": [score.to_dict() for score in scores],
        "conditions": conditions(evaluated.device)
        | engine_version(evaluated.engine)
        | {"batch_size": config.run.batch_size, "dtype": config.run.dtype},
    }


def _write(out: Path, result: dict[str, Any], scores: Sequence[AnyScore], plot: bool) -> None:
    write_atomic(out, json.dumps(result, indent=2) + "\n")
    if not plot:
        say(f"wrote {out}")
        return
    from ..visual.plots import Point, plot_tradeoff

    curves: dict[str, list[Point]] = {}
    for score in scores:
        value, half_interval, dense, axis = _plotted(score)
        curves.setdefault(score.mode, []).append(Point(score.fraction, value, half_interval))
    picture = plot_tradeoff(curves, dense, f"{result['model']} on {result['photos']} photos", axis)
    picture.save(out.with_suffix(".png"))
    say(f"wrote {out} and {out.with_suffix('.png').name}")


def _plotted(score: AnyScore) -> tuple[float, float, float, str]:
    """(value, half of its interval, value of the dense model, label of the axis) in the plot."""
    from ..evaluation.accuracy import Score
    from ..evaluation.multi_label import MultiLabelScore

    if isinstance(score, MultiLabelScore):
        value = 100 * score.mean_average_precision
        return value, 0.0, value + 100 * score.drop, "mean average precision, %"
    if isinstance(score, Score):
        accuracy, axis = score.top1, "top-1, %"
    elif score.knn is not None:
        accuracy, axis = score.knn, "accuracy of nearest neighbours, %"
    else:
        return score.cosine, 0.0, 1.0, "cosine to the dense embedding"
    assert score.drop is not None
    assert score.drop_interval is not None
    low, high = score.drop_interval
    return 100 * accuracy, 50 * (high - low), 100 * (accuracy + score.drop), axis
