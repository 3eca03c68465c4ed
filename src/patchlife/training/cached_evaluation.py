"""Evaluation on cached targets: the tokens at the start block are cached, so only the slimmed blocks are run."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..evaluation.agreement import kl_divergence, same_class
from .target_cache import TargetCache

__all__ = ["CachedScore", "evaluate_cached"]

_BATCH = 50


class CachedScore(NamedTuple):
    """Means over the photos of a cache.

    Attributes:
        top1: fraction of photos whose predicted class is their label. dense_top1: the same for the dense model.
        agreement: fraction of photos with the same predicted class as the dense model.
        kl: KL divergence from the dense model, in nats.
    """

    top1: float
    agreement: float
    kl: float
    dense_top1: float


@torch.no_grad()
def evaluate_cached(
    logits_of: Callable[[Float[Tensor, "batch tokens dim"]], Float[Tensor, "batch classes"]],
    cache: TargetCache,
    device: torch.device,
) -> CachedScore:
    """Evaluate ``logits_of`` on all photos of ``cache``; it gets the input of the start block, on ``device``."""
    sums = torch.zeros(4, dtype=torch.double)
    for begin in range(0, len(cache), _BATCH):
        rows = range(begin, min(begin + _BATCH, len(cache)))
        targets, labels = cache.targets(rows), cache.labels(rows)
        logits = logits_of(targets.tokens.to(device)).float().cpu()
        counts = (
            logits.argmax(dim=1) == labels,
            same_class(targets.logits, logits),
            kl_divergence(targets.logits, logits),
            targets.logits.argmax(dim=1) == labels,
        )
        sums += torch.stack([count.double().sum() for count in counts])
    return CachedScore(*(sums / max(1, len(cache))).tolist())
