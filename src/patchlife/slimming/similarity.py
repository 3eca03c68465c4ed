"""Cosine similarities between the patches of an image, computed a block of rows at a time.

The cosines of all pairs are never held together: memory grows linearly with the number of patches. Time grows with its
square up to `WINDOW` patches. A larger image is cut into windows of consecutive patches in grid order, and patches are
compared within their window only, so that time grows linearly too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "WINDOW",
    "comparable",
    "falling",
    "flat_index",
    "most_similar",
    "row_blocks",
    "subspace",
    "take",
    "token_index",
    "unit",
    "windows",
]

WINDOW = 4096
"""Largest number of patches that are compared with each other."""

_NOISE = 1e-5  # length of what is left of a unit vector in float32, below which it is rounding noise
_BLOCK = 2**18  # cosines of an image that are held at a time: they stay in the cache of a core


def windows(patches: int) -> list[slice]:
    """Windows of nearly equal size, at most `WINDOW` patches each, in grid order; one for most images."""
    count = -(-patches // WINDOW)
    return [slice(i * patches // count, (i + 1) * patches // count) for i in range(count)]


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of ``rows``, so that a block of rows by ``columns`` is not too large."""
    step = max(1, _BLOCK // max(1, columns))
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def comparable(embedding: Tensor) -> Tensor:
    """``embedding`` in float32 or wider: half precision would order near-equal pairs by rounding noise."""
    return embedding.to(torch.promote_types(embedding.dtype, torch.float32))


def unit(vectors: Float[Tensor, "*any k"]) -> Float[Tensor, "*any k"]:
    """``vectors`` at length 1; zero vectors stay. As `F.normalize`, which takes longer to call."""
    return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(1e-12)


def subspace(vectors: Float[Tensor, "batch patches dim"], width: int) -> Float[Tensor, "batch patches width"]:
    """Coordinates of ``vectors`` in a subspace of ``width`` dimensions (at most dim) that holds most of their length.

    One step of subspace iteration (Halko, Martinsson and Tropp, 2011), from the vectors of evenly spaced patches.
    Cosines in few dimensions cost a fraction of those of whole tokens, and differ little (recipes/NOTES.md).
    """
    patches, width = vectors.shape[1], min(width, vectors.shape[2])
    # computed on the device: an index from a list would be copied there, and wait for all work before it
    spaced = torch.arange(1, 2 * width, 2, device=vectors.device) * patches // (2 * width)
    directions = vectors.transpose(1, 2) @ (vectors @ vectors.index_select(1, spaced).transpose(1, 2))
    return vectors @ _orthonormal(directions)


def _orthonormal(columns: Float[Tensor, "batch dim width"]) -> Float[Tensor, "batch dim width"]:
    """An orthonormal basis of the columns. ONNX has no such operator: there by the Gram-Schmidt process.

    Of a column that depends on those before it, only rounding noise is left. There it stays near 0: at unit length it
    would not be orthogonal to the others.
    """
    if not torch.onnx.is_in_onnx_export():
        return torch.linalg.qr(columns).Q
    columns = F.normalize(columns, dim=1)
    basis = columns[..., :0]
    for index in range(columns.shape[-1]):
        column = columns[..., index : index + 1]
        for _ in range(2):  # the second time removes what rounding has left
            column = column - basis @ (basis.transpose(1, 2) @ column)
        basis = torch.cat((basis, F.normalize(column, dim=1, eps=_NOISE)), dim=2)
    return basis


def most_similar(
    rows: Float[Tensor, "batch rows k"], columns: Float[Tensor, "batch columns k"]
) -> tuple[Int[Tensor, "batch rows"], Float[Tensor, "batch rows"]]:
    """(the most similar column of each row, their cosine); both hold vectors of unit length."""
    transposed = columns.transpose(1, 2)
    best = [(rows[:, block] @ transposed).max(dim=2) for block in row_blocks(rows.shape[1], columns.shape[1])]
    if len(best) == 1:
        return best[0].indices, best[0].values
    return torch.cat([b.indices for b in best], dim=1), torch.cat([b.values for b in best], dim=1)


def falling(values: Float[Tensor, "batch patches"]) -> Int[Tensor, "batch patches"]:
    """Patch indices by falling value; ties go to the lower patch index."""
    if torch.onnx.is_in_onnx_export():  # a stable sort does not export; ONNX's TopK takes the lower index of a tie
        return values.topk(values.shape[1], dim=1).indices
    return values.sort(dim=1, descending=True, stable=True).indices


def take(rows: Float[Tensor, "batch rows dim"], index: Int[Tensor, "batch taken"]) -> Float[Tensor, "batch taken dim"]:
    """Rows of each image by their index. One copy of whole rows: several times faster than `torch.gather`."""
    taken = rows.flatten(0, 1).index_select(0, flat_index(index, rows.shape[1]))
    return taken.unflatten(0, (rows.shape[0], index.shape[1]))


def token_index(patches: Int[Tensor, "batch taken"], prefix: int) -> Int[Tensor, "batch tokens"]:
    """The index of all prefix tokens, then of ``patches``, among the tokens of an image."""
    front = torch.arange(prefix, device=patches.device).expand(patches.shape[0], -1)
    return torch.cat((front, patches + prefix), dim=1)


def flat_index(index: Int[Tensor, "batch taken"], rows: int) -> Int[Tensor, "batch*taken"]:
    """The same rows in a layout of all images one after the other, of ``rows`` rows each."""
    batch = index.shape[0]
    if batch == 1:
        return index.flatten()
    return torch.add(index, torch.arange(batch, device=index.device)[:, None], alpha=rows).flatten()
