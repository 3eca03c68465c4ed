"""What learning minimises. Pure functions: tensors in, a scalar out."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["distillation_loss", "kinship_loss", "worth_loss"]


def worth_loss(logits: Float[Tensor, "batch patches"], worth: Float[Tensor, "batch patches"]) -> Tensor:
    """KL divergence from the teacher's shares of worth to ``softmax(logits)``, mean over images; 0 is perfect."""
    return F.kl_div(logits.log_softmax(dim=1), worth, reduction="batchmean")


def kinship_loss(kin: Float[Tensor, "batch patches k"], target: Float[Tensor, "batch patches dim"]) -> Tensor:
    """Squared error of all pairs' cosine similarities, pairs that are truly alike weighing most.

    Heirs are chosen among near pairs, so an error there matters; whether two patches are unlike by 0.1 or by
    -0.3 does not. ``kin`` has unit rows.
    """
    target = F.normalize(target, dim=2)
    wanted = target @ target.transpose(1, 2)
    error = (kin @ kin.transpose(1, 2) - wanted).square()
    return 20 * (error * wanted.clamp(min=0.05)).mean()


def distillation_loss(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"] | None = None,
    label_weight: float = 0.0,
) -> Tensor:
    """KL divergence of the student from the teacher's whole distribution, labels mixed in where given.

    Labels of -1 are unknown; such a batch's weight stays with the teacher.
    """
    loss = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True)
    if labels is None or label_weight == 0 or not (labels >= 0).any():
        return loss
    return (1 - label_weight) * loss + label_weight * F.cross_entropy(student, labels, ignore_index=-1)
