"""What a slimmed model tells about the patches of some photos."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Lives"]


@dataclass(frozen=True)
class Lives:
    """How long every patch lives, for a batch of images.

    Attributes:
        life: in blocks, row-major over the grid. A patch takes part in block ``l`` while ``l < life``;
            a life of ``depth`` means that it survives to the end.
        survivors: how many patches of each image enter each block.
        score: what the life head said, before the budget turned it into lives; higher lives longer.
        grid: (rows, cols) of the patch grid, ``rows * cols == patches``.
    """

    life: Float[Tensor, "batch patches"]
    survivors: Int[Tensor, "batch depth"]
    score: Float[Tensor, "batch patches"]
    grid: tuple[int, int]

    @classmethod
    def endless(cls, batch: int, grid: tuple[int, int], depth: int, device: torch.device | str = "cpu") -> Lives:
        """Every patch lives to the end and nothing had to be decided (all scores 0)."""
        patches = grid[0] * grid[1]
        zeros = torch.zeros(batch, patches, device=device)
        return cls(zeros + depth, torch.full((batch, depth), patches, device=device), zeros, grid)

    @property
    def depth(self) -> int:
        """Blocks in the model."""
        return self.survivors.shape[1]

    def __len__(self) -> int:
        return self.life.shape[0]

    def __getitem__(self, image: int) -> Lives:
        """The lives of one image, as a batch of one. Raises IndexError beyond the batch, which ends iterations."""
        if not -len(self) <= image < len(self):
            raise IndexError(f"image {image} of a batch of {len(self)}")
        one = slice(image % len(self), image % len(self) + 1)
        return Lives(self.life[one], self.survivors[one], self.score[one], self.grid)

    def map(self, image: int = 0) -> Float[Tensor, "rows cols"]:
        """One image's lives laid out as its patch grid."""
        return self.life[image].reshape(self.grid)

    def alive(self, block: int) -> Bool[Tensor, "batch patches"]:
        """Which patches enter ``block``."""
        return self.life > block
