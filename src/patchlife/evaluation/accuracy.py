"""How good a slimmed model is at several budgets, against its dense self, photo by photo."""

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
    """One row of the table. Fractions are of the photos.

    Attributes:
        budget: fraction of the dense FLOPs that was asked for. mode: fixed or adaptive.
        flops: mean per photo. fraction: of the dense model's.
        top1 / top5: fraction whose label is the likeliest answer / among the five likeliest.
        drop: of top-1 against dense, and its 95 % interval from the paired differences.
        agreement: fraction with the dense model's own answer.
        divergence: mean KL divergence from the dense model's distribution, in nats.
        photos_per_s: through the model alone, batches as given; one pass, so only an indication.
    """

    budget: float
    mode: Mode
    flops: float
    fraction: float
    top1: float
    top5: float
    drop: float
    drop_interval: tuple[float, float]
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
    """Score ``model`` at each (budget, mode) on batches of (images, labels); every photo is read once.

    ``dense`` is the untouched backbone: what drop, agreement and divergence are measured against. Adaptive modes need
    a calibrated model. The model's own settings are as before when this returns. ``device`` is where images
    go; the model's if not given (an engine in a model's place has none).
    """
    tallies = [_Tally() for _ in settings]
    device = device or model.device
    truth: list[Tensor] = []
    with model.temporarily():
        for images, labels in batches:
            images = images.to(device)
            reference = dense(images).float().cpu()
            truth.append(reference.argmax(dim=1) == labels)
            for tally, (budget, mode) in zip(tallies, settings, strict=True):
                model.set_mode(mode).set_budget(budget)
                started = time.perf_counter()
                logits, lives = model.predict(images)
                tally.seconds += _since(started, device)
                tally.add(logits.float().cpu(), reference, labels, model.flops_of(lives))
        dense_right = torch.cat(truth)
        return [
            tally.score(budget, mode, dense_right, model.dense_flops)
            for tally, (budget, mode) in zip(tallies, settings, strict=True)
        ]


def paired_interval(before: Bool[Tensor, "photos"], after: Bool[Tensor, "photos"]) -> tuple[float, float]:
    """95 % interval of the mean of ``before - after``: normal approximation on the photos' own differences."""
    difference = before.double() - after.double()
    mean = difference.mean().item()
    reach = 1.96 * difference.std(correction=1).item() / math.sqrt(len(difference)) if len(difference) > 1 else math.inf
    return mean - reach, mean + reach


class _Tally:
    """Running results of one setting."""

    def __init__(self) -> None:
        self.right: list[Tensor] = []
        self.near: list[Tensor] = []
        self.agreed: list[Tensor] = []
        self.divergence: list[Tensor] = []
        self.flops: list[int] = []
        self.seconds = 0.0

    def add(self, logits: Tensor, reference: Tensor, labels: Tensor, flops: list[int]) -> None:
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        self.right.append(best[:, 0] == labels)
        self.near.append((best == labels[:, None]).any(dim=1))
        self.agreed.append(same_class(reference, logits))
        self.divergence.append(kl_divergence(reference, logits))
        self.flops += flops

    def score(self, budget: float, mode: Mode, dense_right: Tensor, dense_flops: float) -> Score:
        right = torch.cat(self.right)
        flops = sum(self.flops) / len(self.flops)
        return Score(
            budget,
            mode,
            flops,
            flops / dense_flops,
            _mean(right),
            _mean(torch.cat(self.near)),
            _mean(dense_right) - _mean(right),
            paired_interval(dense_right, right),
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
