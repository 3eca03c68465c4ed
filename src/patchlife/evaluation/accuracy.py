"""Accuracy of a slimmed model at several budgets, against the dense model on the same photos."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..config import Mode
from ..slimming.classifier import Classifier
from .agreement import kl_divergence, same_class

__all__ = ["Score", "evaluate", "paired_interval"]


@dataclass(frozen=True)
class Score:
    """Accuracy and cost of a model at one budget in one mode.

    Attributes:
        budget: requested fraction of the dense FLOPs. mode: fixed or adaptive.
        flops: mean per photo. fraction: ``flops`` as a fraction of the dense FLOPs.
        top1: fraction of the photos whose label is the predicted class. top5: whose label is among the five highest
            logits. None without labels, as ``drop`` and ``drop_interval``.
        drop: ``top1`` of the dense model minus ``top1``.
        drop_interval: 95 % interval of ``drop``, from paired differences.
        agreement: fraction of the photos with the dense model's predicted class.
        divergence: mean KL divergence from the dense model's distribution, in nats.
        photos_per_s: throughput of the model alone, in one pass without warm-up: an indication only.
    """

    budget: float
    mode: Mode
    flops: float
    fraction: float
    top1: float | None
    top5: float | None
    drop: float | None
    drop_interval: tuple[float, float] | None
    agreement: float
    divergence: float
    photos_per_s: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@torch.inference_mode()
def evaluate(
    model: Classifier,
    dense: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Float[Tensor, "batch 3 height width"], Int[Tensor, "batch"]]],
    settings: Sequence[tuple[float, Mode]],
    device: torch.device | None = None,
) -> list[Score]:
    """Evaluate ``model`` at each (budget, mode); every photo is read once.

    The model's settings are restored at the end.

    Args:
        model: calibrated, if a mode is adaptive.
        dense: the dense model, the reference of drop, agreement and divergence.
        batches: images and labels; -1 is a photo without a label. If there are any, top-1 is not measured.
        settings: (budget, mode) pairs.
        device: where images go; the model's device if not given.
    """
    tallies = [_Tally() for _ in settings]
    device = device or model.device
    dense_hits: list[Tensor] = []
    labelled = True
    with model.temporarily():
        for images, labels in batches:
            images = images.to(device, model.dtype)
            reference = dense(images).float().cpu()
            dense_hits.append(reference.argmax(dim=1) == labels)
            labelled = labelled and bool((labels >= 0).all())
            for tally, (budget, mode) in zip(tallies, settings, strict=True):
                model.set_mode(mode).set_budget(budget)
                started = time.perf_counter()
                logits, lives = model.predict(images)
                tally.seconds += _since(started, device)
                tally.add(logits.float().cpu(), reference, labels, model.flops_of(lives))
        dense_right = torch.cat(dense_hits) if labelled else None
        return [
            tally.score(budget, mode, dense_right, model.dense_flops)
            for tally, (budget, mode) in zip(tallies, settings, strict=True)
        ]


def paired_interval(before: Bool[Tensor, "photos"], after: Bool[Tensor, "photos"]) -> tuple[float, float]:
    """95 % interval of the mean of ``before - after``: normal approximation on the differences of single photos."""
    difference = before.double() - after.double()
    mean = difference.mean().item()
    half = 1.96 * difference.std(correction=1).item() / math.sqrt(len(difference)) if len(difference) > 1 else math.inf
    return mean - half, mean + half


class _Tally:
    """Accumulates results of one setting over batches."""

    def __init__(self) -> None:
        self.right: list[Tensor] = []
        self.right_of_five: list[Tensor] = []
        self.agreed: list[Tensor] = []
        self.divergence: list[Tensor] = []
        self.flops: list[int] = []
        self.seconds = 0.0

    def add(self, logits: Tensor, reference: Tensor, labels: Tensor, flops: list[int]) -> None:
        highest = logits.topk(min(5, logits.shape[1]), dim=1).indices
        self.right.append(highest[:, 0] == labels)
        self.right_of_five.append((highest == labels[:, None]).any(dim=1))
        self.agreed.append(same_class(reference, logits))
        self.divergence.append(kl_divergence(reference, logits))
        self.flops += flops

    def score(self, budget: float, mode: Mode, dense_right: Tensor | None, dense_flops: float) -> Score:
        right = torch.cat(self.right)
        labelled = dense_right is not None
        flops = sum(self.flops) / len(self.flops)
        return Score(
            budget,
            mode,
            flops,
            flops / dense_flops,
            _mean(right) if labelled else None,
            _mean(torch.cat(self.right_of_five)) if labelled else None,
            _mean(dense_right) - _mean(right) if dense_right is not None else None,
            paired_interval(dense_right, right) if dense_right is not None else None,
            _mean(torch.cat(self.agreed)),
            _mean(torch.cat(self.divergence)),
            len(right) / self.seconds,
        )


def _mean(values: Tensor) -> float:
    return values.double().mean().item()


def _since(started: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
