"""The losses of both stages, as pure functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "distillation_loss",
    "feature_loss",
    "importance_loss",
    "pixel_distillation_loss",
    "similarity_loss",
    "token_loss",
]

_POWER = 0.75  # of the divergence; recipes/NOTES.md compares 1 and 0.5
_FLOOR = 1e-3  # nats; without it the gradient of the power is too large where divergence or error is nearly 0


def importance_loss(logits: Float[Tensor, "batch patches"], importance: Float[Tensor, "batch patches"]) -> Tensor:
    """KL divergence of ``softmax(logits)`` from the target importance in nats, mean over images."""
    return F.kl_div(logits.log_softmax(dim=1), importance, reduction="batchmean")


def similarity_loss(embedding: Float[Tensor, "batch patches k"], target: Float[Tensor, "batch patches dim"]) -> Tensor:
    """Squared error of the cosine similarities of all pairs of patches, weighted by the target similarity.

    Merge targets are chosen among similar patches, so errors there matter more than the difference between a
    similarity of 0.1 and one of -0.3. The vectors of ``embedding`` have unit length.
    """
    target = F.normalize(target, dim=2)
    cosine = target @ target.transpose(1, 2)
    error = (embedding @ embedding.transpose(1, 2) - cosine).square()
    return 20 * (error * cosine.clamp(min=0.05)).mean()


def distillation_loss(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"] | None = None,
    label_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(loss, KL divergence of the student from the teacher in nats), means over images.

    The loss is a power below 1 of the divergence of each image. At a budget of 0.35 the divergence is a hundred times
    that at 0.8; without the power the smallest budgets would dominate the gradients of the weights that all budgets
    share. ``label_weight`` is the weight of the cross-entropy with ``labels``, in [0, 1]; where a label is -1
    (unknown) the distillation loss has all the weight.
    """
    student, teacher = student.float().log_softmax(1), teacher.float().log_softmax(1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1).clamp(min=0)
    loss = (divergence + _FLOOR) ** _POWER
    if labels is not None and label_weight:
        cross_entropy = F.nll_loss(student, labels, ignore_index=-1, reduction="none")
        loss = torch.where(labels >= 0, (1 - label_weight) * loss + label_weight * cross_entropy, loss)
    return loss.mean(), divergence.detach().mean()


def pixel_distillation_loss(
    student: Float[Tensor, "batch classes height width"], teacher: Float[Tensor, "batch classes height width"]
) -> tuple[Tensor, Tensor]:
    """(loss, KL divergence of the student from the teacher in nats per pixel), means over images.

    The loss is a power below 1 of the mean divergence of the pixels of each image, as in `distillation_loss`.
    """
    student, teacher = student.float().log_softmax(1), teacher.float().log_softmax(1)
    per_pixel = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
    divergence = per_pixel.mean(dim=(1, 2)).clamp(min=0)
    return ((divergence + _FLOOR) ** _POWER).mean(), divergence.detach().mean()


def feature_loss(
    student: Float[Tensor, "batch *tokens dim"],
    teacher: Float[Tensor, "batch *tokens dim"],
    scale: Float[Tensor, "*any dim"],
) -> tuple[Tensor, Tensor]:
    """(loss, cosine similarity of student and teacher), means over images; for models without logits.

    The error of a vector is its cosine distance, which is how embeddings are compared, plus a smooth L1 distance of its
    channels in units of ``scale``, their standard deviations over photos. Without the second part an error along the
    mean of all embeddings, or in channels of small variance beside a few large ones, would hardly count, and the length
    of a vector not at all. The loss is a power below 1 of the error of each image, as in `distillation_loss`.
    """
    student, teacher = student.float(), teacher.float()
    cosine = F.cosine_similarity(student, teacher, dim=-1)
    distance = F.smooth_l1_loss(student / scale, teacher / scale, reduction="none").mean(dim=-1)
    error = (
        (1 - cosine + distance).reshape(len(cosine), -1).mean(dim=1).clamp(min=0)
    )  # a cosine can be rounded to above 1
    return ((error + _FLOOR) ** _POWER).mean(), cosine.detach().mean()


def token_loss(student: Float[Tensor, "batch blocks dim"], teacher: Float[Tensor, "batch blocks dim"]) -> Tensor:
    """Cosine distance of the image tokens after each block, mean over blocks and images."""
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()
