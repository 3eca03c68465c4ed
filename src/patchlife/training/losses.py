"""What learning minimises. Pure functions: tensors in, a scalar out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["distillation_loss", "importance_loss", "similarity_loss"]

_POWER = 0.75  # of a divergence; recipes/NOTES.md compares 1 and 0.5
_FLOOR = 1e-3  # nats; below it a power would pull at what is as good as equal


def importance_loss(logits: Float[Tensor, "batch patches"], importance: Float[Tensor, "batch patches"]) -> Tensor:
    """KL divergence from the teacher's shares of importance to ``softmax(logits)``, mean over images; 0 is perfect."""
    return F.kl_div(logits.log_softmax(dim=1), importance, reduction="batchmean")


def similarity_loss(embedding: Float[Tensor, "batch patches k"], target: Float[Tensor, "batch patches dim"]) -> Tensor:
    """Squared error of all pairs' cosine similarities, pairs that are truly alike weighing most.

    MergeTargets are chosen among near pairs, so an error there matters; whether two patches are unlike by 0.1 or by
    -0.3 does not. ``embedding`` has unit rows.
    """
    target = F.normalize(target, dim=2)
    wanted = target @ target.transpose(1, 2)
    error = (embedding @ embedding.transpose(1, 2) - wanted).square()
    return 20 * (error * wanted.clamp(min=0.05)).mean()


def distillation_loss(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"] | None = None,
    label_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(what is minimised, the KL divergence of the student from the teacher's whole distribution in nats).

    Minimised is a power below 1 of each image's divergence: at a budget of 0.35 the divergence is a hundred times
    what it is at 0.8, and without the power the small budgets alone would shape the weights that all budgets share.
    Labels are mixed in where given; those of -1 are unknown, and their weight stays with the teacher.
    """
    student, teacher = student.float().log_softmax(1), teacher.float().log_softmax(1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1).clamp(min=0)
    loss = (divergence + _FLOOR) ** _POWER
    if labels is not None and label_weight:
        named = F.nll_loss(student, labels, ignore_index=-1, reduction="none")
        loss = torch.where(labels >= 0, (1 - label_weight) * loss + label_weight * named, loss)
    return loss.mean(), divergence.detach().mean()
