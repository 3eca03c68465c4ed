"""Mean average precision of a multi-label model at several budgets, against the dense model on the same photos."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..config import Mode
from ..slimming.classifier import Classifier
from .average_precision import mean_average_precision

__all__ = ["MultiLabelScore", "evaluate_multi_label"]


@dataclass(frozen=True)
class MultiLabelScore:
    """Mean average precision and cost of a model at one budget in one mode.

    Attributes:
        budget: requested fraction of the dense FLOPs. mode: fixed or adaptive.
        flops: mean per photo. fraction: ``flops`` as a fraction of the dense FLOPs.
        mean_average_precision: over the classes that at least one photo has, from 0 to 1.
        drop: that of the dense model minus ``mean_average_precision``.
        difference: mean absolute difference of the probabilities to the dense model's.
    """

    budget: float
    mode: Mode
    flops: float
    fraction: float
    mean_average_precision: float
    drop: float
    difference: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@torch.inference_mode()
def evaluate_multi_label(
    model: Classifier,
    dense: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Float[Tensor, "batch channels height width"], Bool[Tensor, "batch classes"]]],
    settings: Sequence[tuple[float, Mode]],
    device: torch.device | None = None,
) -> list[MultiLabelScore]:
    """Evaluate ``model`` at each (budget, mode); every photo is read once. Its settings are restored at the end.

    Args:
        model: calibrated, if a mode is adaptive.
        dense: the dense model, from images to logits.
        batches: images, and the classes of each.
        settings: (budget, mode) pairs.
        device: where images go; the model's device if not given.
    """
    device = device or model.device
    positive: list[Tensor] = []
    reference: list[Tensor] = []
    found: list[list[Tensor]] = [[] for _ in settings]
    flops = [0] * len(settings)
    with model.temporarily():
        for images, classes in batches:
            images = images.to(device, model.dtype)
            positive.append(classes)
            reference.append(dense(images).float().sigmoid().cpu())
            for index, (budget, mode) in enumerate(settings):
                model.set_mode(mode).set_budget(budget)
                logits, lives = model.predict(images)
                found[index].append(logits.float().sigmoid().cpu())
                flops[index] += sum(model.flops_of(lives))
        expected, truth = torch.cat(reference), torch.cat(positive)
        best = mean_average_precision(expected, truth)
        return [
            _score(setting, torch.cat(scores), expected, truth, best, spent / len(truth), model.dense_flops)
            for setting, scores, spent in zip(settings, found, flops, strict=True)
        ]


def _score(
    setting: tuple[float, Mode],
    scores: Tensor,
    expected: Tensor,
    truth: Tensor,
    best: float,
    flops: float,
    dense_flops: float,
) -> MultiLabelScore:
    value = mean_average_precision(scores, truth)
    difference = (scores - expected).abs().mean().item()
    return MultiLabelScore(*setting, flops, flops / dense_flops, value, best - value, difference)
