"""Lives: how many blocks each patch takes part in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Lives"]


@dataclass(frozen=True)
class Lives:
    """The life of every patch, for a batch of images.

    Attributes:
        life: in blocks, row-major over the grid. A patch takes part in block ``l`` while ``l < life``;
            a life of ``depth`` means that it is never dropped.
        kept: how many patches of each image enter each block.
        score: the scorer's, before the budget turns it into lives; the higher, the longer the life.
        grid: (rows, cols) of the patch grid, ``rows * cols == patches``.
    """

    life: Float[Tensor, "batch patches"]
    kept: Int[Tensor, "batch depth"]
    score: Float[Tensor, "batch patches"]
    grid: tuple[int, int]

    @classmethod
    def full(cls, batch: int, grid: tuple[int, int], depth: int, device: torch.device | str = "cpu") -> Lives:
        """No patch is dropped; all scores are 0, as no scorer was run."""
        patches = grid[0] * grid[1]
        zeros = torch.zeros(batch, patches, device=device)
        return cls(zeros + depth, torch.full((batch, depth), patches, device=device), zeros, grid)

    @property
    def depth(self) -> int:
        """Blocks in the model."""
        return self.kept.shape[1]

    def __len__(self) -> int:
        return self.life.shape[0]

    def __getitem__(self, image: int) -> Lives:
        """The lives of one image, as a batch of one. Raises IndexError beyond the batch, which ends iterations."""
        if not -len(self) <= image < len(self):
            raise IndexError(f"image index {image} is out of range for a batch of {len(self)}")
        one = slice(image % len(self), image % len(self) + 1)
        return Lives(self.life[one], self.kept[one], self.score[one], self.grid)

    def map(self, image: int = 0) -> Float[Tensor, "rows cols"]:
        """One image's lives laid out as its patch grid."""
        return self.life[image].reshape(self.grid)

    def present(self, block: int) -> Bool[Tensor, "batch patches"]:
        """Which patches enter ``block``."""
        return self.life > block
