"""Attention as a function of queries, keys and values, for the blocks of all libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import UnsupportedModelError

__all__ = ["Attend", "Heads", "Projected", "check_same", "class_logits", "class_row", "identity_prefix", "sdpa"]

Heads = Float[Tensor, "*batch tokens heads head_dim"]
"""Queries, keys or values. Tokens come before heads everywhere, with or without a batch dimension."""

Attend = Callable[[Heads, Heads, Heads], Heads]
"""An attention function: (queries, keys, values) to attended values."""


class Projected(NamedTuple):
    """Queries, keys and values of one block."""

    q: Heads
    k: Heads
    v: Heads


def sdpa(q: Heads, k: Heads, v: Heads, bias: Tensor | None = None) -> Heads:
    """Fused attention. ``bias``, added to the logits, broadcasts to (batch, heads, queries, keys)."""
    out = nn.functional.scaled_dot_product_attention(
        q.transpose(-3, -2), k.transpose(-3, -2), v.transpose(-3, -2), bias
    )
    return out.transpose(-3, -2)


def class_logits(
    q: Float[Tensor, "batch heads head_dim"], w_k: Float[Tensor, "keys_dim dim"], y: Float[Tensor, "batch tokens dim"]
) -> Float[Tensor, "batch heads tokens"]:
    """Attention logits of one query per head: ``(q W_k) y`` instead of ``q (W_k y)``.

    It needs one product with the key weights instead of one per token. The key bias is left out: it adds a constant to
    each row, which softmax ignores.
    """
    q = q * q.shape[-1] ** -0.5
    per_head = torch.bmm(q.transpose(0, 1), w_k.unflatten(0, (q.shape[1], -1)))  # (heads, batch, dim)
    return per_head.transpose(0, 1) @ y.transpose(1, 2)


def class_row(
    q: Float[Tensor, "batch tokens heads head_dim"], k: Float[Tensor, "batch tokens heads head_dim"]
) -> Float[Tensor, "batch heads tokens"]:
    """Attention logits of the class token, the first one, for all keys."""
    q = q[:, 0] * q.shape[-1] ** -0.5
    return (k.transpose(1, 2) @ q[..., None]).squeeze(-1)


def identity_prefix(rope: Tensor, prefix: int) -> Tensor:
    """A (..., patches, 2 * head_dim) table with ``prefix`` identity rotations (sin 0, cos 1) put in front."""
    sin = rope.new_zeros(*rope.shape[:-2], prefix, rope.shape[-1] // 2)
    return torch.cat((torch.cat((sin, sin + 1), -1), rope), -2)


def check_same(block: nn.Module, library: str, x: Tensor, expected: Tensor, got: Tensor) -> None:
    """Raise UnsupportedModelError unless the parts of ``block``, run one by one, give what the block gives.

    Args:
        block: for the error. library: for the error.
        x: the input (batch, tokens, dim).
        expected: the output of the block for ``x``.
        got: the output of its parts.
    """
    error = (expected - got).abs().max() / (expected - x).abs().max().clamp(min=1e-6)
    if not error < 1e-3:
        raise UnsupportedModelError(
            f"{type(block).__name__} of the installed {library} computes something else than patchlife expects "
            f"(relative difference {error:.1e}); please report your {library} version"
        )
