"""Cosine similarities between the patches of an image, computed once for coverage gains and for merging."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Similarity", "cosines"]


class Similarity(NamedTuple):
    """Cosines between the patches of each image.

    Attributes:
        cosine: rows and columns are patches, both in the same order (any order).
        place: the row, and column, of each patch.
    """

    cosine: Float[Tensor, "batch patches patches"]
    place: Int[Tensor, "batch patches"]

    @classmethod
    def of(cls, embedding: Float[Tensor, "batch patches embedding_dim"]) -> Similarity:
        """In grid order, from vectors of unit length."""
        batch, patches, _ = embedding.shape
        return cls(cosines(embedding), torch.arange(patches, device=embedding.device).expand(batch, -1))

    def ordered(self, order: Int[Tensor, "batch patches"]) -> Similarity:
        """The same cosines, with ``place`` for the patches of rank 0, 1, 2, ... in ``order``."""
        return Similarity(self.cosine, self.place.gather(1, order))

    def between(self, rows: slice, columns: slice) -> Float[Tensor, "batch rows columns"]:
        """Cosines of some ranks with others; call it on the result of `ordered`."""
        image = torch.arange(self.place.shape[0], device=self.place.device)[:, None]
        row, column = self.place[:, rows], self.place[:, columns]
        return self.cosine[image, row].gather(2, column[:, None].expand(-1, row.shape[1], -1))


def cosines(embedding: Float[Tensor, "batch patches embedding_dim"]) -> Float[Tensor, "batch patches patches"]:
    """Of all pairs of patches, in float32 or wider: half precision would order near-equal pairs by rounding noise."""
    embedding = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
    return embedding @ embedding.transpose(1, 2)
