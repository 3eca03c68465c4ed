"""How alike the patches of an image are: computed once, asked by coverage (`coverage.py`) and by heirs (`heirs.py`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Likeness", "cosines"]


class Likeness(NamedTuple):
    """Cosines between the patches of each image.

    Attributes:
        cosine: rows and columns are patches, both in the order that suited whoever computed it.
        place: each patch's row, which is its column, too.
    """

    cosine: Float[Tensor, "batch patches patches"]
    place: Int[Tensor, "batch patches"]

    @classmethod
    def of(cls, kin: Float[Tensor, "batch patches kin_dim"]) -> Likeness:
        """In grid order, from vectors with unit rows."""
        return cls(cosines(kin), torch.arange(kin.shape[1], device=kin.device).expand(kin.shape[0], -1))

    def ordered(self, order: Int[Tensor, "batch patches"]) -> Likeness:
        """The same, with ``place`` the places of the patches that ``order`` names: of rank 0, 1, 2, ..."""
        return Likeness(self.cosine, self.place.gather(1, order))

    def between(self, rows: slice, columns: slice) -> Float[Tensor, "batch rows columns"]:
        """Cosines of some ranks with others, after `ordered`."""
        image = torch.arange(self.place.shape[0], device=self.place.device)[:, None]
        some, others = self.place[:, rows], self.place[:, columns]
        return self.cosine[image, some].gather(2, others[:, None].expand(-1, some.shape[1], -1))


def cosines(kin: Float[Tensor, "batch patches kin_dim"]) -> Float[Tensor, "batch patches patches"]:
    """Of all patches with all, in float32 or wider: what half precision rounds off would decide between twins."""
    kin = kin.to(torch.promote_types(kin.dtype, torch.float32))
    return kin @ kin.transpose(1, 2)
