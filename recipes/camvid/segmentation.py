"""Scores of segmentations: confusion matrices, intersection over union, and how far two models' answers are apart."""

from __future__ import annotations

import torch
from camvid import CLASSES, IGNORE
from jaxtyping import Float, Int
from torch import Tensor

from patchlife.evaluation.agreement import kl_divergence

RESAMPLINGS = 2000


def confusion(
    answers: Int[Tensor, "batch height width"], labels: Int[Tensor, "batch height width"]
) -> Int[Tensor, "batch classes classes"]:
    """For each image, how many pixels of class i (row) were answered j (column); unlabelled pixels do not count."""
    classes, labelled = len(CLASSES), labels != IGNORE
    image = torch.arange(len(labels))[:, None, None].expand_as(labels)
    cell = (image * classes + labels) * classes + answers
    counts = torch.bincount(cell[labelled], minlength=len(labels) * classes**2)
    return counts.reshape(len(labels), classes, classes)


def iou(matrix: Float[Tensor, "*some classes classes"]) -> Float[Tensor, "*some classes"]:
    """Intersection over union of each class, from confusion matrices that are summed over images.

    A class that is neither present nor answered gives NaN.
    """
    hits = matrix.diagonal(dim1=-2, dim2=-1)
    return hits / (matrix.sum(dim=-1) + matrix.sum(dim=-2) - hits)


def mean_iou(matrix: Float[Tensor, "*some classes classes"]) -> Float[Tensor, "*some"]:
    """The mean of `iou` over the classes that it is a number for."""
    return iou(matrix).nanmean(dim=-1)


def interval_of_drop(
    dense: Int[Tensor, "scenes classes classes"], slimmed: Int[Tensor, "scenes classes classes"]
) -> tuple[float, float]:
    """The 95 % interval of mIoU(dense) - mIoU(slimmed): the same resampled scenes for both, 2000 times."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(dense), (RESAMPLINGS, len(dense)), generator=generator)
    times = torch.zeros(RESAMPLINGS, len(dense), dtype=torch.double)
    times.scatter_add_(1, chosen, torch.ones_like(times))
    resampled = [mean_iou((times @ each.double().flatten(1)).reshape(-1, *each.shape[1:])) for each in (dense, slimmed)]
    low, high = (resampled[0] - resampled[1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return low, high


def divergence(
    dense: Float[Tensor, "batch classes height width"], slimmed: Float[Tensor, "batch classes height width"]
) -> Float[Tensor, " batch"]:
    """KL divergence of the slimmed answers from the dense ones in nats, mean over all pixels of each image."""
    return kl_divergence(dense, slimmed).mean(dim=(1, 2))
