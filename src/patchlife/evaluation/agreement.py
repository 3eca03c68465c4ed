"""Compares a model's predictions with the dense model's: the predicted class, and the distribution."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["kl_divergence", "same_class"]


def kl_divergence(
    reference: Float[Tensor, "batch classes"], logits: Float[Tensor, "batch classes"]
) -> Float[Tensor, "batch"]:
    """KL divergence of ``softmax(logits)`` from ``softmax(reference)``, in nats, for each image."""
    expected = reference.log_softmax(dim=1)
    return (expected.exp() * (expected - logits.log_softmax(dim=1))).sum(dim=1)


def same_class(
    reference: Float[Tensor, "batch classes"], logits: Float[Tensor, "batch classes"]
) -> Bool[Tensor, "batch"]:
    """Whether both predict the same class, for each image."""
    return reference.argmax(dim=1) == logits.argmax(dim=1)
