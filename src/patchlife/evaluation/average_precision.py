"""Mean average precision: how well the probabilities of a multi-label model order photos."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["average_precision", "mean_average_precision"]


def average_precision(scores: Float[Tensor, "photos"], positive: Bool[Tensor, "photos"]) -> float:
    """Area under the precision-recall steps of one class; NaN without a positive photo.

    It is the mean, over the positive photos, of the precision among the photos whose score is at least that of the
    positive photo. Photos with equal scores count together, so their order has no effect.

    Args:
        scores: the higher, the more likely the class.
        positive: whether each photo has the class.
    """
    if not positive.any():
        return float("nan")
    ordered, order = scores.sort(descending=True)
    right = positive[order].double().cumsum(0)  # positive photos among the first n
    # index of the last photo with the same score: precision is taken after all of them
    last = torch.searchsorted(-ordered, -ordered, right=True) - 1
    precision = right[last] / (last + 1)
    return precision[positive[order]].mean().item()


def mean_average_precision(scores: Float[Tensor, "photos classes"], positive: Bool[Tensor, "photos classes"]) -> float:
    """Mean of `average_precision` over the classes that at least one photo has; NaN without such a class."""
    present = positive.any(dim=0).nonzero().flatten().tolist()
    values = [average_precision(scores[:, index], positive[:, index]) for index in present]
    return sum(values) / len(values) if values else float("nan")
