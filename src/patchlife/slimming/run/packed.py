"""Attention over a packed sequence: the tokens of each image attend to each other, whatever their number.

Three implementations with the same result. On a CPU: a loop over the images, the fastest (measured). On a GPU: torch's
variable-length kernel, in half precision; where it does not run, images of nearly equal length are padded to one length
and run together. The tests run the arithmetic of the two GPU implementations on the CPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...backbones import Attend, sdpa

__all__ = ["BiasChannels", "Kernel", "packed_attention", "varlen_attention", "varlen_kernel"]

Kernel = Callable[..., Any]

Bias = Float[Tensor, "packed"] | None

_ROUND = 32  # tokens: images whose counts round up to the same multiple run together
_CHANNELS = 8  # head dimensions come in eights


def packed_attention(offsets: tuple[int, ...], bias: Bias, like: Tensor, begins: Tensor | None = None) -> Attend:
    """The attention function for the images between ``offsets``.

    Args:
        offsets: where each image begins in the packed sequence, and the end.
        bias: added to the logits of each key; None for nothing.
        like: a tensor of the device and dtype that attention will see.
        begins: ``offsets`` on that device; copied there if None.
    """
    if len(offsets) == 1:  # an empty batch
        return _empty
    if not like.is_cuda:
        return partial(_one_by_one, offsets, bias)
    kernel = varlen_kernel(like)
    if kernel is not None:
        begins = torch.tensor(offsets, device=like.device) if begins is None else begins
        channels = None if bias is None else BiasChannels(bias)
        return partial(varlen_attention, kernel, begins.int(), _longest(offsets), channels)
    return partial(_in_groups, _groups(offsets, like.device), bias)


def _empty(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v


def _one_by_one(offsets: tuple[int, ...], bias: Bias, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    pieces = [slice(a, b) for a, b in pairwise(offsets)]
    return torch.cat(
        [
            sdpa(q[None, p], k[None, p], v[None, p], None if bias is None else bias[None, None, None, p])[0]
            for p in pieces
        ]
    )


# ---- the variable-length kernel


def varlen_kernel(like: Tensor) -> Kernel | None:
    """torch's variable-length kernel; None where this torch, GPU or dtype cannot run it."""
    if like.dtype not in (torch.float16, torch.bfloat16) or torch.cuda.get_device_capability(like.device)[0] < 8:
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    return as_called(varlen_attn)


def as_called(kernel: Kernel) -> Kernel:
    """``kernel`` with the arguments scale and num_splits, of which torch 2.10 has neither and later ones one or both.

    Without num_splits the last digits of an image may depend on the other images of the batch.
    """
    known = inspect.signature(kernel).parameters
    if {"scale", "num_splits"} <= set(known):
        return kernel

    def call(q: Tensor, *others: Any, scale: float, num_splits: int) -> Tensor:
        options = {name: value for name, value in (("scale", scale), ("num_splits", num_splits)) if name in known}
        if "scale" not in known:  # it then scales by the root of the padded width
            q = q * (scale * q.shape[-1] ** 0.5)
        return kernel(q, *others, **options)

    return call


def varlen_attention(
    kernel: Kernel, offsets: Tensor, longest: int, channels: BiasChannels | None, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """``kernel`` with a bias for each key, which it has no argument for: it is given as extra channels."""
    width, scale = q.shape[-1], q.shape[-1] ** -0.5
    if channels is not None:
        q, k, v = channels.joined_to(q, k, v)
    out = kernel(q, k, v, offsets, offsets, longest, longest, scale=scale, num_splits=1)
    return out[..., :width]


class BiasChannels:
    """A bias of each key as extra channels: 1 in the queries, in the keys three numbers whose sum is the bias.

    Three half-precision numbers are as exact as float32 logits need. They are computed once for all blocks of a stage.

    Args:
        bias: added to the logits of each key.
    """

    def __init__(self, bias: Float[Tensor, "packed"]) -> None:
        self.bias = bias
        self._channels: tuple[Tensor, Tensor, Tensor] | None = None

    def joined_to(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values with `_CHANNELS` more channels."""
        if self._channels is None:
            self._channels = self._of(k)
        one, parts, zero = (channel[:, None].expand(-1, k.shape[1], -1) for channel in self._channels)
        return torch.cat((q, one), -1), torch.cat((k, parts), -1), torch.cat((v, zero), -1)

    def _of(self, k: Float[Tensor, "packed heads head_dim"]) -> tuple[Tensor, Tensor, Tensor]:
        """The channels of queries, keys and values, each (packed, channels), for keys like ``k``."""
        left = self.bias.float() / k.shape[-1] ** -0.5  # the kernel multiplies logits with this scale
        parts = []
        for _ in range(3):
            parts.append(left.to(k.dtype))
            left = left - parts[-1].float()
        zero = k.new_zeros(len(left), _CHANNELS)
        one = F.pad(k.new_ones(len(left), 3), (0, _CHANNELS - 3))
        return one, F.pad(torch.stack(parts, dim=1), (0, _CHANNELS - 3)), zero


def _longest(offsets: tuple[int, ...]) -> int:
    return max(b - a for a, b in pairwise(offsets))


# ---- padding images of nearly equal length


def _groups(offsets: tuple[int, ...], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """(places in the packed sequence (images, length), which of them are not padding), for each group."""
    by_length: dict[int, list[tuple[int, int]]] = {}
    for a, b in pairwise(offsets):
        by_length.setdefault(-(-(b - a) // _ROUND), []).append((a, b))
    groups = []
    for members in by_length.values():
        length = max(b - a for a, b in members)
        within = torch.arange(length)
        first, end = (torch.tensor(ends)[:, None] for ends in zip(*members, strict=True))
        place = first + within
        groups.append((torch.minimum(place, end - 1).to(device), (place < end).to(device)))
    return groups


def _in_groups(groups: list[tuple[Tensor, Tensor]], bias: Bias, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = torch.empty_like(q)
    for place, real in groups:
        mask = torch.zeros(place.shape, dtype=q.dtype, device=q.device) if bias is None else bias[place].to(q.dtype)
        mask = mask.masked_fill(~real, -torch.inf)[:, None, None, :]
        out[place[real]] = sdpa(q[place], k[place], v[place], mask)[real]
    return out
