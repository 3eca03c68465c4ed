"""``patchlife eval`` for a multi-label model: mean average precision, compared with that of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import EvalConfig
from .common import label_sets_of

if TYPE_CHECKING:
    import torch

    from ..evaluation.multi_label import MultiLabelScore
    from ..runtime.pipeline import Pipeline

    Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]

__all__ = ["multi_label_scores", "multi_label_table"]


def multi_label_scores(
    config: EvalConfig,
    pipeline: Pipeline,
    dense: Callable[[torch.Tensor], torch.Tensor],
    listed: Sequence[Path],
    device: torch.device,
    batches_of: Callable[[Sequence[Path], Sequence[list[bool]]], Batches],
) -> list[MultiLabelScore]:
    """Evaluate every N-th of the ``listed`` photos at every setting.

    Args:
        config: of the verb.
        pipeline: the slimmed model.
        dense: from images to the logits of the dense model.
        listed: all photos of the data set.
        device: where both models expect images.
        batches_of: images and classes, in batches, of photos and, for each, whether it has each class.
    """
    from ..evaluation.multi_label import evaluate_multi_label

    label_sets = label_sets_of(pipeline.labels, listed, config.model.class_order, config.labels_from)
    every = range(len(pipeline.labels.names))
    classes = [[index in found for index in every] for found in label_sets[:: config.every]]
    batches = batches_of(listed[:: config.every], classes)
    return evaluate_multi_label(pipeline.model, dense, batches, config.settings, device)


def multi_label_table(scores: Sequence[MultiLabelScore], photos: int) -> str:
    """The scores as a table for a terminal."""
    lines = [f"{'mode':9}{'budget':>7}{'FLOPs':>7}{'mAP':>7}{'drop':>7}{'difference':>12}"]
    for s in scores:
        percent = f"{100 * s.mean_average_precision:7.2f}{100 * s.drop:7.2f}"
        lines.append(f"{s.mode:9}{s.budget:7.2f}{s.fraction:7.3f}{percent}{s.difference:12.4f}")
    lines.append(
        f"{photos} photos; mean average precision (mAP) and its drop in %; FLOPs as a fraction of dense; difference: "
        "of the probabilities, mean"
    )
    return "\n".join(lines)
