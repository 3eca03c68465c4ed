"""Compares a model's predictions with the dense model's: the predicted class, and the distribution."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["kl_divergence", "same_class"]


def kl_divergence(
    reference: Float[Tensor, "batch classes *pixels"], logits: Float[Tensor, "batch classes *pixels"]
) -> Float[Tensor, "batch *pixels"]:
    """KL divergence of ``softmax(logits)`` from ``softmax(reference)``, in nats, for each image, or each pixel."""
    expected = reference.log_softmax(dim=1)
    return (expected.exp() * (expected - logits.log_softmax(dim=1))).sum(dim=1)


def same_class(
    reference: Float[Tensor, "batch classes *pixels"], logits: Float[Tensor, "batch classes *pixels"]
) -> Bool[Tensor, "batch *pixels"]:
    """Whether both predict the same class, for each image, or each pixel."""
    return reference.argmax(dim=1) == logits.argmax(dim=1)
