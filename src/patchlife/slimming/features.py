"""Tokens after some of the blocks, as timm's `forward_intermediates` gives them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import ConfigError

__all__ = ["Indices", "block_indices", "intermediates"]

Indices = int | list[int] | tuple[int, ...] | None


def block_indices(depth: int, indices: Indices) -> list[int]:
    """The blocks that ``indices`` means, rising: the last n for a number, these for a list, all for None."""
    if indices is None or isinstance(indices, int):
        count = depth if indices is None else indices
        if not 0 < count <= depth:
            raise ConfigError(f"indices must be a number of last blocks from 1 to {depth}, got {count}")
        return list(range(depth - count, depth))
    if wrong := [index for index in indices if not -depth <= index < depth]:
        raise ConfigError(f"indices must be blocks from {-depth} to {depth - 1}, got {wrong}")
    return sorted({index % depth for index in indices})


def intermediates(
    tokens: list[Tensor], prefix: int, grid: tuple[int, int], output_fmt: str, return_prefix_tokens: bool
) -> list[Any]:
    """Patches of each entry (batch, tokens, dim) as (batch, dim, rows, cols) for NCHW, (batch, patches, dim) for NLC.

    With ``return_prefix_tokens`` each is a pair: patches, and the prefix tokens (batch, prefix, dim).
    """
    if output_fmt not in ("NCHW", "NLC"):
        raise ConfigError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
    patches = [x[:, prefix:] for x in tokens]
    if output_fmt == "NCHW":
        patches = [x.transpose(1, 2).reshape(x.shape[0], -1, *grid).contiguous() for x in patches]
    if return_prefix_tokens and prefix:
        return [(patch, x[:, :prefix]) for patch, x in zip(patches, tokens, strict=True)]
    return patches
