"""``patchlife eval`` for a model without a classifier: its embeddings, compared with those of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import EvalConfig
from ..errors import ConfigError
from .common import find_photos, say

if TYPE_CHECKING:
    import torch

    from ..evaluation.embeddings import EmbeddingScore
    from ..runtime.pipeline import Pipeline

    Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]

__all__ = ["embedding_scores", "embedding_table"]


def embedding_scores(
    config: EvalConfig,
    pipeline: Pipeline,
    dense: Callable[[torch.Tensor], torch.Tensor],
    photos: Sequence[Path],
    batches_of: Callable[[Sequence[Path], Sequence[int]], Batches],
) -> list[EmbeddingScore]:
    """Evaluate the embeddings of ``photos`` at every setting.

    Args:
        config: of the verb.
        pipeline: the slimmed model.
        dense: from images to the embeddings of the dense model.
        photos: to evaluate on.
        batches_of: images and classes, in batches, of photos and their classes.

    Raises:
        ConfigError: a gallery that does not have the classes of the photos, or an option without effect.
    """
    from ..evaluation.embeddings import NEIGHBOURS, evaluate_embeddings

    gallery = find_photos(config.gallery) if config.gallery else []
    classes, gallery_classes = _classes(config, photos, gallery)
    return evaluate_embeddings(
        pipeline.model,
        dense,
        batches_of(photos, classes),
        config.settings,
        pipeline.device,
        batches_of(gallery, gallery_classes) if gallery else None,
        config.neighbours or NEIGHBOURS,
    )


def _classes(config: EvalConfig, photos: Sequence[Path], gallery: Sequence[Path]) -> tuple[list[int], list[int]]:
    """The class of each photo, and of each photo of the gallery; -1 if all photos have one class."""
    if config.model.class_order:
        raise ConfigError(
            "--class-order has no effect for a model without a classifier, whose classes are the names of the folders "
            "or the labels of --labels-from; remove it"
        )
    own, others = _labels(config, photos, gallery)
    names = sorted({*(others or own)})
    if not gallery and len(names) < 2:
        where = config.labels_from or config.data
        say(f"{where} has no photos of several classes, so neighbours are not compared, only the cosine")
        return [-1] * len(photos), []
    if missing := sorted({*own} - {*names}):
        raise ConfigError(
            f"--gallery {config.gallery} has no photos of {missing[0]}, a class of {config.data}; give a gallery with "
            "photos of the same classes"
        )
    index = {name: place for place, name in enumerate(names)}
    return [index[name] for name in own], [index[name] for name in others]


def _labels(config: EvalConfig, photos: Sequence[Path], gallery: Sequence[Path]) -> tuple[list[str], list[str]]:
    """The name of the class of each photo, and of each photo of the gallery, from the table or from the folders."""
    both = [*photos, *gallery]
    if config.labels_from:
        from ..data.label_table import read_label_table

        found = [row.label for row in read_label_table(config.labels_from, both)]
    else:
        from ..data.labels import folder_labels

        labels = folder_labels(both)
        found = [labels.names[place] for place in labels.classes_of(both)]
    return found[: len(photos)], found[len(photos) :]


def embedding_table(scores: Sequence[EmbeddingScore], photos: int, neighbours: int) -> str:
    """The scores as a table for a terminal."""
    header = f"{'mode':9}{'budget':>7}{'FLOPs':>7}{'cosine':>8}{'its 5 %':>9}"
    labelled = scores[0].knn is not None
    lines = [header + (f"{'kNN dense':>11}{'kNN':>7}{'drop (95 % interval)':>26}" if labelled else "")]
    for score in scores:
        line = f"{score.mode:9}{score.budget:7.2f}{score.fraction:7.3f}{score.cosine:8.4f}{score.low_cosine:9.4f}"
        lines.append(line + _neighbour_cells(score))
    text = f"{photos} photos; FLOPs as a fraction of dense; cosine to the dense embedding: mean and 5 % quantile"
    if labelled:
        text += f"\nkNN: accuracy of {neighbours} nearest neighbours; kNN and drop in %"
    return "\n".join([*lines, text])


def _neighbour_cells(score: EmbeddingScore) -> str:
    if score.knn is None or score.dense_knn is None or score.drop is None or score.drop_interval is None:
        return ""
    low, high = (100 * bound for bound in score.drop_interval)
    drop = f"{100 * score.drop:.2f} ({low:.2f} to {high:.2f})"
    return f"{100 * score.dense_knn:11.2f}{100 * score.knn:7.2f}{drop:>26}"
